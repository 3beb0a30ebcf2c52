"""Not the method, skip it at first reading: unet.py's group_norm, with SiLU, in three passes over memory, not a dozen.

Images (B, C, h, w) with their channels last are (B, P, C) here, P pixels. Passes: `moments` of each channel of each
chunk of pixels; these are joined, group by group, to one scale and one shift a channel; y = silu(scale x + shift).
No sum depends on the batch or on the order in which programs end: the same sample has the same bits every time.
"""
import torch

from plumbing.kernels import has_kernel, on_triton, triton

PIXELS, CHANNELS = 64, 64        # a program's tile

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _normalised(x, scale, shift, SILU: tl.constexpr):
        """scale x + shift; then SiLU, if asked for."""
        y = tl.fma(x, scale, shift)
        if SILU:
            y = y / (1 + tl.exp(-y))
        return y

    @triton.jit
    def _tile(P, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
        """Where a program works: offsets in (B, P, C), mask; sample, first pixel, channels, row of (B chunks, C)."""
        cols, chunks = tl.cdiv(C, CHANNELS), tl.cdiv(P, PIXELS)
        row, c = tl.program_id(0) // cols, tl.program_id(0) % cols * CHANNELS + tl.arange(0, CHANNELS)
        sample, first = row // chunks, row % chunks * PIXELS
        pixel = first + tl.arange(0, PIXELS)
        offsets = (sample.to(tl.int64) * P + pixel)[:, None] * C + c[None, :]
        return offsets, (pixel < P)[:, None] & (c < C)[None, :], sample, first, c, row

    @triton.jit
    def _two(a_ptr, b_ptr, at, mask):
        """Numbers of two small tensors, as rows."""
        return tl.load(a_ptr + at, mask, other=0)[None, :], tl.load(b_ptr + at, mask, other=0)[None, :]

    @triton.jit
    def _moments_kernel(x_ptr, mean_ptr, m2_ptr, P, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
        """Mean and summed squared distance from it, of each channel over a chunk of pixels: (B, chunks, C) each."""
        offsets, mask, _, first, c, row = _tile(P, C, PIXELS, CHANNELS)
        x, n = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32), tl.minimum(P - first, PIXELS)
        mean = tl.sum(x, 0) / n
        away = tl.where(mask, x - mean[None, :], 0.0)
        tl.store(mean_ptr + row * C + c, mean, c < C)
        tl.store(m2_ptr + row * C + c, tl.sum(away * away, 0), c < C)

    @triton.jit
    def _join_kernel(a_ptr, b_ptr, w_ptr, bias_ptr, first_ptr, second_ptr, mean_ptr, rstd_ptr, P, C, chunks, width, eps,
                     PIXELS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr):
        """A program a sample and group of `width` channels: joins what its chunks found.

        Forward: a, b mean and m2 of chunks -> scale, shift (B, C); mean and 1/std (B, groups). Back: a, b are sums of g
        and of g x^ over chunks -> the same over the sample (B, C), and over the group, times w, as means (B, groups).
        """
        sample, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        k, i = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
        mask, c = (k < chunks)[:, None] & (i < width)[None, :], group * width + i
        at = (sample * chunks + k)[:, None] * C + c[None, :]
        a, b = tl.load(a_ptr + at, mask, other=0), tl.load(b_ptr + at, mask, other=0)
        w, out, total = tl.load(w_ptr + c, i < width, other=0), sample * C + c, P * width
        if BACK:
            first, second = tl.sum(a, 0), tl.sum(b, 0)
            mean, rstd = tl.sum(w * first, 0) / total, tl.sum(w * second, 0) / total
        else:
            n = tl.minimum(P - k * PIXELS, PIXELS)[:, None]
            mean = tl.sum(tl.sum(tl.where(mask, a * n, 0.0), 1), 0) / total
            away = tl.where(mask, a - mean, 0.0)
            var = tl.sum(tl.sum(b + away * away * n, 1), 0) / total
            rstd = 1 / tl.sqrt(var + eps)
            first = w * rstd
            second = tl.load(bias_ptr + c, i < width, other=0) - mean * first
        tl.store(first_ptr + out, first, i < width)
        tl.store(second_ptr + out, second, i < width)
        tl.store(mean_ptr + sample * groups + group, mean)
        tl.store(rstd_ptr + sample * groups + group, rstd)

    @triton.jit
    def _apply_kernel(x_ptr, scale_ptr, shift_ptr, y_ptr, P, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
                      SILU: tl.constexpr):
        offsets, mask, sample, _, c, _ = _tile(P, C, PIXELS, CHANNELS)
        x = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32)
        scale, shift = _two(scale_ptr, shift_ptr, sample * C + c, c < C)
        tl.store(y_ptr + offsets, _normalised(x, scale, shift, SILU), mask)

    @triton.jit
    def _back_kernel(x_ptr, g_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, first_ptr, second_ptr, gx_ptr, P, C, width,
                     groups, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr):
        """With u = scale x + shift, x^ = (x - mean) / std and g the gradient of u, in two calls:

        without gx: first, second (B, chunks, C) are sums of g and g x^ over a chunk. With it: first, second (B, groups)
        are the means of w g and w g x^ over a group, and gx = scale g - (first + second x^) / std.
        """
        offsets, mask, sample, _, c, row = _tile(P, C, PIXELS, CHANNELS)
        group = sample * groups + c // width
        scale, shift = _two(scale_ptr, shift_ptr, sample * C + c, c < C)
        mean, rstd = _two(mean_ptr, rstd_ptr, group, c < C)
        x = tl.load(x_ptr + offsets, mask, other=0).to(tl.float32)
        g, hat = tl.load(g_ptr + offsets, mask, other=0).to(tl.float32), (x - mean) * rstd
        if SILU:
            u = x * scale + shift
            s = 1 / (1 + tl.exp(-u))
            g *= s * (1 + u * (1 - s))
        if gx_ptr is None:
            tl.store(first_ptr + row * C + c, tl.sum(g, 0), c < C)
            tl.store(second_ptr + row * C + c, tl.sum(tl.where(mask, g * hat, 0.0), 0), c < C)
        else:
            first, second = _two(first_ptr, second_ptr, group, c < C)
            gx = g * scale - (first + second * hat) * rstd
            tl.store(gx_ptr + offsets, gx.to(gx_ptr.dtype.element_ty), mask)


def takes_images(x, groups, weight, bias, eps, silu=False):
    """Whether the kernels take these arguments of group_norm."""
    small = x.ndim == 4 and x.shape[2] * x.shape[3] <= 2**16     # chunks that one program can join
    return small and on_triton(x) and weight.dtype == bias.dtype == torch.float32


@has_kernel("group_norm", takes_images)
def group_norm(x, groups, weight, bias, eps, silu=False):
    return _GroupNorm.apply(x, groups, weight, bias, eps, silu)


def few(joined):
    """Warps for _join_kernel: one has room for a thousand numbers of two tensors, and is faster."""
    return 1 if joined[-2] * joined[-1] <= 1024 else 4


def scale_and_shift(x, groups, weight, bias, eps):
    """Of x (B, C, h, w), channels last: rows (2, B, C), with which group_norm is rows[0] x + rows[1];
    whole (2, B, groups), mean and 1/std; and the kernels' grid, tile and numbers.
    """
    (B, C), P = x.shape[:2], x.shape[2] * x.shape[3]
    chunks, width = triton.cdiv(P, PIXELS), C // groups
    grid, tile = (B * chunks * triton.cdiv(C, CHANNELS),), (PIXELS, CHANNELS)
    joined = P, C, chunks, width, eps, PIXELS, triton.next_power_of_2(chunks), triton.next_power_of_2(width)
    shapes = (B, chunks, C), (B, C), (B, groups)
    parts, rows, whole = (x.new_empty(2, *shape, dtype=torch.float32) for shape in shapes)   # chunks, channels, groups
    if x.numel():
        _moments_kernel[grid](x, *parts, P, C, *tile)
        _join_kernel[(B, groups)](*parts, weight, bias, *rows, *whole, *joined, False, num_warps=few(joined))
    return rows, whole, grid, tile, joined


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu):
        x = x.contiguous(memory_format=torch.channels_last)
        rows, whole, grid, tile, joined = scale_and_shift(x, groups, weight, bias, eps)
        y = torch.empty_like(x, dtype=torch.float32)
        if x.numel():
            _apply_kernel[grid](x, *rows, y, *joined[:2], *tile, silu, enable_fp_fusion=False)
        ctx.save_for_backward(x, weight, rows, whole)
        ctx.args = grid, tile, joined, silu
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, rows, whole = ctx.saved_tensors
        (grid, tile, joined, silu), g = ctx.args, g.contiguous(memory_format=torch.channels_last)
        (P, C, chunks, width, *_), (B, groups) = joined, whole.shape[1:]
        parts, sums = rows.new_empty(2, B, chunks, C), torch.empty_like(rows)
        means, gx = torch.empty_like(whole), torch.empty_like(x)
        if x.numel():
            _back_kernel[grid](x, g, *rows, *whole, *parts, None, P, C, width, groups, *tile, silu)
            _join_kernel[(B, groups)](*parts, weight, None, *sums, *means, *joined, True, num_warps=few(joined))
            _back_kernel[grid](x, g, *rows, *whole, *means, gx, P, C, width, groups, *tile, silu)
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]             # not in a quantized network
        return gx, None, sums[1].sum(0) if trained else None, sums[0].sum(0) if trained else None, None, None
