"""Not the method, skip it at first reading: unet.py's residual block and attention in integers, in fewer passes.

Norm, SiLU, H and rounding read float32 once and write int8; the integer product adds the time embedding, or the
residual, where it writes its sums. Operations and their order are the definitions', so are the bits: test_4_integer.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from plumbing.kernels import full_float32, has_kernel, on_triton, triton
from plumbing.norm import scale_and_shift

if triton is not None:
    from plumbing.kernels import _quantize_kernel


def _takes_integers(x, block, *_):
    """Whether this module may be computed here: all of it in integers, nothing trained, and nobody looks inside."""
    if torch.is_grad_enabled() or not on_triton(x) or x.dtype != torch.float32:
        return False
    parts = list(block.modules())
    if any(isinstance(m, nn.Dropout) and m.training and m.p or m._forward_hooks or m._forward_pre_hooks
           for m in parts[1:]):
        return False
    layers = [m for m in parts if hasattr(m, "integer") or isinstance(m, (nn.Linear, nn.Conv2d))]
    return all(getattr(m, "integer", False) for m in layers)


def rounded(norm, layer, x):
    """norm(x), through SiLU where that is its way, then H and rounding: what layer multiplies, and s_x (B,).

    x (B, h, w, C) is read once more after its moments, and the integers written once.
    """
    (scale, shift), *_ = scale_and_shift(rearrange(x, "B h w C -> B C h w"), norm.num_groups, norm.weight, norm.bias,
                                         norm.eps)
    quantizer, q, n = layer.activations, torch.empty_like(x, dtype=layer.dtype), x[0].numel()
    s_x, z = (v if v is None else v.contiguous() for v in quantizer.of_steps(len(x)))
    width = quantizer.block if quantizer.block > 1 else 32
    _quantize_kernel[(len(x), triton.cdiv(n, 4096))](
        x, s_x, z, q, n, *quantizer.grid, width, 4096 // width, quantizer.block**-0.5, scale_ptr=scale, shift_ptr=shift,
        C=x.shape[-1], SILU=norm.silu)
    return q, s_x


def multiplied(layer, q_x, s_x, *more):
    """The layer's output for its integers; more, of that shape or (B, C_out), is added."""
    with full_float32(q_x.device):
        q_w, s_w = layer.operand()
        return layer.multiply_int(q_x, q_w, (s_x, s_w, layer.bias, *more))


def last(x):
    """(B, C, h, w) -> (B, h, w, C), contiguous."""
    return rearrange(x, "B C h w -> B h w C").contiguous()


@has_kernel("residual", lambda x, block, emb: len(x) and _takes_integers(x, block))
def residual(x, block, emb):
    r = multiplied(block.conv1, *rounded(block.norm1, block.conv1, last(x)), block.emb(emb))
    r = multiplied(block.conv2, *rounded(block.norm2, block.conv2, r), last(block.skip(x)))
    return rearrange(r, "B h w C -> B C h w")


@has_kernel("attention", lambda x, block: len(x) and _takes_integers(x, block))
def attention(x, block):
    x = last(x)
    qkv = multiplied(block.qkv, *rounded(block.norm, block.qkv, x))
    q, k, v = rearrange(qkv, "B h w (three H d) -> three B H (h w) d", three=3, H=block.heads)
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "B H (h w) d -> B h w (H d)", h=x.shape[1])
    out = multiplied(block.proj, *block.proj.activations(out, block.proj.dtype), x)
    return rearrange(out, "B h w C -> B C h w")
