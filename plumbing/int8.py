"""Not the method, skip it at first reading: hqdm.py's int_product from int8 instructions of torch, without Triton;
weights as Triton's wants them; and a look at whether float convolutions add integers exactly.

onednn_product is a convolution of bytes, on CPUs whose oneDNN has one; int8_product, im2col and a matrix product, runs
everywhere. Integers that are too large are cut into int8 digits. Both are exact, or refuse: tests/test_4.
"""
import functools
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.weak import WeakTensorKeyDictionary


def exact_or_said(multiply):
    """Decorator: a frozen layer's first sums of each shape are compared with float64; who rounds them is warned of.

    Some libraries choose Winograd's convolutions, which multiply by fractions. One sample shows it.
    """
    seen = set()

    @functools.wraps(multiply)
    def checked(layer, q_x, q_w, scales=None):
        case = q_x.device, q_x.shape, q_w.shape, q_w.dtype, layer.stride, layer.padding
        plain = type(q_x) is torch.Tensor and not torch.compiler.is_compiling() and not captured(q_x)    # no stand-in
        if layer.weights.frozen and len(q_x) and plain and case not in seen:
            seen.add(case)
            mine, *operands = (v.detach().cpu().double() for v in (multiply(layer, q_x, q_w)[:1], q_x[:1], q_w))
            wrong = int((layer.product(*operands).float().double() != mine).sum())
            if wrong and mine.isfinite().all():
                warnings.warn(f"float convolutions on {q_x.device} do not add integers exactly here ({wrong} of "
                              f"{mine.numel()} sums differ): hqdm.set_integer will give other bits", stacklevel=2)
        return multiply(layer, q_x, q_w, scales)
    return checked


def int8_digits(x, largest, limit, bits):
    """Integers up to `largest` -> [(shift, int8)] with x = sum digit << shift: 0 .. 2^bits - 1, the last +-limit."""
    digits, shift = [], 0
    while largest > limit:
        digits.append((shift, (x & (2**bits - 1)).to(torch.int8)))
        x, largest, shift = x >> bits, (largest >> bits) + 1, shift + bits       # x >> bits rounds down: hence the + 1
    return [*digits, (shift, x.to(torch.int8))]


def largest_of(x):
    """The largest |x|; on a GPU what its dtype can hold, because to look would make the host wait."""
    if x.is_cuda and x.dtype in (torch.int8, torch.int16):
        return torch.iinfo(x.dtype).max
    return max(-int(x.min()), int(x.max())) if x.numel() else 0


def im2col(x, kh, kw, stride, padding):
    """(B, h, w, C) -> (B h' w', kh kw C), a row for each output pixel. A copy only where patches overlap."""
    C, x = x.shape[-1], F.pad(x, (0, 0) + (padding,) * 4)
    x = rearrange(x, "B h w C -> B h (w C)")         # kw neighbours with all their channels are one run of memory
    x = x.unfold(2, kw * C, stride * C).unfold(1, kh, stride)                # (B, h', w', kw C, kh), a view
    return rearrange(x, "B h w kwC kh -> (B h w) (kh kwC)")


def int8_product(q_x, q_w, stride, padding):
    """q_x (B, h, w, C) and q_w (O, C, kh, kw) -> int32 (B h' w', O): im2col, and a product of each pair of int8 digits.

    CPUs without VNNI instructions add products in pairs as int16, activations shifted by 128: two of them must not pass
    32767. That leaves weights 64 (activations up to 127) to 125 (up to 3); larger ones get two digits or more.
    """
    x_max, (O, _, kh, kw), acc = largest_of(q_x), q_w.shape, None
    limit = 127 if q_x.is_cuda else 32767 // (2 * (128 + min(x_max, 127)))
    w = rearrange(q_w, "O C kh kw -> O (kh kw C)")
    weights = int8_digits(w, largest_of(w), limit, bits=7 if q_x.is_cuda else 6)
    # cuBLASLt wants more than 16 rows, multiples of 8 elsewhere (zeros change no sum), and weights stored by columns.
    wide = -w.shape[1] % 8
    rows = torch.cat([F.pad(digit, (0, wide, 0, -O % 8)) for _, digit in weights])
    for i, digit in int8_digits(q_x, x_max, 127, bits=7):
        a = im2col(digit, kh, kw, stride, padding)
        m = len(a)
        parts = torch._int_mm(F.pad(a, (0, wide, 0, max(0, 32 - m))) if wide or m < 32 else a, rows.T)
        for (j, _), part in zip(weights, parts.split(len(rows) // len(weights), dim=1)):
            part = part[:m, :O] << (i + j) if i + j else part[:m, :O]
            acc = part if acc is None else acc + part            # int32 wraps around, and the sum fits
    return acc


@functools.cache
def onednn_is_exact():
    """Whether torch has oneDNN's int8 convolution on this CPU, adding integers exactly: tried once, and said if not."""
    g = torch.Generator().manual_seed(0)
    q_x, q_w = (torch.randint(low, high, size, generator=g) for low, high, size in (
        (-60, 196, (3, 7, 5, 66)), (-300, 301, (9, 66, 3, 3))))
    sums = F.conv2d(rearrange(q_x, "B h w C -> B C h w").double(), q_w.double(), stride=2, padding=1)
    try:
        exact = torch.equal(rearrange(onednn_product(q_x, q_w, 2, 1).double(), "B h w C -> B C h w"), sums)
    except (AttributeError, RuntimeError, TypeError):            # another processor, or another torch
        exact = False
    if not exact:
        print("kernels: no exact int8 convolution of oneDNN here; integer products copy patches", flush=True)
    return exact


def onednn_product(q_x, q_w, stride, padding):
    """What int8_product returns, as (B, h', w', O), int32 or integers in float32, without copying patches.

    Activations are bytes here, 0 is stored as -low. None where they span more than a byte or a sum could pass 2^24.
    """
    low, high = min(0, int(q_x.min())), max(0, int(q_x.max()))
    parts = packed(q_w, 127 if high - low < 130 else 64, stride, padding)        # CPUs without VNNI: see int8_product
    if high - low > 255 or max(-low, high) * max(largest for *_, largest in parts) >= 2**24:
        return None
    x, acc = rearrange((q_x - low).to(torch.uint8), "B h w C -> B C h w"), None
    for shift, weight, one, zero, _ in parts:
        part = torch.ops.onednn.qconv2d_pointwise(x, 1.0, -low, weight, one, zero, None, [stride] * 2, [padding] * 2,
                                                  [1, 1], 1, 1.0, 0, torch.float32, "none", [], "")
        part = part.to(torch.int32) << shift if len(parts) > 1 else part
        acc = part if acc is None else acc + part
    return rearrange(acc, "B C h w -> B h w C")


_PREPARED = WeakTensorKeyDictionary()


def captured(x):
    """Whether a CUDA graph is recorded where x is."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def prepared(make):
    """Decorator: make(q_w, *args) is kept as long as the tensor that holds q_w, made anew where that was written.

    What a CUDA graph makes is the graph's, filled when it runs: it is not kept. What was there before, it takes.
    """
    @functools.wraps(make)
    def remember(q_w, *args):
        owner = q_w if q_w._base is None else q_w._base
        key = None if q_w.is_inference() else (
            make, q_w._version, q_w.shape, q_w.stride(), q_w.storage_offset(), *args)
        if key is not None and owner in _PREPARED and _PREPARED[owner][0] == key:
            return _PREPARED[owner][1]
        with torch.inference_mode(False):            # for later calls, too
            made = make(q_w, *args)
        if key is not None and not captured(q_w):
            _PREPARED[owner] = key, made
        return made
    return remember


@prepared
def packed(q_w, limit, stride, padding):
    """A weight for onednn_product: [(shift, packed, ones, zeros, largest sum of |w|)], one for each int8 digit."""
    one, zero, parts = torch.ones(len(q_w)), torch.zeros(len(q_w), dtype=torch.int32), []
    for shift, digit in int8_digits(q_w, largest_of(q_w), limit, bits=7 if limit == 127 else 6):
        weight = torch.ops.onednn.qconv_prepack(digit.contiguous(), one, 1.0, 0, [stride] * 2, [padding] * 2,
                                                [1, 1], 1, None)
        parts.append((shift, weight, one, zero, int(digit.int().abs().flatten(1).sum(1).max())))
    return parts


@prepared
def for_triton(q_w):
    """A weight for Triton: int8 (1 or 2 digits, O, kh, kw, C' = C and zeros to a multiple of 16); middle (O,) or None.

    q_w - z of 8 bits are 256 integers in a row, but not -128 .. 127: less the middle of those of their output they fit.
    Others, and what is made in a CUDA graph, where nobody may look, are two digits: the low seven bits, and the rest.
    """
    w, middle = rearrange(q_w, "O C kh kw -> O kh kw C"), None
    digits = [w] if w.dtype == torch.int8 else [w & 127, w >> 7]
    if len(digits) > 1 and not captured(w):
        low, high = w.amin((1, 2, 3)).int(), w.amax((1, 2, 3)).int()
        if int((high - low).max()) < 2**8:
            middle = (low + high + 1) >> 1
            digits = [w - middle[:, None, None, None]]
    return F.pad(torch.stack(digits).to(torch.int8), (0, -w.shape[-1] % 16)).contiguous(), middle
