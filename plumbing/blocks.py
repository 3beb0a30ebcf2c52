"""Not the method, skip it at first reading: unet.py's residual block and attention in integers, in fewer passes.

What a norm gives is rounded as it is computed, by one pass that writes integers; the integer product adds the time
embedding, or the residual, where it writes its sums. Operations and their order are the definitions', so are the bits:
tests/test_4_integer.py.
"""
import torch
import torch.nn as nn
from einops import rearrange

import plumbing.attention  # noqa: F401  the kernel of attend
from plumbing.kernels import CHOSEN, full_float32, has_kernel, on_triton, triton
from plumbing.norm import scale_and_shift, takes_images

if triton is not None:
    import triton.language as tl

    from plumbing.kernels import _divided, _round
    from plumbing.norm import _normalised, _tile, _two

    @triton.jit
    def _norm_quantize_kernel(x_ptr, scale_ptr, shift_ptr, s_ptr, z_ptr, y_ptr, P, C, low, high, STEP: tl.constexpr,
                              K: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, PIXELS: tl.constexpr,
                              TURNS: tl.constexpr):
        """_apply_kernel, then _quantize_kernel: x (B, P, C) -> integers. A program does TURNS tiles of K channels."""
        _, _, sample, first, c, _ = _tile(P, C, PIXELS * TURNS, K)
        scale, shift = _two(scale_ptr, shift_ptr, sample * C + c, c < C)
        s, z = tl.load(s_ptr + sample), 0.0
        if z_ptr is not None:
            z = tl.load(z_ptr + sample)
        for turn in range(TURNS):
            pixel = first + turn * PIXELS + tl.arange(0, PIXELS)
            offsets = (sample.to(tl.int64) * P + pixel)[:, None] * C + c[None, :]
            mask = (pixel < P)[:, None] & (c < C)[None, :]
            x = _normalised(tl.load(x_ptr + offsets, mask, other=0).to(tl.float32), scale, shift, SILU)
            y = _round(_divided(x, s, K, NORM), low - z, high - z, STEP)
            tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


def _takes_block(x, block, *pairs):
    """Whether a block of these pairs of norm and layer may be computed here for x: all its layers are in integers,
    nothing is trained, nobody looks inside, and each kernel takes what it is to get.
    """
    every = nn.modules.module
    watched = every._global_forward_hooks or every._global_forward_pre_hooks
    if not on_triton(x) or torch.is_grad_enabled() or not len(x) or watched:
        return False
    for m in list(block.modules())[1:]:
        dropout = isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p
        if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or dropout:
            return False
        if isinstance(m, (nn.Linear, nn.Conv2d)) or not getattr(m, "integer", True):
            return False
    return x.dtype == torch.float32 and all(
        hasattr(norm, "silu") and takes_images(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        and on_triton(x, width(layer)) for norm, layer in pairs)


def width(layer):
    """How many numbers the rounding kernel takes as a row: a block of H; without H, any."""
    return layer.activations.block if layer.activations.block > 1 else 32


def rounded(norm, layer, x):
    """norm(x), through SiLU where that is its way, then H and rounding: what layer multiplies, and s_x (B,).

    x (B, h, w, C) is read for its moments, once more for the rest, and the integers are written once.
    """
    images = rearrange(x, "B h w C -> B C h w")
    (scale, shift), *_ = scale_and_shift(images, norm.num_groups, norm.weight, norm.bias, norm.eps)
    quantizer, q, (B, h, w, C) = layer.activations, torch.empty_like(x, dtype=layer.dtype), x.shape
    with full_float32(x.device):
        s_x, z = (v if v is None else v.contiguous() for v in quantizer.of_steps(B))
    K, turns = width(layer), 4 if h * w >= 256 else 1            # the fastest of some twenty choices, on an H200
    _norm_quantize_kernel[(B * triton.cdiv(h * w, 64 * turns) * triton.cdiv(C, K),)](
        x, scale, shift, s_x, z, q, h * w, C, *quantizer.grid, K, quantizer.block**-0.5, norm.silu, 64, turns,
        enable_fp_fusion=False)
    return q, s_x


def multiplied(layer, q_x, s_x, *more):
    """The layer's output for its integers; more, of that shape or (B, C_out), is added."""
    with full_float32(q_x.device):
        q_w, s_w = layer.operand()
        return layer.multiply_int(q_x, q_w, (s_x, s_w, layer.bias, *more))


def last(x):
    """(B, C, h, w) -> (B, h, w, C), contiguous."""
    return rearrange(x, "B C h w -> B h w C").contiguous()


@has_kernel("residual", lambda x, m, emb: _takes_block(x, m, (m.norm1, m.conv1), (m.norm2, m.conv2)))
def residual(x, block, emb):
    emb = block.emb(emb).expand(len(x), -1)          # one t may be there for all
    r = multiplied(block.conv1, *rounded(block.norm1, block.conv1, last(x)), emb)
    r = multiplied(block.conv2, *rounded(block.norm2, block.conv2, r), last(block.skip(x)))
    return rearrange(r, "B h w C -> B C h w")


@has_kernel("attention", lambda x, m: _takes_block(x, m, (m.norm, m.qkv)))
def attention(x, block):
    x = last(x)
    qkv = multiplied(block.qkv, *rounded(block.norm, block.qkv, x))
    q, k, v = rearrange(qkv, "B h w (three H d) -> three B H (h w) d", three=3, H=block.heads)
    out = rearrange(CHOSEN["attend"](q, k, v), "B H (h w) d -> B h w (H d)", h=x.shape[1])
    out = multiplied(block.proj, *block.proj.activations(out, block.proj.dtype), x)
    return rearrange(out, "B h w C -> B C h w")
