"""HQ-DM in one file: 4-bit weights and 4- or 3-bit activations for diffusion models, with one Hadamard transform.

Mao et al., "HQ-DM: Single Hadamard Transformation-Based Quantization-Aware Training for Low-Bit Diffusion Models",
arXiv 2512.05746. Needs torch and einops; Triton, where it is there, makes a GPU faster (section 6, which may be left
unread). Knows nothing of our UNet but the names of its layers.

The trouble: a few activation channels are far larger than the rest (outliers). A 3-bit grid wide enough for them has no
levels left for the others. The cure: spread each pixel's channel vector with a Hadamard transform H before rounding, and
undo the transform after it (H H = I). The weights are left as they are ("single"). Rotating them too ("double") spares
the way back; the paper finds that it spoils the weights' grid. In our UNet it does not: see notebooks/outliers.ipynb.

    x_h   = H x                                                 H: orthonormal, symmetric, blocks of k = 32 channels
    q_x   = clamp(round(x_h / s_x(t)), -q_max, q_max)           q_max = 2^(b-1) - 1: 7 at 4 bits, 3 at 3 bits
    x_hat = H (s_x q_x)                                         x plus rounding noise
    w_hat = s_w (q_w - z)                                       per output channel, q_w in 0 .. 2^b - 1
    y     = conv(x_hat, w_hat) + bias

By hand, x = [8, 1, -1, 1] at 3 bits (q in -3 .. 3): the squared error falls from 3.00 to 0.25.

    >>> x = torch.tensor([8., 1., -1., 1.])
    >>> s = x.abs().max() / 3                                   # the outlier sets the step: 2.67
    >>> x_hat = s * (x / s).round()                             # [8, 0, 0, 0]: everything small is gone
    >>> print(f"{((x - x_hat) ** 2).sum():.2f}")
    3.00
    >>> x_h = fwht(x)                                           # [4.5, 2.5, 4.5, 4.5]
    >>> s = x_h.abs().max() / 3                                 # 1.5
    >>> x_hat = fwht(s * (x_h / s).round())
    >>> print(f"{((x - x_hat) ** 2).sum():.2f}")
    0.25

It stays integer arithmetic. With H = R / sqrt(k), R the matrix of +-1, the scales come out of the sum:

    y - bias = s_x s_w / sqrt(k) * conv(R q_x, q_w - z)         view A: activations rotated back, as integers
             = s_x s_w / sqrt(k) * conv(q_x, (q_w - z) R)       view B: integer weights rotated, once and offline

Both sums are the same integers (R is symmetric), so we compute every layer on the integer grid, also in training:
float32 holds integers below 2^24 exactly. An integer layer and its fake-quantized twin then agree to the last bit.

What is learned, against the float model's own noise prediction (train.py): LoRA factors A, B added to each weight before
it is rounded; each weight's scale s_w; one activation scale s_x for each layer and each DDIM step t.

    symbol    in the code   shape                      what, where
    x         x             (B, C, h, w) or (B, .., C) input of a layer
    H         hadamard      block-diagonal (C, C)      R / sqrt(k); H H = I
    R         walsh         block-diagonal (C, C)      the same with entries +-1
    k         block         32                         channels that one transform mixes
    s_x(t)    log_s_x       (S,)                       activation scale at each of S DDIM steps, as a logarithm
    z_x(t)    z_x           (S,)                       zero point of activations, only where rotation = "none"
    q_x       q_x           shape of x                 activation integers, z_x taken off
    s_w       log_s_w       (C_out, 1)                 weight scale, as a logarithm: positive by construction
    z         z_w           (C_out, 1)                 zero point of weights, an integer in 0 .. 2^b - 1
    q_w       q_w           shape of the weight        weight integers 0 .. 2^b - 1, two 4-bit ones a byte when packed
    A, B      lora_A lora_B (r, C_in, kh, kw), (C_out, r)    W + B A is what gets rounded; B = 0 at the start
    t, S      clock.step    (B,)                       each sample's DDIM step, found from its t
"""
import contextlib
import functools
import math
import os
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

ROTATIONS = ("none", "single", "double")


# ---------------------------------------------------------------- 1. the Hadamard transform

def fwht(x):
    """(..., n) -> (..., n): H x along the last dimension, by the recursion that defines it, n log2 n additions.

        H_1 = [1],   H_2m = [[H_m, H_m], [H_m, -H_m]] / sqrt(2)

    Equals x @ hadamard_matrix(n) / sqrt(n); its own inverse. Raises ValueError unless n is a power of two.
    """
    return _fwht(x) / math.sqrt(x.shape[-1])


def _fwht(x):
    """R x without the 1/sqrt(n): works on integers, and keeps them integers."""
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard transform of {n} values: {n} is not a power of two")
    if n == 1:
        return x
    a, b = x.chunk(2, dim=-1)                        # the two halves, (..., n/2) each
    a, b = _fwht(a), _fwht(b)
    return torch.cat([a + b, a - b], dim=-1)


@functools.lru_cache
def hadamard_matrix(n, device="cpu", dtype=torch.float32):
    """R, (n, n), entries +-1: R R = n I. Sylvester's construction; n a power of two."""
    with torch.inference_mode(False):                # kept for later calls, and those may need gradients
        return _fwht(torch.eye(n, dtype=dtype, device=device))


def check_block(channels, block):
    """Raise ValueError unless `block` is a power of two that divides `channels`; the message names what would do."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"Hadamard block {block} is not a power of two; use 32, 16 or 8")
    if channels % block:
        fits = [n for n in (512, 256, 128, 64, 32, 16, 8, 4, 2) if n < block and channels % n == 0]
        fits = [str(n) for n in fits if n >= min(8, fits[0])]        # small blocks spread little: named only where nothing else fits
        choice = f"block {' or '.join(filter(None, [', '.join(fits[:-1]), fits[-1]]))}" if fits else "rotation none"
        raise ValueError(f"{channels} channels are not a multiple of the Hadamard block {block}; use {choice}")


@contextlib.contextmanager
def full_float32(device):
    """No TF32 and no autocast inside: TF32 keeps 11 bits, an error of 1e-3 in H x, and moves values across grid lines."""
    autocast_off = torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else contextlib.nullcontext()
    if torch.compiler.is_compiling():                # torch.compile cannot trace these switches: who compiles turns them, once
        with autocast_off:
            yield
        return
    # torch 2.9 gave these settings a name for each library, and refuses the old common name to programs that use the new.
    mkldnn = torch.backends.mkldnn                   # cuDNN's convolutions may use TF32: see HQLayer.accumulator
    matmuls = [m for m in (torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None), getattr(mkldnn, "conv", None)) if hasattr(m, "fp32_precision")]
    old = [m.fp32_precision for m in matmuls] or torch.get_float32_matmul_precision()
    for m in matmuls:
        m.fp32_precision = "ieee"
    if not matmuls:
        torch.set_float32_matmul_precision("highest")
    try:
        with autocast_off:
            yield
    finally:
        for m, precision in zip(matmuls, old):
            m.fp32_precision = precision
        if not matmuls:
            torch.set_float32_matmul_precision(old)


def _blocks(x, matrix, dim, block):
    """Multiply every block of `block` entries along `dim` by a symmetric (block, block) matrix."""
    dim %= x.ndim
    check_block(x.shape[dim], block)
    if x.ndim == 4 and dim == 1 and x.is_contiguous(memory_format=torch.channels_last):
        # Channels lie side by side in memory, so this permutation moves nothing and the result is channels_last again.
        return rearrange(_blocks(rearrange(x, "B C h w -> B h w C"), matrix, 3, block), "B h w C -> B C h w")
    if dim == x.ndim - 1:
        return (x.unflatten(dim, (-1, block)) @ matrix).flatten(-2)          # one tall (.., k) x (k, k) product
    x, rest = x.unflatten(dim, (-1, block)).flatten(dim + 2), x.shape[dim + 1:]
    return (matrix @ x).flatten(dim, dim + 1).unflatten(dim + 1, rest)       # (k, k) x (k, h w) for every B and block


def walsh(x, dim=1, block=32):
    """R x: the transform with entries +-1, block by block along `dim`. Integers in, exactly those integers out.

    Any shape. Integer tensors give int32; float32 tensors may hold integers up to 2^24 / block. Raises ValueError as
    check_block does.
    """
    if x.is_floating_point():
        return _Transform.apply(x, dim, block, 1.0)
    if fast_gpu(x, block) and x.dtype in (torch.int8, torch.int16):          # wider integers do not fit the kernel's 22 bits
        return _walsh_gpu(x, dim, block, 1.0, torch.int32)
    check_block(x.shape[dim], block)                 # matmul takes no integers on a GPU: add and subtract instead
    parts = x.to(torch.int32).movedim(dim, -1).unflatten(-1, (-1, block))
    return _fwht(parts).flatten(-2).movedim(-1, dim)


class _Transform(torch.autograd.Function):
    """y = scale R x has the gradient scale R^T g = scale R g: nothing needs to be saved for the way back."""

    @staticmethod
    def forward(ctx, x, dim, block, scale):
        ctx.args = dim, block, scale
        if fast_gpu(x, block):
            return _walsh_gpu(x, dim, block, scale, x.dtype)
        with full_float32(x.device):
            return _blocks(x, hadamard_matrix(block, x.device, x.dtype) * scale, dim, block)

    @staticmethod
    def backward(ctx, g):
        return _Transform.apply(g, *ctx.args), None, None, None


def hadamard(x, dim=1, block=32):
    """H x: orthonormal and block-diagonal along `dim`; its own inverse and its own gradient. Same shape as x.

    A (block x block) matrix product: at k = 32 faster than the recursion, which passes over memory log2 k times; on a GPU
    one kernel, in float32 at nearly the speed of a copy (section 6). Equals fwht on each block. Raises ValueError as
    check_block does, and TypeError for integers, which H does not keep whole: walsh does.
    """
    if not x.is_floating_point():
        raise TypeError(f"H x of {x.dtype} would not be integer; use walsh for R x, or x.float()")
    return _Transform.apply(x, dim, block, block**-0.5)


# ---------------------------------------------------------------- 2. grids, rounding, and where a grid's scale comes from

def grid(bits, symmetric):
    """(q_min, q_max): the integers that `bits` bits hold. Symmetric drops one, so that -q is on the grid with q."""
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def round_ste(x):
    """Round to the nearest integer, ties to even; the gradient passes as if nothing had happened.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): the true gradient is 0 almost everywhere.
    """
    return _RoundSTE.apply(x)


def quantize(v, s, z, bits, symmetric):
    """v -> clamp(round(v / s) + z, q_min, q_max) - z: integers (stored as floats) of which s times them is v, rounded.

    Gradients follow from round_ste and clamp, as in LSQ (Esser et al. 2020, arXiv 1902.08153): v gets the gradient
    inside the grid and none outside; for s * quantize(v, s) the scale gets (round(v/s) - v/s) inside and q_max outside.
    """
    q = round_ste(v / s)
    if symmetric:                                    # z = 0: two passes over memory less
        return q.clamp(*grid(bits, symmetric))
    return (q + z).clamp(*grid(bits, symmetric)) - z


def search_scale(v, bits, symmetric, p, shrinks=80, lo=None, hi=None, ends=False):
    """Rows of v (R, n) -> scale s (R, 1) and zero point z (R, 1), by trying 80 shrinks of each row's (min, max).

    Kept is the shrink with the least sum |v - v_hat|^p: p = 2.4 for weights (the authors' code), 2 for activations.
    lo, hi (R, 1): the range to shrink, where v is only a sample. ends: shrink each end alone, too, for asymmetric grids.
    Shrunk together they never change z. Values out of a SiLU lie between -0.28 and 5, say: at 3 bits that is z = 0, and
    all that is negative is lost. With the lower end kept, the upper one can come down until z = 1.
    All candidates are tried at once: (80, R, n) or (240, R, n); on a CPU for a few rows at a time, so that this stays in
    the cache (measured: seven times faster).
    """
    few = max(1, 2**21 // ((3 if ends else 1) * shrinks * v.shape[1]))
    if v.device.type == "cpu" and len(v) > few and lo is None and hi is None:
        return tuple(map(torch.cat, zip(*(search_scale(rows, bits, symmetric, p, shrinks, ends=ends) for rows in v.split(few)))))
    lo = (v.amin(1, keepdim=True) if lo is None else lo).clamp(max=0)        # 0 stays on the grid: zero padding is exact
    hi = (v.amax(1, keepdim=True) if hi is None else hi).clamp(min=0)
    q_min, q_max = grid(bits, symmetric)
    shrink = 1 - torch.arange(shrinks, device=v.device, dtype=v.dtype).view(-1, 1, 1) / shrinks
    one = torch.ones_like(shrink)
    low, high = (torch.cat([shrink, shrink, one]), torch.cat([shrink, one, shrink])) if ends else (shrink, shrink)
    lo, hi = lo * low, hi * high                                             # (80 or 240, R, 1)
    s = (torch.maximum(-lo, hi) / q_max if symmetric else (hi - lo) / (q_max - q_min)).clamp(min=1e-8)   # a row of zeros: any scale
    z = torch.zeros_like(s) if symmetric else (-lo / s).round().clamp(q_min, q_max)
    error = (v - s * quantize(v, s, z, bits, symmetric)).abs().pow(p).sum(2, keepdim=True)      # (80 or 240, R, 1)
    best = error.argmin(0, keepdim=True)
    return s.gather(0, best)[0], z.gather(0, best)[0]


# ---------------------------------------------------------------- 3. integer arithmetic

def accumulator_bound(taps, q_x_max, q_w_max, block=1):
    """The largest |sum| that a layer with `taps` products an output can reach, in any order of summation.

    Cauchy-Schwarz: |sum (q_w - z) (R q_x)| <= |q_w - z| |R q_x| <= sqrt(taps) q_w_max sqrt(block taps) q_x_max, because
    R stretches a vector by exactly sqrt(block). block = 1 without rotation. Both views, and every partial sum.
    """
    return math.ceil(taps * math.sqrt(block) * q_x_max * q_w_max)


def _digits(x, x_max, limit, bits):
    """Integers up to x_max -> [(int8 tensor, shift)] with x = sum digit * 2^shift: low digits 0 .. 2^bits - 1, the last +-limit."""
    digits, shift = [], 0
    while x_max > limit:
        digits.append(((x & (2**bits - 1)).to(torch.int8), shift))
        x, x_max, shift = x >> bits, (x_max >> bits) + 1, shift + bits       # x >> bits rounds down: hence the + 1
    return digits + [(x.to(torch.int8), shift)]


class IntOperand(NamedTuple):
    """Weights ready for integer products, made once by int_operand: `rows` int8 (digits * o, n), zeros up to multiples of 8."""
    rows: torch.Tensor
    shifts: tuple                                    # of each digit; None: rows are whole, for the kernel of section 6
    shape: torch.Size                                # of the weights: (C_out, C_in, kh, kw) or (C_out, C_in)
    x_max: float                                     # the largest activation that they may meet


def _largest(x):
    """The largest |x|. Not by abs: int16 has no 32768."""
    return max(-int(x.min()), int(x.max())) if x.numel() else 0


def _narrow(largest):
    """The smaller of the two integer types that holds -largest .. largest: int8 where it can."""
    return torch.int8 if largest <= 127 else torch.int16


def int_operand(q_w, x_max=127, w_max=None):
    """Integer weights (C_out, C_in, kh, kw) or (C_out, C_in) -> IntOperand, for activations up to x_max.

    w_max: the largest |q_w| possible; None looks, which makes the host wait for a GPU.

    CPUs without VNNI instructions add products in pairs as int16, activations shifted by 128: two of them must not pass
    32767. That leaves weights 64 (x_max = 127) to 125 (x_max = 3); larger ones get two digits or more.
    """
    rows = rearrange(q_w, "O C kh kw -> O (kh kw C)") if q_w.ndim == 4 else q_w          # channels last: long runs to copy
    w_max = _largest(rows) if w_max is None else w_max
    if fast_gpu(q_w) and max(w_max, x_max) < 2**14:
        return IntOperand(rows.to(_narrow(w_max)).contiguous(), None, q_w.shape, 2**14 - 1)
    limit = 32767 // (2 * (128 + min(x_max, 127)))
    digits = _digits(rows.to(torch.int32), w_max, limit, bits=6)
    rows = torch.cat([F.pad(d, (0, -d.shape[1] % 8, 0, -d.shape[0] % 8)) for d, _ in digits])
    return IntOperand(rows, tuple(shift for _, shift in digits), q_w.shape, x_max if x_max < 127 else math.inf)


def int_linear(x, q_w, route="int8", x_max=None, scales=None):
    """Exact integer product x (B, .., n) with weights (o, n) -> (B, .., o) int32; any integer dtypes, or an IntOperand.

    route "int8": int8 x int8 -> int32, digit by digit. CPU and CUDA.
    route "int64": the definition, on the CPU.
    x_max: the largest |x| possible; None looks, which makes the host wait for a GPU. scales: as in integer_accumulator.
    Raises ValueError for another route, a device that has no such product, activations larger than those that weights
    were prepared for; TypeError where an operand is not integer.
    """
    # A token is a pixel: (B, tokens, n) -> (B, n, tokens, 1), a view that is channels_last.
    pixels = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]).transpose(1, 2)[..., None]
    return _int_product(pixels, q_w, route, x_max, 1, 1, 1, 0, scales).view(*x.shape[:-1], q_w.shape[0])


def int_conv2d(q_x, q_w, stride=1, padding=0, route="int8", x_max=None, scales=None):
    """Integer convolution: q_x (B, C, h, w), q_w (C_out, C, kh, kw), any integer dtypes -> int32 (B, C_out, h', w').

    Zero padding is exact, because 0 is the integer of 0.0 on our grids. The result is channels_last.
    Arguments and errors: int_linear.
    """
    _, _, kh, kw = q_w.shape
    acc = _int_product(q_x, q_w, route, x_max, kh, kw, stride, padding, scales)
    h, w = ((q_x.shape[i] + 2 * padding - k) // stride + 1 for i, k in ((2, kh), (3, kw)))
    return rearrange(acc.view(len(q_x), h, w, q_w.shape[0]), "B h w O -> B O h w")


def _int_product(x, q_w, route, x_max, kh, kw, stride, padding, scales):
    """x (B, C, h, w) -> (B h' w', C_out): im2col, then one exact integer product; on a fast_gpu without the copies."""
    if x.is_floating_point() or torch.is_tensor(q_w) and q_w.is_floating_point():
        raise TypeError("integer products take integer tensors, and one of these is float")
    if route not in ("int8", "int64"):
        raise ValueError(f"route {route!r} does not exist; choose int8 or int64")
    if route == "int64":
        if x.device.type != "cpu":
            raise ValueError("the int64 route runs on the cpu: no GPU multiplies int64 matrices")
        if isinstance(q_w, IntOperand):
            raise TypeError("the int64 route takes the weights themselves, not what int_operand made of them")
        rows = rearrange(q_w, "O C kh kw -> O (kh kw C)") if q_w.ndim == 4 else q_w
        return (int_columns(x, kh, kw, stride, padding).long() @ rows.long().T).to(torch.int32)
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"integer layers run on cpu and cuda, not on {x.device.type}; use --device cpu")
    x_max = _largest(x) if x_max is None else x_max
    w = q_w if isinstance(q_w, IntOperand) else int_operand(q_w, x_max)
    if x_max > w.x_max:
        raise ValueError(f"these weights were prepared for activations up to {w.x_max}, not {x_max}; pass that x_max to int_operand")
    if w.shifts is None:
        return _int_gpu(x.to(_narrow(x_max)), w.rows, kh, kw, stride, padding, scales)
    o, step, acc = w.shape[0], len(w.rows) // len(w.shifts), None
    for digit, i in _digits(x, x_max, 127, bits=7):
        a = int_columns(digit, kh, kw, stride, padding)
        m, n = a.shape
        # cuBLASLt wants more than 16 rows and multiples of 8 elsewhere: padding with zeros changes no sum. It also wants the
        # second operand stored by columns: stored by rows it refuses tall products (204,800 x 32 by 32 x 64, say).
        if n % 8 or m < 32:
            a = F.pad(a, (0, -n % 8, 0, max(0, 32 - m)))
        part = torch._int_mm(a, w.rows.T)            # all digits of the weights in one product: a is read once
        for k, j in enumerate(w.shifts):
            term = part[:m, k * step:k * step + o]
            term = term << (i + j) if i + j else term
            acc = term if acc is None else acc + term            # int32 wraps around, and the true sum fits: exact
    if scales:                                       # weights too large for the kernel's int16
        acc = acc.float().view(len(x), m // max(1, len(x)), o)
        return _scale_gpu(acc, *scales).view(m, o)
    return acc


def int_columns(x, kh, kw, stride, padding):
    """im2col: (B, C, h, w) -> (B h' w', kh kw C), a row for each output pixel. A copy only where patches overlap."""
    C = x.shape[1]
    x = F.pad(rearrange(x, "B C h w -> B h w C"), (0, 0) + (padding,) * 4)
    x = rearrange(x, "B h w C -> B h (w C)")         # kw neighbours with all their channels are one run of memory
    x = x.unfold(2, kw * C, stride * C).unfold(1, kh, stride)                # (B, h', w', kw C, kh), a view
    return rearrange(x, "B h w kwC kh -> (B h w) (kh kwC)")


def pack_weights(q, bits):
    """Integers 0 .. 2^bits - 1, any shape, up to 8 bits -> uint8 (bytes,): two a byte up to 4 bits (low half first), else one."""
    if bits > 8:
        raise ValueError(f"a byte does not hold {bits} bits; pack_weights takes up to 8")
    q = q.flatten().to(torch.uint8)
    if bits > 4:
        return q
    q = F.pad(q, (0, len(q) % 2))
    return q[0::2] | (q[1::2] << 4)


def unpack_weights(packed, bits, shape):
    """The inverse of pack_weights: uint8 tensor of the given shape."""
    if bits <= 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    return packed[:math.prod(shape)].view(shape)


# ---------------------------------------------------------------- 4. the quantized layers

def check_view(view):
    """The view, "A" or "B"; ValueError where it is neither."""
    if view not in ("A", "B"):
        raise ValueError(f"view {view!r} does not exist; choose A or B")
    return view


class Clock:
    """Which DDIM step each sample is at. One for all layers of a network, set from t before every forward.

    Nothing counts calls: a batch may mix steps, and a stray call shifts nothing.
    """

    def __init__(self, timesteps):
        self.timesteps, self.step, self.one_hot = torch.tensor(list(timesteps)), None, None

    def set(self, t):
        """t (B,) -> step (B,): the nearest of the timesteps that the scales were trained for."""
        self.timesteps = self.timesteps.to(t.device)
        self.step = (t[:, None] - self.timesteps).abs().argmin(dim=1)
        self.one_hot = F.one_hot(self.step, len(self.timesteps)).float()         # (B, S)


class HQLayer(nn.Module):
    """What HQConv2d and HQLinear share: a float layer made over, with its input and its weight on integer grids.

    rotation "single": only the activations are rotated (HQ-DM). "double": activations and weights, no way back needed
    (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). "none": no transform, asymmetric activations (EfficientDM, He et
    al. 2024, arXiv 2310.03270). Bits of 32 leave that side in float.

    Two lives: in training it holds the float weight, LoRA and log-scales; freeze() turns those into packed integers.
    packed=True builds it in its second life, to be filled by load_state_dict.
    Raises ValueError for bits outside 2 .. 16 (or 32), an unknown rotation, a block that does not divide the width, and
    where a sum could pass 2^31.
    """
    dim = 1                                          # where the channels of the input are

    def __init__(self, layer, wbits=4, abits=4, rotation="single", block=32, rank=32, clock=None, packed=False):
        super().__init__()
        for bits in (wbits, abits):
            if not (2 <= bits <= 16 or bits == 32):
                raise ValueError(f"{bits} bits are not possible; choose 2 to 16, or 32 for float")
        if rotation not in ROTATIONS:
            raise ValueError(f"rotation {rotation!r} does not exist; choose from {', '.join(ROTATIONS)}")
        self.shape = layer.weight.shape              # (C_out, C_in, kh, kw) or (C_out, C_in)
        if rotation != "none":
            check_block(self.shape[1], block)
        self.wbits, self.abits, self.rotation = wbits, abits, rotation
        self.block = block if rotation != "none" else 1
        self.clock = clock or Clock([0])
        self.symmetric = rotation != "none"          # rotated values spread around 0; what SiLU puts out does not
        self.integer, self.view = False, "B"         # see set_integer
        self._cache = {}

        # The largest operands and sums that the formats allow: they decide how a sum is computed (see accumulator).
        mixed = block if rotation == "single" else 1             # how many weights one operand of view B adds up
        self.taps = math.prod(self.shape[1:])                    # products in one output value
        self.q_x_max = max(map(abs, grid(abits, self.symmetric)))
        self.q_w_max = 2**wbits - 1                              # of q_w - z, for any zero point
        self.operand_max = mixed * self.q_w_max                  # of (q_w - z) R
        self.on_grid = max(wbits, abits) <= 8                    # has an integer form
        self.bound = accumulator_bound(self.taps, self.q_x_max, self.q_w_max, mixed) if self.on_grid else 0
        if self.on_grid and self.taps * self.q_x_max >= 2**23:   # accumulator could not even sum digits of one bit
            raise ValueError(f"sums of {self.taps} products with {abits}-bit activations leave a float32 no bit for the weights")
        if self.on_grid and self.bound >= 2**31:
            raise ValueError(f"sums of {self.taps} products at W{wbits}A{abits} could reach {self.bound:,}, past int32")

        w, steps = layer.weight.detach().float(), len(self.clock.timesteps)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        if abits != 32:
            self.log_s_x = nn.Parameter(w.new_zeros(steps))
            if not self.symmetric:
                self.z_x = nn.Parameter(w.new_zeros(steps))
        self.frozen = packed
        if packed:
            self._hold_integers(w.new_zeros(self.shape), w.new_ones(self.shape[0], 1), w.new_zeros(self.shape[0], 1))
            return
        # Double: the weight lives in the rotated basis from here on, and so do its LoRA factors.
        self.register_buffer("weight", hadamard(w, 1, block) if rotation == "double" else w)
        self.lora_A = nn.Parameter(w.new_empty(rank, *self.shape[1:]))           # for a convolution: rank filters k x k
        self.lora_B = nn.Parameter(w.new_zeros(self.shape[0], rank))             # and a 1x1; B A = 0: no change yet
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))                    # as in LoRA, arXiv 2106.09685
        if wbits != 32:
            s, z = search_scale(self.weight.flatten(1), wbits, symmetric=False, p=2.4)
            self.log_s_w = nn.Parameter(s.log())
            self.register_buffer("z_w", z)

    def at_step(self, values, x):
        """values (S,) -> (B,): the one of each sample's step. RuntimeError where there are many and the clock is not set."""
        if self.clock.step is not None:
            values = self.clock.one_hot @ values     # values[step], exactly; its gradient is a product too, not a sort
        elif len(values) > 1:
            raise RuntimeError("which DDIM step is this? call the layer through its UNet, or clock.set(t) first")
        return values.expand(len(x)).contiguous()    # the kernels of section 6 read one number a sample

    # -- the two operands of the product

    def _rotated(self, x):
        """H x, or x itself without rotation."""
        return hadamard(x, self.dim, self.block) if self.rotation != "none" else x

    def quantize_input(self, x, dtype=torch.float32):
        """x -> (H x on its grid, integers stored as dtype; s_x (B, 1, ..)). H x and 1 at 32 bits. Differentiable."""
        if self.abits == 32:
            return self._rotated(x), x.new_ones(())
        shape = (-1,) + (1,) * (x.ndim - 1)
        s = self.at_step(self.log_s_x.exp(), x)                  # each sample has the scale of its own step
        # A zero point off the grid would take 0.0 off it too, and zero padding would no longer be exact.
        z = torch.zeros_like(s) if self.symmetric else self.at_step(round_ste(self.z_x).clamp(*grid(self.abits, False)), x)
        if fast_gpu(x, self.block if self.rotation != "none" else 32):
            return _QuantizeGPU.apply(x, s, z, *grid(self.abits, self.symmetric), self.dim, self.block, dtype), s.view(shape)
        s, z = s.view(shape), z.view(shape)
        return quantize(self._rotated(x), s, z, self.abits, self.symmetric).to(dtype), s

    def quantize_weight(self):
        """(q_w - z, integers in a float tensor; s_w (C_out, 1)). The float weight and 1 at 32 bits. Differentiable."""
        if self.frozen and self.wbits != 32:
            q = unpack_weights(self.q_w, self.wbits, self.shape) if self.wbits <= 8 else self.q_w
            return (q.flatten(1).float() - self.z_w.float()).view(self.shape), self.s_w
        w = self.weight
        if not self.frozen:
            w = w + (self.lora_B @ self.lora_A.flatten(1)).view(self.shape)      # (C_out, r) x (r, C_in kh kw)
        if self.wbits == 32:
            return w, w.new_ones(1, 1)
        s, w = self.log_s_w.exp(), w.flatten(1)
        if fast_gpu(w):                                          # the same kernel: rows are its samples, and nothing is rotated
            q = _QuantizeGPU.apply(w, s.flatten(), self.z_w.flatten(), *grid(self.wbits, False), 1, 1, torch.float32)
        else:
            q = quantize(w, s, self.z_w, self.wbits, symmetric=False)
        return q.view(self.shape), s

    def operand(self):
        """What q_x is multiplied with, and its scale: (q_w - z) R and s_w / sqrt(k) for single, else q_w - z and s_w.

        This is view B. Rotating the weight is cheaper than rotating q_x back: it is smaller, and frozen it is done once.
        """
        def make():
            q, s = self.quantize_weight()
            if q.ndim == 4:                                      # as the images: walsh becomes one tall product, and
                q = q.contiguous(memory_format=torch.channels_last)          # the convolution need not reorder it
            if self.rotation == "single":
                q, s = walsh(q, 1, self.block), s / math.sqrt(self.block)
            return q, s
        return self._once("float", make)

    def _once(self, key, make):
        """make(), and for frozen weights only the first time."""
        if not self.frozen or self.wbits == 32:
            return make()
        if self._cache.get("of") is not self.q_w:                # another tensor after .to(device)
            self._cache = {"of": self.q_w}
        if key not in self._cache:
            with torch.inference_mode(False):        # kept for later calls, and those may need gradients
                self._cache[key] = make()
        return self._cache[key]

    def _load_from_state_dict(self, *args):
        """Called by load_state_dict: other integers are coming, so what was computed from the old ones goes."""
        self._cache = {}
        super()._load_from_state_dict(*args)

    # -- the product

    def forward(self, x):
        """bias + acc * s: the one place where scales meet integers, read and written once."""
        with full_float32(x.device):                             # integers do not survive bf16 sums
            x = x.float()
            q_x, s_x = self.quantize_input(x, _narrow(self.q_x_max) if self.integer else torch.float32)
            q_w, s_w = self.operand()
            if fast_gpu(x) and self.wbits != 32 and self.abits != 32:
                s_x, s_w = s_x.flatten(), s_w.flatten()
                scales = s_x, s_w, torch.zeros_like(s_w) if self.bias is None else self.bias
                if self.integer:
                    return self.integer_accumulator(q_x, scales=scales)
                return _ScaleGPU.apply(self.accumulator(q_x, q_w), *scales, self.dim)
            acc = self.integer_accumulator(q_x).float() if self.integer else self.accumulator(q_x, q_w)
            s = s_x * s_w.view(self.per_channel)
            return acc * s if self.bias is None else torch.addcmul(self.bias.view(self.per_channel), acc, s)

    def accumulator(self, q_x, q_w):
        """The sums of the fake-quantized layer, in float32 and still exact integers. Differentiable.

        A float32 sum is exact while every partial sum is below 2^24 and every operand below 2^11 (so that TF32 units
        may multiply). Else the weights are cut into digits of m bits; each digit's sum is exact, and int32 adds them.
        A doubt: on a GPU without TF32, cuDNN may take a Winograd kernel, which multiplies by fractions and is not exact.
        experiments/exact.py counts what differs.
        """
        exact = not self.on_grid or (self.bound < 2**24 and self.operand_max <= 2**11)
        graded = torch.is_grad_enabled() and (q_x.requires_grad or q_w.requires_grad)
        if exact or graded:
            y = self.multiply(q_x, q_w)              # where it is not exact, it is there for its gradient
        if exact:
            return y
        with torch.no_grad():
            m = min(11, int(math.log2(2**24 / (self.taps * self.q_x_max))))
            digits = math.ceil(self.operand_max.bit_length() / m)
            rest, acc = q_w.to(torch.int32), 0
            for i in range(digits):
                digit = rest & (2**m - 1) if i + 1 < digits else rest            # low digits 0 .. 2^m - 1, last one signed
                acc = acc + (self.multiply(q_x, digit.float()).round().to(torch.int32) << (m * i))
                rest = rest >> m
        return y + (acc.float() - y).detach() if graded else acc.float()     # the value of acc, rounded once; the gradient of y

    def integer_accumulator(self, q_x, view=None, route="int8", scales=None):
        """The same sums by integer arithmetic alone, int32. q_x: as quantize_input gives it. view: "A" or "B".

        scales (s_x, s_w, bias), on a fast_gpu: not the sums but the layer's output.
        """
        if not self.on_grid:
            raise ValueError(f"a W{self.wbits}A{self.abits} layer has no integer form; use 2 to 8 bits for both")
        view, x_max = check_view(view or self.view), self.q_x_max
        q_x = q_x.detach().to(_narrow(x_max))
        if self.rotation == "single" and view == "A":
            x_max = x_max * self.block
            fast = fast_gpu(q_x, self.block)
            q_x = _walsh_gpu(q_x, self.dim, self.block, 1.0, _narrow(x_max)) if fast else walsh(q_x, self.dim, self.block)
        if route == "int64":
            q_w = self._integer_weight(view)
        else:                                        # frozen weights are looked at, once; others are bounded by their format
            w_max = None if self.frozen else self.operand_max if view == "B" else self.q_w_max
            q_w = self._once(view, lambda: int_operand(self._integer_weight(view), x_max, w_max))
        return self.multiply_int(q_x, q_w, route, x_max, scales)

    def _integer_weight(self, view):
        q_w = self.quantize_weight()[0].detach().to(torch.int16)
        return walsh(q_w, 1, self.block) if self.rotation == "single" and view == "B" else q_w

    # -- scales of the activations, and the second life

    @torch.no_grad()
    def fit_input(self, x, samples=8192):
        """Set the activation scale (and zero point) of the clock's step by least squared error on x.

        x: a float input of this layer, all samples at that one step.
        """
        v = self._rotated(x).flatten()
        pick = torch.randint(len(v), (samples,), generator=torch.Generator().manual_seed(0)).to(v.device)
        lo, hi = v.amin().view(1, 1), v.amax().view(1, 1)        # the range of all values; the error of a sample
        ends = not self.symmetric and self.abits <= 8            # beyond, all it can do is clip what the sample missed
        s, z = search_scale(v[pick][None], self.abits, self.symmetric, p=2, lo=lo, hi=hi, ends=ends)
        step = 0 if self.clock.step is None else self.clock.step[0]
        self.log_s_x[step] = s[0, 0].log()
        if not self.symmetric:
            self.z_x[step] = z[0, 0]

    @torch.no_grad()
    def freeze(self):
        """Fold LoRA into the weight, round it for good, and keep only packed integers, scales and zero points."""
        if self.frozen:
            return
        w, s = self.quantize_weight()
        z = getattr(self, "z_w", None)
        for name in ("weight", "lora_A", "lora_B", "log_s_w", "z_w"):
            if hasattr(self, name):
                delattr(self, name)
        self.frozen = True
        self._hold_integers(w if z is None else (w.flatten(1) + z).view(self.shape), s, z)   # q_w, 0 .. 2^b - 1
        self.requires_grad_(False)

    def _hold_integers(self, q, s, z):
        if self.wbits == 32:
            self.register_buffer("weight", q)
            return
        self.register_buffer("q_w", pack_weights(q, self.wbits) if self.wbits <= 8 else q)
        self.register_buffer("s_w", s)
        self.register_buffer("z_w", z.to(torch.uint8) if self.wbits <= 8 else z)

    @property
    def bytes(self):
        """(float32 bytes, packed bytes) of weight, bias and scales; the float layer has no scales."""
        C_out, bias = self.shape[0], 4 * (self.shape[0] if self.bias is not None else 0)
        n, steps = math.prod(self.shape), len(self.clock.timesteps)
        scales_x = 0 if self.abits == 32 else 4 * steps * (1 if self.symmetric else 2)
        weight = 4 * n if self.wbits > 8 else n if self.wbits > 4 else math.ceil(n / 2)
        scales_w = 0 if self.wbits == 32 else C_out * (8 if self.wbits > 8 else 5)       # s_w and z_w, which is a byte up to 8 bits
        return 4 * n + bias, weight + scales_w + bias + scales_x


class HQConv2d(HQLayer):
    """A quantized nn.Conv2d: (B, C_in, h, w) -> (B, C_out, h', w'). Arguments and errors: HQLayer."""

    per_channel = (1, -1, 1, 1)

    def __init__(self, layer, *args, **kwargs):
        if (layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros"
                or len(set(layer.stride)) > 1 or len(set(layer.padding)) > 1):          # a word such as "same" has letters
            raise ValueError("HQConv2d needs groups 1, dilation 1, and one number each for stride and zero padding")
        self.stride, self.padding = layer.stride[0], layer.padding[0]
        super().__init__(layer, *args, **kwargs)

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))      # a pixel's channels side by side, for H

    def multiply(self, q_x, q_w):
        return F.conv2d(q_x, q_w, stride=self.stride, padding=self.padding)

    def multiply_int(self, q_x, q_w, route, x_max, scales=None):
        return int_conv2d(q_x, q_w, self.stride, self.padding, route, x_max, scales)


class HQLinear(HQLayer):
    """A quantized nn.Linear: (B, .., C_in) -> (B, .., C_out). Arguments and errors: HQLayer."""

    dim, per_channel = -1, (-1,)

    def multiply(self, q_x, q_w):
        return F.linear(q_x, q_w)

    def multiply_int(self, q_x, q_w, route, x_max, scales=None):
        return int_linear(q_x, q_w, route, x_max, scales)


# ---------------------------------------------------------------- 5. a whole UNet

# First and last layers and the resampling and skip convolutions stay at 8 bits: few bytes, and all later layers see
# their error. On an 8-bit grid outliers do no harm, so none of them is rotated.
EIGHT_BITS = {
    "time_mlp": "first layer (time)", "conv_in": "first layer (image)", "conv_out": "last layer",
    "skip": "skip convolution", "resample": "resampling convolution"}


def quantize_unet(unet, wbits, abits, rotation="single", block=32, timesteps=(0,), rank=32, packed=False):
    """Replace every nn.Conv2d and nn.Linear of a UNet, in place; return the report, one dict a layer.

    timesteps: the DDIM times that get an activation scale each; forward(x, t, ..) picks by t, the nearest.
    packed=True: ready for load_state_dict of frozen integers. Raises ValueError as HQLayer does, naming the layer.
    """
    if layers(unet):
        raise ValueError("this network is quantized already; start from the float one")
    clock, rows, swaps = Clock(timesteps), [], []
    for name, layer in list(unet.named_modules()):
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            if why := _why_float(layer):
                size = 4 * sum(p.numel() for p in layer.parameters(recurse=False))
                rows.append((name, type(layer).__name__, 32, 32, "none", 1, f"float: {why}", 0, size, size))
            continue
        why = next((text for part, text in EIGHT_BITS.items() if part in name.split(".")), None)
        bits = [b if b == 32 or not why else 8 for b in (wbits, abits)]
        rotate = "none" if why else rotation
        kind = HQConv2d if isinstance(layer, nn.Conv2d) else HQLinear
        try:
            new = kind(layer, *bits, rotate, block, rank, clock, packed).to(layer.weight.device)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        swaps.append((*name.rpartition(".")[::2], new))
        shape = "x".join(map(str, new.shape[2:]))
        note = f"{why}: not rotated" if why else "rotation none was asked for" if rotate == "none" else ""
        rows.append((name, f"conv {shape}" if shape else "linear", *bits, rotate, new.block, note, new.bound, *new.bytes))
    for parent, name, new in swaps:                  # only now: a refusal above leaves the network as it was
        setattr(unet.get_submodule(parent), name, new)
    unet.clock = clock
    unet.register_forward_pre_hook(_set_clock, with_kwargs=True)
    unet.requires_grad_(False)
    for layer in layers(unet):
        for name, p in layer.named_parameters():
            p.requires_grad_(name != "bias" and not packed)
    columns = ("layer", "kind", "wbits", "abits", "rotation", "block", "note", "accumulator_bound", "float_bytes", "bytes")
    return [dict(zip(columns, row)) for row in rows]


def _set_clock(unet, args, kwargs):
    unet.clock.set(kwargs["t"] if "t" in kwargs else args[1])


def _why_float(layer):
    """Why a module stays in float; None where it computes nothing of its own."""
    if isinstance(layer, nn.Embedding):
        return "a table look-up: nothing is multiplied"
    if isinstance(layer, nn.GroupNorm):
        return "a normalisation, no matrix"
    return "q k^T and its softmax; its qkv and proj are rows of their own" if hasattr(layer, "heads") else None


def layers(model):
    """The quantized layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, HQLayer)]


def format_report(rows):
    """The rows of quantize_unet as a table with totals; norms, which are many and all alike, as one line."""
    lines = [f"{'layer':26s} {'kind':10s} {'W':>2s} {'A':>2s} {'rotation':8s} {'block':>5s} {'|sum| <':>11s} {'bytes':>9s}  note"]
    norms = [r for r in rows if r["kind"] == "GroupNorm"]
    for r in (r for r in rows if r["kind"] != "GroupNorm"):
        lines.append(f"{r['layer']:26s} {r['kind']:10s} {r['wbits']:2d} {r['abits']:2d} {r['rotation']:8s} {r['block']:5d} "
                     f"{r['accumulator_bound']:11,d} {r['bytes']:9,d}  {r['note']}")
    if norms:
        lines.append(f"{len(norms)} x GroupNorm: {sum(r['bytes'] for r in norms):,d} bytes, {norms[0]['note']}")
    old, new = sum(r["float_bytes"] for r in rows), sum(r["bytes"] for r in rows)
    lines.append(f"total {old:,d} bytes in float32, {new:,d} packed: {old / new:.1f} times smaller")
    return "\n".join(lines)


@torch.no_grad()
def calibrate(student, teacher, batches):
    """Set all activation scales and zero points from the float model's own activations, step by step, by least squared error.

    student: quantize_unet of a copy of teacher. batches: (x_t, t, y) of a few teacher trajectories, one t a batch.
    """
    twins = dict(teacher.named_modules())
    hooks = [twins[name].register_forward_pre_hook(lambda _, args, layer=layer: layer.fit_input(args[0]))
             for name, layer in student.named_modules() if isinstance(layer, HQLayer) and layer.abits != 32]
    try:
        for x, t, y in batches:
            student.clock.set(t)
            teacher(x, t, y)
    finally:
        for hook in hooks:
            hook.remove()


# Learning rates: of LoRA in units of the layer's mean s_w, of s_w, of s_x, of z_x (in levels of the grid). The paper
# trains 160 walks of 100 updates at batch 2 with 1/2500, 1e-6 and 5e-4; EfficientDM has 5e-4 for z_x too. Our runs have
# a sixteenth of the updates and larger batches, and want larger steps: experiments/rates.py compares.
RATES = {"lora": 1 / 25, "s_w": 1e-4, "s_x": 8e-3, "z_x": 8e-3}


def parameter_groups(model, lr=1.0):
    """What is trained, as optimiser groups that each carry a base_lr: `lr` times RATES.

    The scales are trained as logarithms, and d log s = ds / s: their rates are divided by the network's mean scale.
    """
    def mean_scale(logs):
        return torch.cat([p.detach().exp().flatten() for p in logs]).mean().item()

    groups = []
    for layer in layers(model):                      # a float weight (W32) has no scale: its mean size stands in
        unit = mean_scale([layer.log_s_w]) if hasattr(layer, "log_s_w") else layer.weight.abs().mean().item()
        groups.append({"params": [layer.lora_A, layer.lora_B], "base_lr": lr * RATES["lora"] * unit})
    for rate, name in (("s_w", "log_s_w"), ("s_x", "log_s_x"), ("z_x", "z_x")):
        learned = [getattr(layer, name) for layer in layers(model) if hasattr(layer, name)]
        if learned:                                  # z_x is no logarithm
            groups.append({"params": learned, "base_lr": lr * RATES[rate] / (1 if name == "z_x" else mean_scale(learned))})
    return groups


def freeze(model):
    """End of training: fold LoRA in, round the weights for good and pack them, in every layer."""
    for layer in layers(model):
        layer.freeze()


def set_integer(model, on=True, view="B"):
    """Let every quantized layer compute in integers (or not), in view A or B. The outputs are the same bits.

    Raises ValueError where the model has no quantized layer, or one without an integer form.
    """
    found = layers(model)
    if on and not found:
        raise ValueError("this model has no quantized layer to run in integers: it is a float checkpoint")
    check_view(view)
    for layer in found:
        if on and not layer.on_grid:
            raise ValueError(f"a W{layer.wbits}A{layer.abits} layer has no integer form; use 2 to 8 bits for both")
        layer.integer, layer.view = on, view


# ---------------------------------------------------------------- 6. the same in one pass over a GPU's memory

# Optional, to run and to read: everything here has its definition above, and the tests compare the two. Triton comes with
# torch on Linux; where it is missing, on GPUs older than Ampere, and for blocks outside 16 .. 64, the definitions do the
# work. A tensor is channels_last or contiguous here: a pixel's (or a token's) channels lie side by side, and so do the
# blocks of the transform.
# To step through a kernel without a GPU: TRITON_INTERPRET=1 python -m pytest tests/test_1* tests/test_3*
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fast_gpu(x, block=32):
    """Whether the kernels of this section take x: on Ampere and later, and anywhere in Triton's interpreter (see above).

    A program holds R in a multiprocessor's shared memory: 16 KB at block 64, but 64 KB at 128, more than some GPUs have.
    """
    if triton is None or not 16 <= block <= 64 or x.dtype == torch.float64:  # matrix units want 16 or more
        return False
    return torch.cuda.get_device_properties(x.device).major >= 8 if x.is_cuda else INTERPRETED


if triton is not None:
    @triton.jit
    def _rotate(x, K: tl.constexpr):
        """(rows, K) float32 -> x R. TF32 units keep 11 bits: x = high + low are two such halves, and +-1 needs one bit."""
        i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
        common = i & j                                           # R_ij = (-1)^(number of common one bits of i and j)
        common ^= common >> 4
        common ^= common >> 2
        common ^= common >> 1
        R = 1.0 - 2.0 * (common & 1).to(tl.float32)
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)       # 8192 = 2^13, and 24 - 13 = 11
        return tl.dot(high, R, input_precision="tf32") + tl.dot(x - high, R, input_precision="tf32")

    @triton.jit
    def _walsh_kernel(x_ptr, y_ptr, vectors, scale: tl.constexpr, inner: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
        """y = scale R x for vectors of K numbers that lie `inner` apart in memory. Each program does ROWS vectors."""
        v = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)        # 64 bits: a tensor may have 2^31 numbers
        offsets = (v // inner * (K * inner) + v % inner)[:, None] + tl.arange(0, K)[None, :] * inner
        mask = (v < vectors)[:, None]
        x = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32)
        tl.store(y_ptr + offsets, (_rotate(x, K) * scale).to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def _round(t, low, high):
        """clamp(t, low, high) rounded, ties to even: next to 1.5 * 2^23 a float32 has no bit below 1."""
        return (tl.minimum(tl.maximum(t, low), high) + 12582912.0) - 12582912.0

    @triton.jit
    def _quantize_kernel(x_ptr, s_ptr, z_ptr, y_ptr, n, low, high, K: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
                         g_ptr=None, gs_ptr=None, gz_ptr=None):
        """y = clamp(round(H x / s) + z, low, high) - z, for samples of n numbers with an s and a z each. NORM 1: no H.

        Given g, the way back: y is the gradient of x at every place; those of s and z come as one sum a program.
        """
        sample = tl.program_id(0)                                # the other axes of a grid end at 65,535
        at = tl.program_id(1) * (ROWS * K) + tl.arange(0, ROWS)[:, None] * K + tl.arange(0, K)[None, :]
        offsets, mask = sample.to(tl.int64) * n + at, at < n
        x, s, z = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32), tl.load(s_ptr + sample), tl.load(z_ptr + sample)
        if NORM != 1.0:
            x = _rotate(x, K) * NORM
        t = x * (1 / s)
        t, first, last = t + (x - t * s) * (1 / s), low - z, high - z        # Newton's step: as good as a division
        if g_ptr is None:
            y = _round(t, first, last)
        else:
            g, near = tl.load(g_ptr + offsets, mask, other=0).to(tl.float32), _round(t, first - 1, last + 1)
            inside = (near >= first) & (near <= last)
            y = tl.where(inside, g * (1 / s), 0.0)
            part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(gs_ptr + part, -tl.sum(tl.sum(y * t, 1), 0))            # d(x/s)/ds = -(x/s)/s
            tl.store(gz_ptr + part, -tl.sum(tl.sum(tl.where(inside, 0.0, g), 1), 0))     # inside, z is added and taken off again
            if NORM != 1.0:
                y = _rotate(y, K) * NORM
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def _scale_kernel(acc_ptr, s_x_ptr, s_w_ptr, bias_ptr, y_ptr, n, C, ROWS: tl.constexpr, COLS: tl.constexpr,
                      g_ptr=None, gs_ptr=None):
        """y = acc * (s_x s_w) + bias over n pixels of a sample. Given g: y = g * (s_x s_w), and sums of g * acc a program."""
        sample, c = tl.program_id(0), tl.program_id(2) * COLS + tl.arange(0, COLS)
        pixel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        offsets = (sample.to(tl.int64) * n + pixel)[:, None] * C + c[None, :]
        mask = (pixel < n)[:, None] & (c < C)[None, :]
        acc = tl.load(acc_ptr + offsets, mask, other=0)
        s = tl.load(s_x_ptr + sample) * tl.load(s_w_ptr + c, c < C, other=0)
        if g_ptr is not None:
            g = tl.load(g_ptr + offsets, mask, other=0)
            part = (sample * tl.num_programs(1) + tl.program_id(1)) * C
            tl.store(gs_ptr + part + c, tl.sum(g * acc, 0), c < C)
            tl.store(y_ptr + offsets, g * s[None, :], mask)
        else:
            tl.store(y_ptr + offsets, acc * s[None, :] + tl.load(bias_ptr + c, c < C, other=0)[None, :], mask)

    @triton.jit
    def _int_kernel(x_ptr, w_ptr, y_ptr, pixels, h, w, h_out, w_out, C, outs, kw, taps, stride, padding, PIXELS: tl.constexpr,
                    OUTS: tl.constexpr, CHANNELS: tl.constexpr, WIDE_X: tl.constexpr, WIDE_W: tl.constexpr,
                    s_x_ptr=None, s_w_ptr=None, bias_ptr=None):
        """Integer x (B, h, w, C) and w (outs, taps, C) -> y (pixels, outs): int32 sums, or float32 sums * (s_x s_w) + bias.

        Each program sums PIXELS x OUTS outputs over all taps and channels; no patches are copied. Integer units take int8:
        wide operands (int16, up to 14 bits) are cut into x = low + 128 high, and the three shifts summed apart.
        """
        pixel, out = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
        b, i, j = pixel // (h_out * w_out), pixel // w_out % h_out * stride - padding, pixel % w_out * stride - padding
        picture, chunks = x_ptr + b.to(tl.int64) * (h * w * C), tl.cdiv(C, CHANNELS)
        acc = tl.zeros((PIXELS, OUTS), tl.int32)
        acc7, acc14 = acc, acc                                   # narrow operands leave them 0: the compiler drops them
        for k in range(taps * chunks):
            tap, c = k // chunks, k % chunks * CHANNELS + tl.arange(0, CHANNELS)
            y, x = i + tap // kw, j + tap % kw
            inside = (pixel < pixels) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
            q_x = tl.load((picture + (y * w + x) * C)[:, None] + c[None, :], inside[:, None] & (c < C)[None, :], other=0)
            q_w = tl.load(w_ptr + ((out * taps + tap) * C)[None, :] + c[:, None], (out < outs)[None, :] & (c < C)[:, None], other=0)
            low_x, low_w = q_x, q_w
            if WIDE_X:
                low_x, high_x = (q_x & 127).to(tl.int8), (q_x >> 7).to(tl.int8)
            if WIDE_W:
                low_w, high_w = (q_w & 127).to(tl.int8), (q_w >> 7).to(tl.int8)
            acc = tl.dot(low_x, low_w, acc, out_dtype=tl.int32)
            if WIDE_X:
                acc7 = tl.dot(high_x, low_w, acc7, out_dtype=tl.int32)
            if WIDE_W:
                acc7 = tl.dot(low_x, high_w, acc7, out_dtype=tl.int32)
            if WIDE_X and WIDE_W:
                acc14 = tl.dot(high_x, high_w, acc14, out_dtype=tl.int32)
        acc += (acc7 << 7) + (acc14 << 14)
        y_ptrs, mask = y_ptr + pixel.to(tl.int64)[:, None] * outs + out[None, :], (pixel < pixels)[:, None] & (out < outs)[None, :]
        if s_x_ptr is not None:
            s = tl.load(s_x_ptr + b, pixel < pixels, other=0)[:, None] * tl.load(s_w_ptr + out, out < outs, other=0)[None, :]
            tl.store(y_ptrs, acc.to(tl.float32) * s + tl.load(bias_ptr + out, out < outs, other=0)[None, :], mask)
        else:
            tl.store(y_ptrs, acc, mask)


def _dense(x, dim):
    """x with its channels, dimension dim, side by side in memory; copied only where they are not."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 and dim == 1 else torch.contiguous_format)


def _walsh_gpu(x, dim, block, scale, dtype):
    """scale R x along dim, block by block, read and written once; any float or integer dtype in, any out."""
    dim %= x.ndim
    check_block(x.shape[dim], block)
    side_by_side = x.ndim == 4 and dim == 1 and x.is_contiguous(memory_format=torch.channels_last)
    x = x if side_by_side else x.contiguous()
    y, vectors, inner = torch.empty_like(x, dtype=dtype), x.numel() // block, 1 if side_by_side else math.prod(x.shape[dim + 1:])
    if vectors:
        _walsh_kernel[(triton.cdiv(vectors, 128),)](x, y, vectors, scale, inner, block, 128)
    return y


class _QuantizeGPU(torch.autograd.Function):
    """quantize(hadamard(x), s, z, ..), or without the transform (block 1): x is read once and q written once.

    x (B, ..), finite; s and z (B,): samples with their own scale. Weights come as (C_out, n), their rows are the samples.
    """

    @staticmethod
    def forward(ctx, x, s, z, low, high, dim, block, dtype):
        x, ctx.dim, width = _dense(x, dim), dim, block if block > 1 else 32
        ctx.save_for_backward(x, s, z)
        ctx.args = (x.numel() // max(1, len(x)), low, high, width, 4096 // width, block**-0.5)
        q = torch.empty_like(x, dtype=dtype)
        if x.numel():
            _quantize_kernel[(len(x), triton.cdiv(ctx.args[0], 4096))](x, s, z, q, *ctx.args)
        return q

    @staticmethod
    def backward(ctx, g):
        x, s, z = ctx.saved_tensors
        tiles = triton.cdiv(ctx.args[0], 4096)
        gx, gs, gz = torch.empty_like(x), s.new_empty(len(x), tiles), s.new_empty(len(x), tiles)
        if x.numel():
            _quantize_kernel[(len(x), tiles)](x, s, z, gx, *ctx.args, _dense(g, ctx.dim), gs, gz)
        return gx, gs.sum(1), gz.sum(1), None, None, None, None, None


class _ScaleGPU(torch.autograd.Function):
    """bias + acc * (s_x s_w), acc (B, .., C, ..) with its channels at dim; s_x (B,), s_w (C,), bias (C,), which is not trained."""

    @staticmethod
    def forward(ctx, acc, s_x, s_w, bias, dim):
        acc, ctx.dim = _dense(acc, dim), dim
        ctx.save_for_backward(acc, s_x, s_w)
        return _scale_gpu(acc, s_x, s_w, bias)

    @staticmethod
    def backward(ctx, g):
        acc, s_x, s_w = ctx.saved_tensors
        sums = s_x.new_empty(len(acc), triton.cdiv(acc.numel() // max(1, len(acc) * len(s_w)), 64), len(s_w))
        out = _scale_gpu(acc, s_x, s_w, None, _dense(g, ctx.dim), sums)
        sums = sums.sum(1)                                       # (B, C): sums of g * acc over a sample's pixels
        return out, (sums * s_w).sum(1), (sums * s_x[:, None]).sum(0), None, None


def _scale_gpu(acc, s_x, s_w, bias, *back):
    y, C, n = torch.empty_like(acc), len(s_w), acc.numel() // max(1, len(acc) * len(s_w))
    if acc.numel():                                              # no fused multiply-add: _int_kernel must round as this does
        cols = min(64, triton.next_power_of_2(C))
        _scale_kernel[(len(acc), triton.cdiv(n, 64), triton.cdiv(C, cols))](
            acc, s_x, s_w, bias, y, n, C, 64, cols, *back, enable_fp_fusion=False)
    return y


def _int_gpu(x, w, kh, kw, stride, padding, scales=None):
    """Integer x (B, C, h, w) and weights (outs, kh kw C), int8 or int16 each -> (pixels, outs) int32.

    scales (s_x, s_w, bias): float32 instead, and scaled as _ScaleGPU does it, to the last bit.
    """
    x = _dense(x, 1)
    B, C, h, w_in = x.shape
    h_out, w_out = ((size + 2 * padding - k) // stride + 1 for size, k in ((h, kh), (w_in, kw)))
    pixels, outs, wide = B * h_out * w_out, len(w), [t.dtype == torch.int16 for t in (x, w)]
    y = torch.empty(pixels, outs, dtype=torch.float32 if scales else torch.int32, device=x.device)
    if pixels:
        OUTS = 64 if outs <= 64 else 128             # the fastest of some thirty choices, on an H200
        CHANNELS = 128 if C % 128 == 0 and not all(wide) else 64 if C > 32 else 32
        _int_kernel[(triton.cdiv(pixels, 128), triton.cdiv(outs, OUTS))](
            x, w, y, pixels, h, w_in, h_out, w_out, C, outs, kw, kh * kw, stride, padding,
            128, OUTS, CHANNELS, *wide, *(scales or ()), num_warps=8 if any(wide) else 4, enable_fp_fusion=False)
    return y
