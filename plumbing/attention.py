"""Not the method, skip it at first reading: unet.py's attend in one pass, on the matrix units.

Each number of float32 is split into two of TF32, and a product into three of theirs (the fourth is below rounding).
A piece of the weights at a time is held, as in FlashAttention, Dao et al. 2022, arXiv 2205.14135.
"""
import torch
import torch.nn.functional as F

from plumbing.kernels import has_kernel, on_triton, triton

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _attend_kernel(q_ptr, k_ptr, v_ptr, y_ptr, n, heads, by_sample, by_head, by_token, scale, D: tl.constexpr,
                       ROWS: tl.constexpr, KEYS: tl.constexpr):
        """y = softmax(scale q k^T) v for ROWS tokens of a head, KEYS others at a time; by_..: how far apart these lie.

        Weights are e^(w - top), top the largest so far: where a larger one turns up, what is there shrinks.
        """
        tiles = tl.cdiv(n, ROWS)
        pair, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
        sample, head, d = (pair // heads).to(tl.int64), pair % heads, tl.arange(0, D)
        start, mask = sample * by_sample + head * by_head, (row < n)[:, None]
        q = tl.load(q_ptr + start + row[:, None] * by_token + d[None, :], mask, other=0)
        top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        y = tl.zeros((ROWS, D), tl.float32)
        for first in range(0, n, KEYS):
            key = first + tl.arange(0, KEYS)
            at, there = start + key[:, None] * by_token + d[None, :], (key < n)[:, None]
            k, v = tl.load(k_ptr + at, there, other=0), tl.load(v_ptr + at, there, other=0)
            w = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
            w = tl.where((key < n)[None, :], w, float("-inf"))
            highest = tl.maximum(top, tl.max(w, 1))
            shrink, w = tl.exp(top - highest), tl.exp(w - highest[:, None])
            top, total = highest, total * shrink + tl.sum(w, 1)
            y = tl.dot(w, v, y * shrink[:, None], input_precision="tf32x3")
        places = ((sample * n + row[:, None]) * heads + head) * D + d[None, :]
        tl.store(y_ptr + places, y / total[:, None], mask)


def _takes_heads(q, k, v):
    heads = q.ndim == 4 and q.shape == k.shape == v.shape and q.shape[-1] in (16, 32)    # 64: more than some cards hold
    return on_triton(q) and heads and q.dtype == torch.float32 and not torch.is_autocast_enabled(q.device.type)


@has_kernel("attend", _takes_heads)
def attend(q, k, v):
    return _Attend.apply(q, k, v).transpose(1, 2)


class _Attend(torch.autograd.Function):
    """-> (B, n, H, d). The way back is PyTorch's, and goes forward once more: so training has the bits of drawing."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        (B, H, n, D), strides = q.shape, q.stride()
        far = max(H * strides[1], n * strides[2]) >= 2**31       # offsets within a sample have 32 bits
        if not strides == k.stride() == v.stride() or strides[3] != 1 or far:
            q, k, v = (u.contiguous() for u in (q, k, v))
        y = q.new_empty(B, n, H, D)
        if y.numel():
            _attend_kernel[(B * H * triton.cdiv(n, 64),)](q, k, v, y, n, H, *q.stride()[:3], D**-0.5, D, 64, 64)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        with torch.enable_grad(), torch.autocast(g.device.type, enabled=False):
            leaves = [u.detach().requires_grad_() for u in ctx.saved_tensors]
            return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, g.transpose(1, 2))
