"""Not the method, skip it at first reading: four functions of hqdm.py once more, as one pass over memory each.

hqdm.py and unet.py (norm.py, attention.py, blocks.py) mark definitions with @kernel. On an NVIDIA GPU from Ampere on,
a kernel of the same name and arguments then runs instead (Triton comes with torch on Linux); on a CPU integer products
take int8 instructions (int8.py), and rounding without gradients is in place. tests/test_3 to 5 compare each with its
definition. HQDM_KERNELS=off in the environment, or ENABLED = False here, leaves the definitions alone. To step through
a kernel without a GPU: TRITON_INTERPRET=1 python -m pytest tests/test_3*.
"""
import contextlib
import functools
import math
import os

import torch
import torch.nn.functional as F

from plumbing.int8 import for_triton, int8_product, onednn_is_exact, onednn_product

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
ENABLED = os.environ.get("HQDM_KERNELS") != "off"
FAST = {}                        # name of a definition -> (whether the kernel takes these arguments, the kernel)
CHOSEN = {}                      # name of a definition -> what @kernel made of it, for kernels that need another
_said = set()


# ---------------------------------------------------------------- the one place that chooses

def kernel(definition):
    """Decorator: f(x, ..) is the kernel of f's name where that takes the arguments, else f itself, f.__wrapped__."""
    takes, fast = FAST[definition.__name__]

    @functools.wraps(definition)
    def choose(x, *args, **kwargs):
        if torch.compiler.is_compiling():            # torch.compile fuses the definitions itself
            return definition(x, *args, **kwargs)
        quantized = definition.__module__ != "unet"  # the float network has kernels on a GPU alone
        if x.device.type not in _said and (on_triton(x) or quantized):
            _said.add(x.device.type)
            print(f"kernels: {route(x)}", flush=True)
        return (fast if ENABLED and takes(x, *args, **kwargs) else definition)(x, *args, **kwargs)
    CHOSEN[definition.__name__] = choose
    return choose


def route(x):
    """What runs where x is, in words."""
    if ENABLED and on_triton(x):
        return f"Triton on {torch.cuda.get_device_name(x.device)}" if x.is_cuda else "Triton's interpreter"
    int8 = ENABLED and x.device.type in ("cpu", "cuda")
    return f"definitions on {x.device.type}{', int8 products' if int8 else ''}"


def on_triton(x, block=32):
    """Whether Triton takes x. A program holds R in shared memory: 16 KB at block 64; 64 KB, too much, at 128."""
    if triton is None or block not in (16, 32, 64) or x.dtype == torch.float64:      # matrix units want 16 or more
        return False
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).major >= 8
    return INTERPRETED and x.device.type == "cpu"


def has_kernel(name, takes):
    """Decorator: this function is the kernel of that definition, for arguments of which takes(..) is true."""
    def register(fast):
        FAST[name] = takes, fast
        return fast
    return register


@contextlib.contextmanager
def full_float32(device):
    """No TF32 and no autocast inside: TF32 keeps 11 bits, an error of 1e-3 in H x, and moves values across grid lines.

    cuDNN's convolutions may use TF32: what they multiply are integers of up to 11 bits (HQLayer.operand).
    """
    autocast = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    autocast = autocast and (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type))
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
        if torch.compiler.is_compiling():            # it cannot trace these switches: who compiles turns them
            yield
            return
        # torch 2.9 gave the setting a name a library, and refuses the old common name to programs that use those.
        parts = torch.backends.cuda.matmul, *(getattr(torch.backends.mkldnn, n, None) for n in ("matmul", "conv"))
        parts = [p for p in parts if hasattr(p, "fp32_precision")]
        common = None if parts else torch.get_float32_matmul_precision()
        changed = [(p, p.fp32_precision) for p in parts if p.fp32_precision not in ("ieee", "none")]
        for p, _ in changed:                         # only where somebody asked for less: the setting is every thread's
            p.fp32_precision = "ieee"
        if common not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            for p, precision in changed:
                p.fp32_precision = precision
            if common not in (None, "highest"):
                torch.set_float32_matmul_precision(common)


@has_kernel("int_product", lambda q_x, q_w, *_, **__: q_x.device.type in ("cpu", "cuda")
            and not q_x.is_floating_point() and not q_w.is_floating_point())
def int_product(q_x, q_w, stride=1, padding=0, scales=None):
    (B, h, w, _), (O, _, kh, kw) = q_x.shape, q_w.shape
    h, w = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
    if on_triton(q_x) and {q_x.dtype, q_w.dtype} <= {torch.int8, torch.int16}:
        return int_product_triton(q_x, q_w, stride, padding, scales, B, h, w)
    acc = onednn_product(q_x, q_w, stride, padding) if not q_x.is_cuda and q_x.numel() and onednn_is_exact() else None
    acc = int8_product(q_x, q_w, stride, padding).view(B, h, w, O) if acc is None else acc
    return acc.to(torch.int32) if scales is None else CHOSEN["scale_and_bias"](acc.float(), scales)


# ---------------------------------------------------------------- Triton

# Tensors have their channels last here: a pixel's (or a token's) lie side by side, and so do the transform's blocks.
if triton is not None:
    @triton.jit
    def _rotate(x, K: tl.constexpr):
        """(rows, K) float32 -> x R. TF32 units keep 11 bits: x = high + low are two such halves; +-1 needs one bit."""
        i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
        common = i & j                                           # R_ij = (-1)^(number of common one bits of i and j)
        common ^= common >> 4
        common ^= common >> 2
        common ^= common >> 1
        R = 1.0 - 2.0 * (common & 1).to(tl.float32)
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)       # 8192 = 2^13, and 24 - 13 = 11
        return tl.dot(high, R, input_precision="tf32") + tl.dot(x - high, R, input_precision="tf32")

    @triton.jit
    def _walsh_kernel(x_ptr, y_ptr, vectors, scale: tl.constexpr, inner: tl.constexpr, K: tl.constexpr,
                      ROWS: tl.constexpr):
        """y = scale R x for vectors of K numbers that lie `inner` apart in memory. Each program does ROWS vectors."""
        v = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)        # 64 bits: a tensor may have 2^31 numbers
        offsets = (v // inner * (K * inner) + v % inner)[:, None] + tl.arange(0, K)[None, :] * inner
        mask = (v < vectors)[:, None]
        x = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32)
        tl.store(y_ptr + offsets, (_rotate(x, K) * scale).to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def _round(t, low, high, STEP: tl.constexpr):
        """clamp(t, low, high) rounded, ties to even; STEP 2: to odd numbers."""
        t = tl.minimum(tl.maximum(t, low), high)
        if STEP == 1:
            t = (t + 12582912.0) - 12582912.0                    # next to 1.5 * 2^23 a float32 has no bit below 1
        else:
            t = 2 * tl.floor(t * 0.5) + 1
        return t

    @triton.jit
    def _divided(x, s, K: tl.constexpr, NORM: tl.constexpr):
        """H x / s of rows (.., K): Newton's step makes it as good as a division. NORM 1: no H.

        Only what says fma is fused: left to the compiler, two kernels that must agree fused otherwise.
        """
        if NORM != 1.0:
            x = _rotate(x, K) * NORM
        t = x * (1 / s)
        return tl.fma(tl.fma(-t, s, x), 1 / s, t)

    @triton.jit
    def _quantize_kernel(x_ptr, s_ptr, z_ptr, y_ptr, n, low, high, STEP: tl.constexpr, K: tl.constexpr,
                         ROWS: tl.constexpr, NORM: tl.constexpr, g_ptr=None, gs_ptr=None, gz_ptr=None):
        """y = clamp(round(H x / s) + z, low, high) - z, for samples of n numbers with an s and a z each. NORM 1: no H.

        Given g, the way back: y is the gradient of x at every place; those of s and z come as one sum a program.
        """
        tiles = tl.cdiv(n, ROWS * K)
        sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        at = tile * (ROWS * K) + tl.arange(0, ROWS)[:, None] * K + tl.arange(0, K)[None, :]
        offsets, mask = sample.to(tl.int64) * n + at, at < n
        x, s, z = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32), tl.load(s_ptr + sample), 0.0
        if z_ptr is not None:
            z = tl.load(z_ptr + sample)
        t, first, last = _divided(x, s, K, NORM), low - z, high - z
        if g_ptr is None:
            y = _round(t, first, last, STEP)
        else:
            g, near = tl.load(g_ptr + offsets, mask, other=0).to(tl.float32), _round(t, first - STEP, last + STEP, STEP)
            inside = (near >= first) & (near <= last)
            y = tl.where(inside, g * (1 / s), 0.0)
            tl.store(gs_ptr + tl.program_id(0), -tl.sum(tl.sum(y * t, 1), 0))            # d(x/s)/ds = -(x/s)/s
            if gz_ptr is not None:
                outside = tl.where(inside, 0.0, g)                       # inside, z comes and goes
                tl.store(gz_ptr + tl.program_id(0), -tl.sum(tl.sum(outside, 1), 0))
            if NORM != 1.0:
                y = _rotate(y, K) * NORM
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def _scale_kernel(acc_ptr, s_x_ptr, s_w_ptr, bias_ptr, y_ptr, n, C, ROWS: tl.constexpr, COLS: tl.constexpr,
                      g_ptr=None, gs_ptr=None):
        """y = acc * (s_x s_w) + bias over a sample's pixels. Given g: y = g * (s_x s_w), sums of g * acc by program."""
        cols, tiles = tl.cdiv(C, COLS), tl.cdiv(n, ROWS)
        part, c = tl.program_id(0) // cols, tl.program_id(0) % cols * COLS + tl.arange(0, COLS)
        sample, pixel = part // tiles, part % tiles * ROWS + tl.arange(0, ROWS)
        offsets = (sample.to(tl.int64) * n + pixel)[:, None] * C + c[None, :]
        mask = (pixel < n)[:, None] & (c < C)[None, :]
        acc = tl.load(acc_ptr + offsets, mask, other=0)
        s = tl.load(s_x_ptr + sample) * tl.load(s_w_ptr + c, c < C, other=0)
        if g_ptr is not None:
            g = tl.load(g_ptr + offsets, mask, other=0)
            tl.store(gs_ptr + part * C + c, tl.sum(g * acc, 0), c < C)
            tl.store(y_ptr + offsets, g * s[None, :], mask)
        else:
            tl.store(y_ptr + offsets, acc * s[None, :] + tl.load(bias_ptr + c, c < C, other=0)[None, :], mask)

    @triton.jit
    def _write(y, b, pixel, out, y_ptr, pixels, outs, s_x_ptr, s_w_ptr, bias_ptr, more_ptr, SAMPLES: tl.constexpr):
        """Sums y of these pixels (of picture b) and outputs, as they are or scaled: see _int_kernel."""
        places = pixel.to(tl.int64)[:, None] * outs + out[None, :]
        mask = (pixel < pixels)[:, None] & (out < outs)[None, :]
        if s_x_ptr is not None:
            s_x, s_w = tl.load(s_x_ptr + b, pixel < pixels, other=0), tl.load(s_w_ptr + out, out < outs, other=0)
            y = y.to(tl.float32) * (s_x[:, None] * s_w[None, :])
            y += tl.load(bias_ptr + out, out < outs, other=0)[None, :]
            if more_ptr is not None:
                rows = b.to(tl.int64)[:, None] * outs + out[None, :] if SAMPLES else places
                y += tl.load(more_ptr + rows, mask, other=0)
        tl.store(y_ptr + places, y, mask)

    @triton.jit
    def _int_kernel(x_ptr, w_ptr, y_ptr, pixels, h, w, h_out, w_out, C, outs, kw, taps, stride, padding,
                    PIXELS: tl.constexpr, OUTS: tl.constexpr, CHANNELS: tl.constexpr, WIDE_X: tl.constexpr,
                    WIDE_W: tl.constexpr, middle_ptr=None, s_x_ptr=None, s_w_ptr=None, bias_ptr=None, more_ptr=None,
                    SAMPLES: tl.constexpr = False):
        """Integers x (B, h, w, C), w (outs, taps, C) -> y (pixels, outs): int32, or float32 sums * (s_x s_w) + bias.

        Given more, that is added: of y's shape, or with SAMPLES (B, outs). Each program sums PIXELS x OUTS outputs over
        taps and channels; no patches are copied. Integer units take int8: wide operands (int16, of up to 14 bits) are
        cut into low + 128 high, weights (2, ..) beforehand; the three shifts are summed apart. Given middle (outs,),
        which was taken off the weights: its share is middle times the sum of x.
        """
        cols = tl.cdiv(outs, OUTS)
        first = tl.program_id(0) % cols * OUTS
        pixel, out = tl.program_id(0) // cols * PIXELS + tl.arange(0, PIXELS), first + tl.arange(0, OUTS)
        b, i, j = pixel // (h_out * w_out), pixel // w_out % h_out * stride - padding, pixel % w_out * stride - padding
        picture, chunks = x_ptr + b.to(tl.int64) * (h * w * C), tl.cdiv(C, CHANNELS)
        acc = tl.zeros((PIXELS, OUTS), tl.int32)
        acc7, acc14 = acc, acc                                   # narrow operands leave them 0: the compiler drops them
        all_x = tl.zeros((PIXELS,), tl.int32)
        for k in range(taps * chunks):
            tap, c = k // chunks, k % chunks * CHANNELS + tl.arange(0, CHANNELS)
            y, x = i + tap // kw, j + tap % kw
            inside = (pixel < pixels) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
            q_x = tl.load((picture + (y * w + x) * C)[:, None] + c[None, :],
                          inside[:, None] & (c < C)[None, :], other=0)
            w_ptrs = w_ptr + ((out * taps + tap) * C)[None, :] + c[:, None]
            within = (out < outs)[None, :] & (c < C)[:, None]
            low_x, low_w = q_x, tl.load(w_ptrs, within, other=0)
            if WIDE_X:
                low_x, high_x = (q_x & 127).to(tl.int8), (q_x >> 7).to(tl.int8)
            if WIDE_W:
                high_w = tl.load(w_ptrs + outs * taps * C, within, other=0)
            acc = tl.dot(low_x, low_w, acc, out_dtype=tl.int32)
            if middle_ptr is not None:
                all_x += tl.sum(q_x.to(tl.int32), 1)
            if WIDE_X:
                acc7 = tl.dot(high_x, low_w, acc7, out_dtype=tl.int32)
            if WIDE_W:
                acc7 = tl.dot(low_x, high_w, acc7, out_dtype=tl.int32)
            if WIDE_X and WIDE_W:
                acc14 = tl.dot(high_x, high_w, acc14, out_dtype=tl.int32)
        acc += (acc7 << 7) + (acc14 << 14)
        if middle_ptr is not None:
            acc += all_x[:, None] * tl.load(middle_ptr + out, out < outs, other=0)[None, :]
        # Written in two halves: more beside all sums would be more than there are registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (PIXELS, 2, OUTS // 2)), (0, 2, 1)))
        out = first + tl.arange(0, OUTS // 2)
        _write(left, b, pixel, out, y_ptr, pixels, outs, s_x_ptr, s_w_ptr, bias_ptr, more_ptr, SAMPLES)
        _write(right, b, pixel, out + OUTS // 2, y_ptr, pixels, outs, s_x_ptr, s_w_ptr, bias_ptr, more_ptr, SAMPLES)


def _takes_blocks(x, dim=1, block=32, scale=1.0, dtype=None):
    whole = x.is_floating_point() or x.dtype in (torch.int8, torch.int16) and (scale == 1 or dtype)  # 22 bits
    return on_triton(x, block) and whole and x.shape[dim] % block == 0


@has_kernel("walsh", _takes_blocks)
def walsh(x, dim=1, block=32, scale=1.0, dtype=None):
    return _Walsh.apply(x, dim % x.ndim, block, scale, dtype or (x.dtype if x.is_floating_point() else torch.int32))


class _Walsh(torch.autograd.Function):
    """y = scale R x has the gradient scale R^T g = scale R g: nothing needs to be saved for the way back."""

    @staticmethod
    def forward(ctx, x, dim, block, scale, dtype):
        ctx.args = dim, block, scale, x.dtype
        last = x.ndim == 4 and dim == 1 and x.is_contiguous(memory_format=torch.channels_last)
        x = x if last else x.contiguous()
        y, vectors = torch.empty_like(x, dtype=dtype), x.numel() // block
        inner = 1 if last else math.prod(x.shape[dim + 1:])
        if vectors:
            _walsh_kernel[(triton.cdiv(vectors, 128),)](x, y, vectors, scale, inner, block, 128)
        return y

    @staticmethod
    def backward(ctx, g):
        return _Walsh.apply(g, *ctx.args), None, None, None, None


def _takes_activations(x, s, z, grid, block=1, dtype=None):
    trained = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, s, z))
    return on_triton(x, block if block > 1 else 32) or x.device.type == "cpu" and not trained


@has_kernel("rotate_and_quantize", _takes_activations)
def rotate_and_quantize(x, s, z, grid, block=1, dtype=torch.float32):
    if on_triton(x, block if block > 1 else 32):
        return _Quantize.apply(x, s, z, grid, block, dtype)
    s, z = (a if a is None else a.view(-1, *[1] * (x.ndim - 1)) for a in (s, z))
    t = CHOSEN["walsh"](x, -1, block, block**-0.5).div_(s) if block > 1 else x / s       # the same steps, in place
    t = t.round_() if grid.step == 1 else t.div_(2).floor_().mul_(2).add_(1)
    t = t.clamp_(grid.low, grid.high) if z is None else t.add_(z).clamp_(grid.low, grid.high).sub_(z)
    return t.to(dtype)


class _Quantize(torch.autograd.Function):
    """x is read once and q written once; the way back likewise, with H x computed anew."""

    @staticmethod
    def forward(ctx, x, s, z, grid, block, dtype):
        x, s, z, width = x.contiguous(), s.contiguous(), z if z is None else z.contiguous(), block if block > 1 else 32
        ctx.save_for_backward(x, s, z)
        ctx.args = (x.numel() // max(1, len(x)), *grid, width, 4096 // width, block**-0.5)
        q = torch.empty_like(x, dtype=dtype)
        if x.numel():
            _quantize_kernel[(len(x) * triton.cdiv(ctx.args[0], 4096),)](x, s, z, q, *ctx.args, enable_fp_fusion=False)
        return q

    @staticmethod
    def backward(ctx, g):
        x, s, z = ctx.saved_tensors
        tiles = triton.cdiv(ctx.args[0], 4096)
        gx, gs = torch.empty_like(x), s.new_empty(len(x), tiles)
        gz = s.new_empty(len(x), tiles) if ctx.needs_input_grad[2] else None         # z of weights is not trained
        if x.numel():
            _quantize_kernel[(len(x) * tiles,)](x, s, z, gx, *ctx.args, g.contiguous(), gs, gz, enable_fp_fusion=False)
        return gx, gs.sum(1), None if gz is None else gz.sum(1), None, None, None


@has_kernel("scale_and_bias", lambda acc, scales: on_triton(acc) and acc.dtype == torch.float32)
def scale_and_bias(acc, scales):
    return _Scale.apply(acc, *scales)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, acc, s_x, s_w, bias):
        acc, s_x, s_w = acc.contiguous(), s_x.contiguous(), s_w.contiguous()
        ctx.save_for_backward(acc, s_x, s_w)
        return _scale(acc, s_x, s_w, bias)

    @staticmethod
    def backward(ctx, g):
        acc, s_x, s_w = ctx.saved_tensors
        n = acc.numel() // max(1, len(acc) * len(s_w))
        sums = s_x.new_empty(len(acc), triton.cdiv(n, 64), len(s_w))
        out = _scale(acc, s_x, s_w, None, g.contiguous(), sums)
        sums = sums.sum(1)                           # (B, C): sums of g * acc over a sample's pixels
        with full_float32(g.device):                 # somebody's backward may run in autocast
            return out, sums @ s_w, s_x @ sums, None


def _scale(acc, s_x, s_w, bias, *back):
    y, C = torch.empty_like(acc), len(s_w)
    if acc.numel():                                  # no fused multiply-add: _int_kernel must round as this does
        n, cols = acc.numel() // (len(acc) * C), min(64, triton.next_power_of_2(C))
        _scale_kernel[(len(acc) * triton.cdiv(n, 64) * triton.cdiv(C, cols),)](
            acc, s_x, s_w, bias, y, n, C, 64, cols, *back, enable_fp_fusion=False)
    return y


def int_product_triton(q_x, q_w, stride, padding, scales, *shape):
    """q_x and q_w int8, or int16 of up to 14 bits (narrow) -> (*shape, O). scales may have a fourth: what is added."""
    (_, h, w_in, C), (O, _, kh, kw), (w, middle) = q_x.shape, q_w.shape, for_triton(q_w)
    wide, pixels = (q_x.dtype == torch.int16, len(w) == 2), math.prod(shape)
    q_x = F.pad(q_x, (0, -C % 16)) if C % 16 else q_x.contiguous()       # what pads nothing copies, too
    y = torch.empty(*shape, O, dtype=torch.float32 if scales else torch.int32, device=q_x.device)
    if pixels:                                       # the fastest tiles of some thirty, on an H200
        PIXELS, OUTS = 64 if any(wide) else 128, 16 if O <= 16 else 64 if O <= 64 else 128
        CHANNELS = 128 if C % 128 == 0 and not any(wide) else 64 if C > 32 else 32
        samples = [v.ndim == 2 for v in (scales or ())[3:]]
        _int_kernel[(triton.cdiv(pixels, PIXELS) * triton.cdiv(O, OUTS),)](
            q_x, w, y, pixels, h, w_in, *shape[1:], q_x.shape[-1], O, kw, kh * kw, stride, padding, PIXELS, OUTS,
            CHANNELS, *wide, middle, *(v.contiguous() for v in scales or ()), *samples, enable_fp_fusion=False)
    return y
