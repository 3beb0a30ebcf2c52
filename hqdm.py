"""HQ-DM in one file: 4-bit weights and 4- or 3-bit activations for diffusion models, with one Hadamard transform.

Mao et al., "HQ-DM: Single Hadamard Transformation-Based Quantization-Aware Training for Low-Bit Diffusion Models",
arXiv 2512.05746. Needs torch and einops alone. Decorators (@kernel ..) change no result, some warn: read past them.

The trouble: a few activation channels are far larger than the rest (outliers). A 3-bit grid wide enough for them has no
levels left for the others. The cure: spread each pixel's channel vector with a Hadamard transform H before rounding and
undo it afterwards (H H = I). The weights are left as they are ("single"). Rotating them too ("double") spares the way
back; the paper finds that it spoils the weights' grid. In our UNet it does not: see notebooks/outliers.ipynb.

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

Both sums are the same integers (R is symmetric), and float32 holds integers below 2^24 exactly. So each layer computes
on the integer grid, in training, too: in floats ("fake-quantized"), or int8. Once frozen, both give the same bits.

What is learned, against the noise that leads to the float model's picture (train.py): LoRA factors A, B, added to each
weight before it is rounded; a scale s_w for each output channel; a scale s_x for each layer and DDIM step t.

    symbol    in the code   shape                      what, where
    x         x             (B, .., C)                 input of a layer; channels last: a row for each pixel or token
    H         hadamard      block-diagonal (C, C)      R / sqrt(k); H H = I
    R         walsh         block-diagonal (C, C)      the same with entries +-1
    k         block         32                         channels that one transform mixes
    s_x(t)    log_s_x       (S,)                       activation scale at each of S DDIM steps, as a logarithm
    z_x(t)    z_x           (S,)                       zero point of activations, only where rotation = "none"
    q_x       q_x           shape of x                 activation integers; with z_x: clamp(round(x / s_x) + z_x) - z_x
    s_w       log_s_w       (C_out, 1)                 weight scale, as a logarithm: positive by construction
    z         z_w           (C_out, 1)                 zero point of weights, an integer in 0 .. 2^b - 1
    q_w       q_w           shape of the weight        weight integers 0 .. 2^b - 1, two 4-bit ones a byte when packed
    A, B      lora_A lora_B (r, C_in, kh, kw), (C_out, r)    W + B A is what gets rounded; B = 0 at the start
    t, S      timesteps     (S,)                       DDIM times with a scale; a sample takes the nearest to its t
"""
import contextlib
import math
import threading
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

try:
    from plumbing.int8 import exact_or_said
    from plumbing.kernels import full_float32, kernel
    from plumbing.kept import kept, kept_while_frozen
except ModuleNotFoundError:                          # this file alone is complete, and slower: none changes a result
    kernel = kept = kept_while_frozen = exact_or_said = lambda definition: definition
    full_float32 = lambda device: torch.autocast(device.type, enabled=False)     # noqa: E731  bf16 keeps no integers
torch.backends.nnpack.set_flags(False)               # on CPUs without oneDNN: Winograd's convolutions keep no integers


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


@kept
def hadamard_matrix(n, device=torch.device("cpu"), dtype=torch.float32):
    """R, (n, n), entries +-1: R R = n I. Sylvester's construction; n a power of two."""
    return _fwht(torch.eye(n, dtype=dtype, device=device))


def check_block(channels, block):
    """Raise ValueError unless `block` is a power of two that divides `channels`; the message names what would do."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"Hadamard block {block} is not a power of two; use 32, 16 or 8")
    if channels % block:
        fits = channels & -channels                  # the largest power of two that divides them
        choice = f"a block of {fits} or less" if fits > 1 else "rotation none"
        raise ValueError(f"{channels} channels are not a multiple of the Hadamard block {block}; use {choice}")


@kernel
def walsh(x, dim=1, block=32, scale=1.0, dtype=None):
    """scale R x: the transform with entries +-1, block by block along `dim`. Integers in, exactly those integers out.

    Any shape. Integers give int32, scaled ones float32, or the `dtype` asked for; float32 may hold integers up to
    2^24 / block. Differentiable. Raises ValueError where check_block does, and where an int32 could not hold R x.
    """
    check_block(x.shape[dim], block)
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, block))       # (.., C / k, k)
    if x.is_floating_point():
        with full_float32(x.device):                             # TF32 or bf16 would move values across grid lines
            y = blocks @ (hadamard_matrix(block, x.device, x.dtype) * scale)     # for k = 32 faster than the recursion
    else:
        if x.dtype in (torch.int32, torch.int64) and int_max(x) * block >= 2**31:
            raise ValueError(f"R x of integers up to {int_max(x):,} could pass int32")
        y = _fwht(blocks.to(torch.int32))                        # not every device multiplies integer matrices
        y = y if scale == 1 else y * scale
    return y.flatten(-2).movedim(-1, dim).to(dtype or y.dtype)


def hadamard(x, dim=1, block=32):
    """H x: orthonormal and block-diagonal along `dim`; its own inverse and its own gradient. Same shape as x.

    Equals fwht on each block. Raises ValueError where check_block does, and TypeError for integers: H x of those is not
    whole, R x is.
    """
    if not x.is_floating_point():
        raise TypeError(f"H x of {x.dtype} would not be integer; use walsh for R x, or x.float()")
    return walsh(x, dim, block, block**-0.5)


# ---------------------------------------------------------------- 2. grids, and rounding with a gradient

class Grid(NamedTuple):
    """The integers low, low + step, .., high."""
    low: int
    high: int
    step: int = 1


ROTATIONS = ("none", "single", "double")         # see HQLayer
GRIDS = ("midtread", "midrise")      # of rotated activations; all else is asymmetric


def make_grid(bits, kind):
    """The Grid that `bits` bits hold, b of them.

    "asymmetric": 0 .. 2^b - 1, to go with a zero point. "midtread", the paper's: -q_max .. q_max with 0 in the middle,
    q_max = 2^(b-1) - 1; one of 2^b codes is left over. "midrise" uses all: odd numbers, of half a level each, and no 0.
    Raises ValueError for another kind.
    """
    most, half = 2**bits - 1, 2 ** (bits - 1) - 1
    grids = {"asymmetric": Grid(0, most), "midtread": Grid(-half, half), "midrise": Grid(-most, most, step=2)}
    if kind not in grids:
        raise ValueError(f"there is no grid {kind!r}; choose {', '.join(GRIDS)}")
    return grids[kind]


def round_ste(x, step=1):
    """Round to the nearest integer, ties to even; step 2: to the nearest odd one. The gradient passes unchanged.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): the true gradient is 0 almost everywhere. In
    floating point, too, x and the difference to it add up to the integer, to the last bit.
    """
    q = x.round() if step == 1 else 2 * (x / 2).floor() + 1
    return x + (q - x).detach() if x.requires_grad else q


def clamp_ste(q, low, high):
    """clamp(q, low, high); q gets the gradient from low to high, both ends included (torch.clamp: up to torch 2.13)."""
    if not q.requires_grad:
        return q.clamp(low, high)
    return torch.where((low <= q) & (q <= high), q, q.detach().clamp(low, high))


def quantize(v, s, z, grid):
    """v -> clamp(round(v / s) + z, low, high) - z: integers, as floats; s times them is v, rounded to the grid.

    Gradients are those of LSQ (Esser et al. 2020, arXiv 1902.08153): v gets the gradient where round(v/s) + z is on the
    grid, none outside; for s * quantize(v, s, ..) the scale gets round(v/s) - v/s on the grid, the end of it, less z,
    outside.
    """
    q = round_ste(v / s, grid.step)
    return clamp_ste(q, grid.low, grid.high) if z is None else clamp_ste(q + z, grid.low, grid.high) - z


@kernel
def rotate_and_quantize(x, s, z, grid, block=1, dtype=torch.float32):
    """quantize(H x, s, z, grid) with H over blocks of the last dimension; block 1: without H.

    x (B, .., C); s and z (B,), a number for each sample; z None: 0. The integers are stored as `dtype`. Differentiable.
    """
    v = hadamard(x, -1, block) if block > 1 else x
    s, z = (a if a is None else a.view(-1, *[1] * (x.ndim - 1)) for a in (s, z))
    return quantize(v, s, z, grid).to(dtype)


# ---------------------------------------------------------------- 3. two quantizers, and the layer that multiplies

class ActivationQuantizer(nn.Module):
    """x (B, .., C) -> q_x, integers of H x on a grid, in x's shape; and s_x (B,), the scale of each sample's step.

    Rotated values spread around 0: a symmetric grid. What SiLU puts out does not: it gets a zero point z_x, learned too
    (the baseline, EfficientDM, He et al. 2024, arXiv 2310.03270). Raises RuntimeError when used before calibrate or
    load_state_dict gave it scales, TypeError when cast to another dtype; ValueError where check_block does.
    """

    def __init__(self, channels, bits, rotation="single", block=32, steps=1, grid="midtread"):
        super().__init__()
        self.channels, self.symmetric, self.calibrated = channels, rotation != "none", False
        self.block = block if self.symmetric else 1
        check_block(channels, self.block)
        self.grid = make_grid(bits, grid if self.symmetric else "asymmetric")
        self.q_max = self.grid.high
        self.log_s_x = nn.Parameter(torch.full((steps,), math.nan))
        if not self.symmetric:
            self.z_x = nn.Parameter(torch.zeros(steps))

    def forward(self, x, dtype=torch.float32):
        s, z = self.of_steps(len(x))
        return rotate_and_quantize(x, s, z, self.grid, self.block, dtype), s

    def of_steps(self, batch):
        """s_x and z_x (None: 0) of the step that each sample is at, (batch,): t is the call's, section 5."""
        check_calibrated(self)
        return tuple(v if v is None else at_step(v, batch) for v in self.scales())

    @kept_while_frozen
    def scales(self):
        """s_x and z_x (None: 0) of all steps, (S,) each. z_x stays on the grid: so does 0.0, and padding is exact."""
        return self.log_s_x.exp(), None if self.symmetric else clamp_ste(round_ste(self.z_x), *self.grid[:2])

    def freeze(self):
        """Nothing is trained any more: buffers instead of parameters, of the same names."""
        for name, p in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, p.detach())


class WeightQuantizer(nn.Module):
    """() -> q_w - z, integers (C_out, C_in, ..) in a float tensor; and s_w (C_out, 1).

    Two lives. In training it holds the float weight, LoRA factors and log-scales; freeze() turns those into packed
    integers. packed=True: born into the second, to be filled by load_state_dict.
    """

    def __init__(self, weight, bits, rotation="single", block=32, rank=32, packed=False):
        super().__init__()
        w, C_out = weight.detach().float().clone(), len(weight)
        self.shape, self.bits, self.grid, self.frozen = w.shape, bits, make_grid(bits, "asymmetric"), False
        if packed:
            self._hold(w.new_zeros(w.shape), w.new_full((C_out, 1), math.nan), w.new_zeros(C_out, 1))
            return
        # Double: the weight lives in the rotated basis from here on, and so do its LoRA factors.
        self.register_buffer("weight", hadamard(w, 1, block) if rotation == "double" else w)
        self.lora_A = nn.Parameter(w.new_empty(rank, *w.shape[1:]))          # for a convolution: rank filters k x k
        self.lora_B = nn.Parameter(w.new_zeros(C_out, rank))                 # and a 1x1; B A = 0: no change yet
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))                # as in LoRA, arXiv 2106.09685
        s, z = search_scale(self.weight.flatten(1), self.grid, p=2.4)
        self.log_s_w = nn.Parameter(s.log())
        self.register_buffer("z_w", z)

    def forward(self):
        if self.frozen:
            q = unpack_weights(self.q_w, self.bits, self.shape).float().flatten(1) - self.z_w
            return q.view(self.shape), self.s_w
        s, w = self.log_s_w.exp(), self.weight.flatten(1) + self.lora_B @ self.lora_A.flatten(1)     # W + B A, a matrix
        q = rotate_and_quantize(w, s.flatten(), self.z_w.flatten(), self.grid)       # without H: block 1
        return q.view(self.shape), s

    @torch.no_grad()
    def freeze(self):
        """Fold LoRA into the weight, round it for good, and keep only packed integers, scales and zero points."""
        if not self.frozen:
            (q, s), z = self(), self.z_w
            del self.weight, self.lora_A, self.lora_B, self.log_s_w, self.z_w
            self._hold((q.flatten(1) + z).view(self.shape), s, z)

    def _hold(self, q_w, s_w, z_w):
        self.frozen = True
        self.register_buffer("q_w", pack_weights(q_w, self.bits))
        self.register_buffer("s_w", s_w)
        self.register_buffer("z_w", z_w.to(torch.uint8))


@kernel
def scale_and_bias(acc, scales):
    """acc (B, .., C_out), scales s_x (B,), s_w and bias (C_out,) -> acc * (s_x s_w) + bias; the bias is not trained."""
    s_x, s_w, bias = scales
    return torch.addcmul(bias, acc, s_x.view(-1, *[1] * (acc.ndim - 1)) * s_w)


class Scheme(NamedTuple):
    """How a layer or a network is quantized."""
    wbits: int = 4                   # 2 to 8
    abits: int = 4
    rotation: str = "single"         # one of ROTATIONS
    block: int = 32                  # channels that one transform mixes, a power of two
    rank: int = 32                   # of the LoRA factors
    timesteps: tuple = (0,)          # DDIM times with an activation scale each; one is enough for a network without t
    grid: str = "midtread"           # of rotated activations, one of GRIDS


class HQLayer(nn.Module):
    """What HQConv2d and HQLinear share: a float layer made over, with its input and its weight on integer grids.

    rotation "single": only the activations are rotated (HQ-DM). "double": the weights too, no way back needed (QuaRot,
    Ashkboos et al. 2024, arXiv 2404.00456). "none": neither. For `integer` and `view` see set_integer.
    Raises ValueError for bits or a rotation that do not exist, a block that does not divide the width, and where a sum
    could pass 2^31.
    """

    def __init__(self, layer, scheme=Scheme(), packed=False):
        super().__init__()
        wbits, abits, rotation, block, rank, timesteps, grid = self.scheme = scheme
        check_scheme(scheme)
        C_out, C_in, *size = layer.weight.shape
        self.activations = ActivationQuantizer(C_in, abits, rotation, block, len(timesteps), grid)
        self.weights = WeightQuantizer(layer.weight, wbits, rotation, block, rank, packed)
        self.register_buffer("bias", torch.zeros(C_out) if layer.bias is None else layer.bias.detach().float().clone())
        self.k = block if rotation == "single" else 1            # 1: no R in the sum; that of double is in the weights
        self.integer, self.view = False, "B"
        self.bound = accumulator_bound(C_in * math.prod(size), self.activations.q_max, 2**wbits - 1, self.k)
        if self.bound >= 2**31:
            raise ValueError(f"sums at W{wbits}A{abits} could reach {self.bound:,}, past int32")
        if packed:
            self.activations.freeze()
        self.to(layer.weight.device)

    def forward(self, x):
        """x (B, .., C_in) -> (B, .., C_out): y = s_x s_w / sqrt(k) * conv(q_x, (q_w - z) R) + bias."""
        with full_float32(x.device):
            q_x, s_x = self.activations(x.float(), self.dtype)               # H x on the grid of this step; its scale
            q_wR, s = self.operand()                                         # (q_w - z) R, integers; s_w / sqrt(k)
            multiply = self.multiply_int if self.integer else self.multiply  # int8 products, or the same as floats
            return multiply(q_x, q_wR, (s_x, s, self.bias))                  # the sum of products; scales; bias

    @property
    def dtype(self):                                 # of q_x
        return narrow(self.activations.q_max) if self.integer else torch.float32

    @kept_while_frozen
    def operand(self):
        """What q_x is multiplied with: (q_w - z) R, without R in view A of integers; and s_w / sqrt(k), (C_out,).

        Integers have the smallest dtype that holds them. Floats are float64 where sums of frozen weights could round in
        float32; in training, float32.
        """
        q_w, s_w = self.weights()
        if q_w.ndim == 4:                                        # laid out as the images are
            q_w = q_w.contiguous(memory_format=torch.channels_last)
        k = 1 if self.integer and self.view == "A" else self.k
        q_w = walsh(q_w, 1, k) if k > 1 else q_w
        if self.integer:                                         # what is trained is not looked at: that takes time
            largest = int_max(q_w) if self.weights.frozen else k * (2**self.scheme.wbits - 1)
            q_w = q_w.detach().to(narrow(largest))
        elif self.weights.frozen:
            (_, z), q_max = self.activations.scales(), self.activations.q_max
            reach = q_max if z is None else torch.maximum(z, q_max - z).max()    # of |q_x|
            largest = q_w.abs().flatten(1).sum(1).max() * reach                  # no sum, whole or partial, is larger
            q_w = q_w.double() if largest >= 2**24 or q_w.abs().max() > 2**11 else q_w       # 11 bits: TF32's
        return q_w, s_w.flatten() / math.sqrt(self.k)

    @exact_or_said
    def multiply(self, q_x, q_w, scales=None):
        """The sums (B, .., C_out), integers in float32; with scales, the layer's output."""
        acc = self.product(q_x.to(q_w.dtype), q_w).float()
        return acc if scales is None else scale_and_bias(acc, scales)

    def multiply_int(self, q_x, q_w, scales=None):
        """The same by integer arithmetic: int32, or the output. In view A it is q_x that R turns, not the weight."""
        if self.view == "A" and self.k > 1:
            q_x = walsh(q_x, -1, self.k, dtype=narrow(self.k * self.activations.q_max))
        return int_product(q_x, q_w, self.stride, self.padding, scales).detach()         # they pass no gradient

    def freeze(self):
        """Round the weights for good and pack them; nothing is trained any more."""
        self.weights.freeze()
        self.activations.freeze()

    @staticmethod
    def channels_last(x):
        """The layer's input as (B, .., C_in)."""
        return x


class HQConv2d(HQLayer):
    """A quantized nn.Conv2d: (B, C_in, h, w) -> (B, C_out, h', w'). Arguments and errors: HQLayer."""

    def __init__(self, layer, *args, **kwargs):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        if not plain or isinstance(layer.padding, str) or len({*layer.stride}) > 1 or len({*layer.padding}) > 1:
            raise ValueError("HQConv2d needs groups 1, dilation 1, and one number each for stride and zero padding")
        self.stride, self.padding = layer.stride[0], layer.padding[0]
        super().__init__(layer, *args, **kwargs)

    @staticmethod
    def channels_last(x):
        return rearrange(x, "B C h w -> B h w C").contiguous()

    def forward(self, x):
        return rearrange(super().forward(self.channels_last(x)), "B h w C -> B C h w")

    def product(self, q_x, q_w):
        acc = F.conv2d(rearrange(q_x, "B h w C -> B C h w"), q_w, stride=self.stride, padding=self.padding)
        return rearrange(acc, "B C h w -> B h w C")


class HQLinear(HQLayer):
    """A quantized nn.Linear: (B, .., C_in) -> (B, .., C_out). Arguments and errors: HQLayer."""

    stride, padding = 1, 0                           # a token is a pixel, the weight a filter of 1 x 1
    product = staticmethod(F.linear)

    def multiply_int(self, q_x, q_w, scales=None):
        tokens = q_x.reshape(len(q_x), math.prod(q_x.shape[1:-1]), 1, q_x.shape[-1])
        return super().multiply_int(tokens, q_w[:, :, None, None], scales).view(*q_x.shape[:-1], len(q_w))


def check_scheme(scheme):
    """ValueError for bits, rotations, grids and timesteps that do not exist, or do not go together."""
    wbits, abits, rotation, block, _, timesteps, grid = scheme
    if rotation not in ROTATIONS or {wbits, abits} - {*range(2, 9)}:
        choice = f"2 to 8 bits and {', '.join(ROTATIONS)}"
        raise ValueError(f"W{wbits}A{abits} {rotation} does not exist; choose {choice}")
    if grid not in GRIDS:
        raise ValueError(f"there is no grid {grid!r}; choose {', '.join(GRIDS)}")
    if rotation != "none":
        check_block(block, block)                    # a power of two
    elif grid != "midtread":
        raise ValueError(f"grid {grid} is for rotated activations; rotation none has an asymmetric one")
    if {type(t) for t in timesteps} != {int} or len(set(timesteps)) < len(timesteps):
        raise ValueError(f"timesteps {timesteps} are not one or more integers, each once")


# ---------------------------------------------------------------- 4. integer arithmetic

def int_conv2d(q_x, q_w, stride=1, padding=0):
    """Exact integer convolution: q_x (B, h, w, C), q_w (C_out, C, kh, kw), integers -> int32 (B, h', w', C_out).

    Zero padding is exact: 0 stands for 0.0, also on mid-rise, which rounds nothing to it. Raises TypeError for floats;
    ValueError for operands that do not fit each other, sums that could pass int32, devices that multiply no integers.
    """
    if q_x.is_floating_point() or q_w.is_floating_point():
        raise TypeError("integer products take integer tensors, and one of these is float")
    if q_x.shape[-1] != q_w.shape[1]:
        raise ValueError(f"q_x has {q_x.shape[-1]} channels, q_w {q_w.shape[1]}")
    if min(q_x.shape[1] - q_w.shape[2], q_x.shape[2] - q_w.shape[3]) + 2 * padding < 0:
        raise ValueError(f"a filter {(*q_w.shape[2:],)} is larger than the picture {(*q_x.shape[1:3],)}")
    x_max, w_max = int_max(q_x), int_max(q_w)
    if (largest := x_max * w_max * q_w[0].numel()) >= 2**31:
        raise ValueError(f"sums could reach {largest:,}, past int32")
    return int_product(q_x.to(narrow(x_max)), q_w.to(narrow(w_max)), stride, padding)


def int_max(q):
    """The largest |q|, a Python integer (int16 has no 32768)."""
    return max(-int(q.min()), int(q.max())) if q.numel() else 0


@kernel
def int_product(q_x, q_w, stride=1, padding=0, scales=None):
    """int_conv2d unchecked; with scales, scale_and_bias of the sums. ValueError where a device has no integers."""
    if q_x.device.type != "cpu":
        raise ValueError(f"integers run on the cpu, and on cuda with plumbing/kernels.py; not on {q_x.device.type}")
    (kh, kw), q_x = q_w.shape[2:], F.pad(q_x.to(torch.int32), (0, 0) + (padding,) * 4)
    h, w, acc = (q_x.shape[1] - kh) // stride + 1, (q_x.shape[2] - kw) // stride + 1, 0
    for i in range(kh):
        for j in range(kw):                                      # one matrix product for each tap of the filter
            patch = q_x[:, i:i + stride * h:stride, j:j + stride * w:stride]             # (B, h', w', C)
            acc = acc + patch @ q_w[:, :, i, j].T.to(torch.int32)
    return acc if scales is None else scale_and_bias(acc.float(), scales)


def accumulator_bound(taps, q_x_max, q_w_max, block=1):
    """The largest |sum| that a layer with `taps` products an output can reach, in any order of summation.

    Cauchy-Schwarz: |sum (q_w - z) (R q_x)| <= |q_w - z| |R q_x| <= sqrt(taps) q_w_max sqrt(block taps) q_x_max, because
    R stretches a vector by exactly sqrt(block). block = 1 without rotation. Both views, and every partial sum.
    """
    return math.ceil(taps * math.sqrt(block) * q_x_max * q_w_max)


def narrow(largest):
    """A dtype for integers -largest .. largest: int8; int16 below 2^14, two int8 digits of 7 bits; else int32."""
    return torch.int8 if largest < 2**7 else torch.int16 if largest < 2**14 else torch.int32


def pack_weights(q, bits):
    """Integers 0 .. 2^bits - 1, any shape -> uint8 (bytes,): two a byte up to 4 bits (low half first), else one.

    Raises ValueError for other numbers than those, and for more than 8 bits.
    """
    if bits > 8 or not ((q >= 0) & (q < 2**bits) & (q == q.round())).all():
        raise ValueError(f"{bits} bits (8 at most) pack the integers 0 .. {2**bits - 1}, and some of these are others")
    q = q.flatten().to(torch.uint8)
    if bits > 4:
        return q
    q = F.pad(q, (0, len(q) % 2))
    return q[0::2] + 16 * q[1::2]


def unpack_weights(packed, bits, shape):
    """The inverse of pack_weights: uint8 tensor of the given shape."""
    if bits <= 4:
        packed = torch.stack([packed % 16, packed // 16], dim=1).flatten()
    return packed[:math.prod(shape)].view(shape)


# ---------------------------------------------------------------- 5. which DDIM step is it?

class _Calls(threading.local):
    steps = ()                       # (whose, one-hot matrix) of each call that this thread is in, innermost last


_calls = _Calls()


@contextlib.contextmanager
def at(t, timesteps):
    """Inside, layers take for each sample the scale of that one of `timesteps` (S,) which is nearest to its t (B,).

    A quantized network does the same around every forward, by hooks. The step belongs to that call and its thread, and
    ends with it: two threads that draw from one model do not meet; a layer called on its own, or computed once more in
    a backward pass (torch.utils.checkpoint), gets an error rather than the scale of some other call.
    """
    before = _calls.steps
    _calls.steps = (*before, (None, one_hot(t, timesteps)))
    try:
        yield
    finally:
        _calls.steps = before


def _enter(network, args, kwargs):                   # a network's hooks: the same around each forward
    _calls.steps += ((network, one_hot(time_of(args, kwargs), network.hqdm_timesteps)),)


def _leave(network, *_):                             # comes after an error, too, even of a hook that was before _enter
    if _calls.steps and _calls.steps[-1][0] is network:
        _calls.steps = _calls.steps[:-1]


def _keep_nan(network, args, kwargs, y):
    """A network's hook: integers have no NaN and no infinity, so a sample that came with one gets NaN here.

    One that arises between two layers becomes a number there. Outputs other than a tensor stay as they are.
    """
    if torch.is_tensor(y) and y.is_floating_point() and y.ndim > 0:
        for x in (*args, *kwargs.values()):
            if torch.is_tensor(x) and x.is_floating_point() and x.ndim > 1 and len(x) == len(y):
                y = torch.where(x.isfinite().flatten(1).all(1).view(-1, *[1] * (y.ndim - 1)), y, math.nan)
    return y


def time_of(args, kwargs={}):
    """The t of a call network(x, t, ..): the input named t, or else the second. TypeError without it."""
    t = kwargs.get("t", args[1] if len(args) > 1 else None)
    if t is None:
        raise TypeError("a network with scales for several timesteps takes t: call network(x, t, ..)")
    return t


def one_hot(t, timesteps):
    """t (B,) or one number -> (B, S): a 1 at the nearest of timesteps (S,), zeros elsewhere."""
    timesteps = torch.as_tensor(timesteps)
    distance = (torch.as_tensor(t, device=timesteps.device).reshape(-1, 1) - timesteps).abs()
    return F.one_hot(distance.argmin(dim=1), len(timesteps)).float()


def at_step(values, batch):
    """values (S,) -> (batch,): the one of each sample's step, as a product with a one-hot matrix: its gradient is, too.

    Raises RuntimeError where there are several and nobody said which, or said it for other samples.
    """
    if len(values) == 1:
        return values.expand(batch)
    if not _calls.steps:
        raise RuntimeError("which DDIM step is this? call the layer through its network (torch.compile does not see "
                           "which that is), or in hqdm.at(t, timesteps)")
    steps = _calls.steps[-1][1].to(values.device)    # (B, S)
    if len(steps) not in (1, batch) or steps.shape[1] != len(values):
        raise RuntimeError(f"t has {len(steps)} samples, {steps.shape[1]} steps; this layer {batch} and {len(values)}")
    return (steps @ values).expand(batch)


# ---------------------------------------------------------------- 6. where the scales come from

def search_scale(v, grid, p, ends=False, span=None):
    """Rows of v (R, n) -> scale s (R, 1) and zero point z (R, 1), by trying 80 shrinks of each row's (min, max).

    Kept is the shrink with the least sum |v - v_hat|^p: p = 2.4 for weights (the authors' code), 2 for activations.
    span (lo, hi), (R, 1) each: the range to shrink, where v is only a sample. ends: shrink each end alone, too, for
    asymmetric grids. Shrunk together they never change z. Values out of a SiLU lie between -0.28 and 5, say: at 3 bits
    that is z = 0, and all that is negative is lost. With the lower end kept, the upper one can come down until z = 1.
    """
    few = max(1, 2**21 // (80 * v.shape[1]))                                 # rows at a time, for a CPU's speed
    if v.device.type == "cpu" and len(v) > few and span is None:
        return tuple(map(torch.cat, zip(*[search_scale(rows, grid, p, ends) for rows in v.split(few)])))
    lo, hi = span or (v.amin(1, keepdim=True), v.amax(1, keepdim=True))
    (q_min, q_max, _), lo, hi = grid, lo.clamp(max=0), hi.clamp(min=0)          # 0 stays on the grid: padding is exact
    shrink = 1 - torch.arange(80, device=v.device, dtype=v.dtype).view(-1, 1, 1) / 80
    both, lo_only, hi_only = (lo * shrink, hi * shrink), (lo * shrink, hi + 0 * shrink), (lo + 0 * shrink, hi * shrink)
    lo, hi = map(torch.cat, zip(both, lo_only, hi_only)) if ends else both      # (80 or 240, R, 1): all candidates
    s = (hi - lo) / (q_max - q_min) if q_min == 0 else torch.maximum(-lo, hi) / q_max
    s = s.clamp(min=1e-8)                                                    # a row of zeros: any scale
    z = (-lo / s).round().clamp(q_min, q_max) if q_min == 0 else torch.zeros_like(s)
    error = (v - s * quantize(v, s, z, grid)).abs().pow(p).sum(2, keepdim=True)
    best = error.argmin(0, keepdim=True)
    return s.gather(0, best)[0], z.gather(0, best)[0]


@torch.no_grad()
def fit_scale(quantizer, x, step=0, samples=8192):
    """Set one step's scale (and zero point) of an ActivationQuantizer by least squared error on its input x (B, .., C).

    The range is that of all values of H x; the error is that of `samples` of them, drawn at random, always the same.
    Raises ValueError where x is not finite, or has other channels than the quantizer.
    """
    if x.shape[-1] != quantizer.channels:
        raise ValueError(f"no scale fits x {(*x.shape,)}: it must end in {quantizer.channels} channels")
    v = hadamard(x.float(), -1, quantizer.block).flatten()
    lo, hi = v.amin().view(1, 1), v.amax().view(1, 1)
    if not (hi - lo).isfinite():
        raise ValueError("no scale fits an activation that is not finite")
    drawn = torch.randint(len(v), (samples,), generator=torch.Generator().manual_seed(0)).to(v.device)
    s, z = search_scale(v[drawn][None], quantizer.grid, p=2, ends=not quantizer.symmetric, span=(lo, hi))
    if not (lo.any() or hi.any()):                   # of zeros alone: s_x = 1 will do, but for a grid that has no 0
        s = torch.ones_like(s) if quantizer.grid.step == 1 else s
    quantizer.log_s_x[step] = s[0, 0].log()
    if not quantizer.symmetric:
        quantizer.z_x[step] = z[0, 0]


def check_calibrated(quantizer):
    """RuntimeError while a step of an ActivationQuantizer has no scale; to look means to wait for the device, once.

    TypeError where the network was cast: scales of half precision would be other scales, sums no integers.
    """
    if quantizer.log_s_x.dtype != torch.float32:
        raise TypeError(f"quantized layers compute in float32, not {quantizer.log_s_x.dtype} (inputs may have any): "
                        "call network.float(), and load the state_dict again, for its scales were rounded")
    quantizer.calibrated = quantizer.calibrated or bool(quantizer.log_s_x.detach().isfinite().all())
    if not quantizer.calibrated:
        raise RuntimeError("activation scales are missing: calibrate the network first, or load a state_dict")


@torch.no_grad()
def calibrate(student, teacher, batches):
    """Set all activation scales and zero points from the float model's own activations, by least squared error.

    student: quantize_network of a copy of teacher. batches: one for each of the scheme's timesteps, a tuple of the
    network's inputs, (x_t, t, y) for our UNet, with that t for all samples. Raises ValueError for other batches, and
    for a layer that a call uses twice.
    """
    times, twins = student.hqdm.timesteps, dict(teacher.named_modules())
    left, seen = list(times), set()                              # steps still to come; layers met in this call

    def look_at(name, layer):
        def look(_, args):
            if name in seen:
                raise ValueError(f"{name} is used twice in a call, and has one scale; leave it in float: skip={[name]}")
            seen.add(name)
            fit_scale(layer.activations, layer.channels_last(args[0]), step)
        return look
    hooks = [twins[name].register_forward_pre_hook(look_at(name, layer)) for name, layer in student.named_modules()
             if isinstance(layer, HQLayer)]
    try:
        for batch in batches:
            t = torch.as_tensor(time_of(batch)).unique().tolist() if len(times) > 1 else left[:1]
            if len(t) != 1 or t[0] not in left:
                raise ValueError("calibrate takes one batch for each of the timesteps, with that t for all samples")
            left.remove(t[0])
            step = times.index(t[0])
            seen.clear()
            teacher(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    if left:
        raise ValueError(f"no batch to calibrate t = {', '.join(map(str, left))}")


# ---------------------------------------------------------------- 7. a whole network

# First and last layers and the resampling and skip convolutions get 8 bits: few bytes, and all later layers see
# their error. On an 8-bit grid outliers do no harm, so none of them is rotated.
EIGHT_BITS = {"time_mlp": "first layers (time)", "skip": "skip convolution", "resample": "resampling convolution"}
MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def quantize_network(network, scheme=Scheme(), eight_bits=None, skip=(), packed=False):
    """Replace the nn.Conv2d and nn.Linear of a network by quantized ones, in place; return the report, a dict a module.

    network: forward(x), or forward(x, t, ..) with t (B,) second; each sample takes the scales of the timestep nearest
    to its t. eight_bits: layers that get 8 bits and no rotation (first_and_last); skip: modules that stay in float: for
    both see chooser. packed: ready for load_state_dict of frozen integers. Raises ValueError, naming module and remedy,
    where something has no quantized form; the network is then as it was. Only the new layers are trained after it.
    """
    if layers(network):
        raise ValueError("this network, or a part of it, is quantized already; start from the float one")
    check_scheme(scheme)
    eight, rows, made = first_and_last(network) if eight_bits is None else eight_bits, [], {}
    in_float, at_8_bits = chooser(network, skip), chooser(network, eight)
    for name, module in network.named_modules():
        skipped, at_8 = in_float(name, module), at_8_bits(name, module)
        replaced = isinstance(module, MATRICES) and not skipped
        size = 4 * sum(p.numel() for p in module.parameters(recurse=replaced))           # a weight norm's, too
        if replaced:
            own = scheme._replace(wbits=8, abits=8, rotation="none", grid="midtread") if at_8 else scheme
            try:
                made[name] = quantized_layer(network, name, own, packed)
                twin = made[name] if packed else quantized_layer(network, name, own, packed=True)    # its size
            except ValueError as e:
                remedy = f"or leave it in float: quantize_network(.., skip={[name]})"
                raise ValueError(f"{name or 'the network'}: {e}; {remedy}") from None
            note = f"{'asked for' if eight_bits else eight[name]}: 8 bits, not rotated" if at_8 else ""
            packed_bytes = sum(v.nbytes for v in twin.state_dict().values())
            grid, k = own.grid if own.rotation != "none" else "asymmetric", twin.activations.block
            rows.append((name, type(module).__name__, *own[:3], grid, k, note, twin.bound, size, packed_bytes))
        elif size and not any(name.startswith(f"{layer}.") for layer in made):
            why = "skip asked for it" if skipped else "a table" if isinstance(module, nn.Embedding) else "no matrix"
            rows.append((name, type(module).__name__, 32, 32, "none", "none", 1, f"float: {why}", 0, size, size))
    if not made:
        raise ValueError("this network has no nn.Conv2d or nn.Linear to quantize")
    network.requires_grad_(False)
    for name, layer in made.items():                 # only now: a refusal above leaves the network as it was
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.requires_grad_(not packed))
    network.hqdm = scheme
    meanings, device = [meaning(m) for m in layers(network)], layer.bias.device
    network.register_buffer("hqdm_timesteps", torch.tensor(scheme.timesteps, device=device))
    network.register_buffer("hqdm_layers", torch.tensor(meanings, device=device))
    network._register_load_state_dict_pre_hook(_check_meaning, with_module=True)
    network.register_forward_hook(_keep_nan, with_kwargs=True)
    if len(scheme.timesteps) > 1:
        network.register_forward_pre_hook(_enter, with_kwargs=True)
        network.register_forward_hook(_leave, always_call=True)
    columns = "layer kind wbits abits rotation grid block note accumulator_bound float_bytes bytes".split()
    return [dict(zip(columns, row)) for row in rows]


def meaning(layer):
    """What a quantized layer's tensors mean, as integers that travel with them."""
    wbits, abits, rotation, _, _, _, grid = layer.scheme
    return wbits, abits, ROTATIONS.index(rotation), GRIDS.index(grid), layer.activations.block


def _check_meaning(network, state_dict, prefix, *_):
    """Before tensors are loaded: ValueError where they were made with another scheme and mean something else."""
    times, rows = ([v.tolist() for v in (state_dict.get(f"{prefix}{name}", mine), mine)] for name, mine in (
        ("hqdm_timesteps", network.hqdm_timesteps), ("hqdm_layers", network.hqdm_layers)))
    names = [name for name, m in network.named_modules() if isinstance(m, HQLayer)]
    words = [[f"{name} W{w}A{a} {ROTATIONS[r]} {GRIDS[g]}, block {k}" for name, (w, a, r, g, k) in zip(names, each)]
             for each in rows]
    differ = [pair for pair in zip(*words) if pair[0] != pair[1]]
    for theirs, mine in [*differ, [f"{len(each)} layers" for each in rows], [f"timesteps {each}" for each in times]]:
        if theirs != mine:
            raise ValueError(f"these tensors have {theirs}; this network has {mine}")


def quantized_layer(network, name, scheme, packed):
    """The quantized form of a network's layer; ValueError where it could not take the layer's place."""
    layer = network.get_submodule(name)
    plain = type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward) and "forward" not in vars(layer)
    if not plain or getattr(type(layer), "_conv_forward", nn.Conv2d._conv_forward) is not nn.Conv2d._conv_forward:
        raise ValueError(f"a {type(layer).__name__} has no quantized form, only nn.Conv2d and nn.Linear have")
    if not name:
        raise ValueError("a lone layer cannot be replaced in place; put it into an nn.Sequential")
    if len(names := [n for n, p in network.named_parameters(remove_duplicate=False) if p is layer.weight]) > 1:
        raise ValueError(f"its weight has several names: {', '.join(names)}")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError("it has forward hooks, which would be lost")
    return (HQConv2d if isinstance(layer, nn.Conv2d) else HQLinear)(layer, scheme, packed)


def first_and_last(network):
    """{name: why} of the layers at 8 bits by default: the first of each kind, the last, and EIGHT_BITS by name."""
    found = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    convs, linears = ([n for n, m in found.items() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear))
    return {**{n: "last layer" for n in list(found)[-1:]},
            **{n: "first of its kind" for n in convs[:1] + linears[:1]},
            **{n: why for n in found for part, why in EIGHT_BITS.items() if part in n.split(".")}}


def chooser(network, which):
    """A function (name, module) -> bool, or names of modules, for those and all in them, as a function.

    ValueError for a name that no module has.
    """
    if callable(which):
        return which
    which, names = [which] if isinstance(which, str) else [*which], [name for name, _ in network.named_modules()]
    if unknown := [part for part in which if part not in names]:
        raise ValueError(f"no module is called {unknown[0]!r}; choose from {', '.join(filter(None, names))}")
    return lambda name, _: any(f"{name}.".startswith(f"{part}.") for part in which)


def layers(model):
    """The quantized layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, HQLayer)]


def freeze(model):
    """End of training: fold LoRA in, round the weights for good and pack them, in every layer."""
    for layer in layers(model):
        layer.freeze()


def set_integer(model, on=True, view="B"):
    """All quantized layers compute in integers, or not, in view A or B: once frozen, to the same bits.

    Raises ValueError for another view, and for a float model.
    """
    if view not in ("A", "B") or (on and not layers(model)):
        raise ValueError(f"integers need a quantized model and view A or B, not a float one or view {view!r}")
    for layer in layers(model):
        layer.integer, layer.view = on, view
