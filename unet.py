"""The float model: a class-conditional UNet that predicts noise, and the diffusion process around it.

Nothing here knows of quantization; hqdm.py swaps the layers of this network by name afterwards.

    x_t   = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        the noising of an image, DDPM eq. 4
    loss  = mean w_t (eps_theta(x_t, t, y) - eps)^2        what the network learns, DDPM eq. 14; w_t: see ddpm_loss
    x_0~  = (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t)          the image it believes in at step t
    x_s   = sqrt(abar_s) x_0~ + sqrt(1 - abar_s) eps_theta             the step from t down to s, DDIM eq. 12

DDPM: Ho et al. 2020, arXiv 2006.11239. DDIM: Song et al. 2021, arXiv 2010.02502.

    symbol     in the code     shape         what
    x_t        x               (B, 3, h, w)  a noisy image; images live in [-1, 1]
    t          t               (B,)          diffusion time, an integer in 0 .. T-1 (0 is almost clean)
    y          y               (B,)          class label; index `classes` (the last one) means "none"
    eps        eps             (B, 3, h, w)  noise
    abar_t     alpha_bar[t]    (T,)          how much of the image is left, 1 -> 0
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

import plumbing.blocks  # noqa: F401  the kernels of group_norm, residual, attend and attention
from plumbing.kernels import kernel
from plumbing.kept import kept

T = 1000                # diffusion times that the network was trained on (DDPM section 4)
GROUPS = 32             # groups of every GroupNorm: 2 to 8 channels each at our widths


# ---------------------------------------------------------------- the network

def time_embedding(t, width):
    """(B,) integer times -> (B, width) sines and cosines of geometrically spaced frequencies (DDPM appendix B)."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * freqs                                  # (B, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                # (B, width)


@kernel
def group_norm(x, groups, weight, bias, eps, silu=False):
    """F.group_norm of (B, C, h, w), for channels_last: mean and variance of a group come from those of its channels.

    silu: F.silu of it, because a GPU does both in one pass.
    """
    var_c, mean_c = torch.var_mean(x.float(), dim=(2, 3), correction=0)                  # (B, C)
    var_c, mean_c = (rearrange(v, "B (G c) -> B G c", G=groups) for v in (var_c, mean_c))
    mean = mean_c.mean(dim=2, keepdim=True)                                              # (B, G, 1)
    var = (var_c + (mean_c - mean) ** 2).mean(dim=2, keepdim=True)                       # within channels and between
    scale = rearrange((var + eps).rsqrt().expand_as(var_c), "B G c -> B (G c)") * weight
    shift = bias - rearrange(mean.expand_as(var_c), "B G c -> B (G c)") * scale
    y = torch.addcmul(rearrange(shift, "B C -> B C 1 1"), x, rearrange(scale, "B C -> B C 1 1"))
    return F.silu(y) if silu else y


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm; then SiLU, if asked for. On CUDA PyTorch's own reads NCHW alone, and ours are channels_last."""

    def __init__(self, channels, silu=False):
        super().__init__(GROUPS, channels)
        self.silu = silu

    def forward(self, x):
        if x.is_cuda:
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)
        y = super().forward(x)
        return F.silu(y) if self.silu else y


class ResBlock(nn.Module):
    """(B, c_in, h, w), (B, c_emb) -> (B, c_out, h, w): two 3x3 convolutions with the embedding added between."""

    def __init__(self, c_in, c_out, c_emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(c_in, silu=True), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2, self.conv2 = GroupNorm(c_out, silu=True), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        # The shortcut is a plain wire unless the width changes.
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)            # each block starts near the identity: deep nets train from step 1

    def forward(self, x, emb):
        return residual(x, self, emb)


@kernel
def residual(x, block, emb):
    """What a ResBlock computes."""
    r = block.conv1(block.norm1(x))                                      # (B, c_out, h, w)
    r = r + rearrange(block.emb(emb), "B C -> B C 1 1")                  # one number a channel tells time and class
    r = block.conv2(block.dropout(block.norm2(r)))
    return block.skip(x) + r


class Attention(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): every pixel looks at every other. Heads of 32 channels."""

    def __init__(self, channels, head=32):
        super().__init__()
        self.heads = channels // head
        self.norm = GroupNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)             # identity at the start, as in ResBlock

    def forward(self, x):
        return attention(x, self)


@kernel
def attend(q, k, v):
    """(B, H, n, d) each -> (B, H, n, d): softmax(q k^T / sqrt(d)) v."""
    return F.scaled_dot_product_attention(q, k, v)


@kernel
def attention(x, block):
    """What Attention computes."""
    tokens = rearrange(block.norm(x), "B C h w -> B (h w) C")
    q, k, v = rearrange(block.qkv(tokens), "B n (three H d) -> three B H n d", three=3, H=block.heads)
    out = attend(q, k, v)                                                # (B, H, n, d)
    out = block.proj(rearrange(out, "B H n d -> B n (H d)"))
    return x + rearrange(out, "B (h w) C -> B C h w", h=x.shape[2])


class UNet(nn.Module):
    """eps_theta(x_t, t, y): the noise in an image, DDPM's UNet at a quarter of its size (9 M parameters).

    x (B, 3, size, size) float, t (B,) int, y (B,) int or None -> (B, 3, size, size).
    Every inner width is a multiple of 32, the default Hadamard block. Dropout, which DDPM's larger network needs, did
    not help this one in short runs; the bundled teacher had 0.05 in a long one (experiments/README.md).
    Raises ValueError where a width is not a multiple of 32, or the sides do not halve evenly, and for absurd sizes.
    """

    def __init__(self, channels=64, mults=(1, 2, 2, 2), blocks=2, attention=(16,), classes=10, dropout=0.0, size=32):
        super().__init__()
        if channels % GROUPS:
            raise ValueError(f"channels = {channels} is not a multiple of {GROUPS}, the number of GroupNorm groups")
        if size < 1 or size % 2 ** max(0, len(mults) - 1):
            raise ValueError(f"size = {size} does not halve evenly {len(mults) - 1} times, once between two levels")
        if not (1 <= len(mults) * blocks <= 100):
            raise ValueError(f"{len(mults)} levels of {blocks} blocks are not from 1 to 100 blocks")
        # Saved in every checkpoint, so that loading needs no flags.
        self.config = dict(channels=channels, mults=tuple(mults), blocks=blocks, attention=tuple(attention),
                           classes=classes, dropout=dropout, size=size)
        self.classes, c_emb = classes, 4 * channels
        self.time_mlp = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.class_emb = nn.Embedding(classes + 1, c_emb)                # the last row is "none"
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)

        # Down: `blocks` ResBlocks a level, then halve the picture. `widths` remembers what each stored tensor has.
        self.down, c, widths, side = nn.ModuleList(), channels, [channels], size
        for level, mult in enumerate(mults):
            last, rows = level == len(mults) - 1, nn.ModuleList()
            for _ in range(blocks):
                rows.append(self._row(c, channels * mult, c_emb, dropout, side in attention))
                c = channels * mult
                widths.append(c)
            self.down.append(nn.ModuleDict({"rows": rows}))
            if not last:
                self.down[-1]["resample"] = nn.Conv2d(c, c, 3, stride=2, padding=1)
                widths.append(c)
                side //= 2

        self.mid1, self.mid_attn = ResBlock(c, c, c_emb, dropout), Attention(c)
        self.mid2 = ResBlock(c, c, c_emb, dropout)

        # Up: one ResBlock more a level than down, because each takes one stored tensor from the way down.
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            rows = nn.ModuleList()
            for _ in range(blocks + 1):
                rows.append(self._row(c + widths.pop(), channels * mult, c_emb, dropout, side in attention))
                c = channels * mult
            self.up.append(nn.ModuleDict({"rows": rows}))
            if level > 0:
                self.up[-1]["resample"] = nn.Conv2d(c, c, 3, padding=1)  # after a nearest-neighbour doubling
                side *= 2

        self.norm_out, self.conv_out = GroupNorm(c, silu=True), nn.Conv2d(c, 3, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    @staticmethod
    def _row(c_in, c_out, c_emb, dropout, attend):
        row = nn.ModuleDict({"res": ResBlock(c_in, c_out, c_emb, dropout)})
        if attend:
            row["attn"] = Attention(c_out)
        return row

    def forward(self, x, t, y=None):
        if y is None:
            y = torch.full_like(t, self.classes)                         # "none": draw without a class
        emb = self.time_mlp(time_embedding(t, self.config["channels"])) + self.class_emb(y)
        emb = F.silu(emb)                                                # (B, c_emb), read by every ResBlock

        x = self.conv_in(x)
        stored = [x]
        for level in self.down:
            for row in level["rows"]:
                x = self._run(row, x, emb)
                stored.append(x)
            if "resample" in level:
                x = level["resample"](x)                                 # (B, C, h/2, w/2)
                stored.append(x)

        x = self.mid2(self.mid_attn(self.mid1(x, emb)), emb)

        for level in self.up:
            for row in level["rows"]:
                x = self._run(row, torch.cat([x, stored.pop()], dim=1), emb)
            if "resample" in level:
                # Each pixel four times. F.interpolate does the same; its gradient is a scatter, and slow when compiled.
                x = level["resample"](rearrange(repeat(x, "B C h w -> B (h 2) (w 2) C"), "B h w C -> B C h w"))
        return self.conv_out(self.norm_out(x))

    @staticmethod
    def _run(row, x, emb):
        x = row["res"](x, emb)
        return row["attn"](x) if "attn" in row else x


# ---------------------------------------------------------------- the diffusion

@kept                                                # one copy a device: moving it at each call would stall the GPU
def alpha_bars(device="cpu"):
    """(T,) float32: prod_{i <= t} (1 - beta_i), taken in float64, with DDPM's linear betas 1e-4 .. 0.02."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).float().to(device)


def add_noise(x_0, t, eps):
    """x_0, eps (B, 3, h, w), t (B,) -> x_t (B, 3, h, w). DDPM eq. 4."""
    abar = rearrange(alpha_bars(x_0.device)[t], "B -> B 1 1 1")
    return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps


def ddpm_loss(model, x_0, y, classes, drop=0.1, rows=slice(None), gamma=5.0):
    """Scalar: squared error of the predicted noise at random times (DDPM eq. 14), mean of all samples.

    Nearly clean samples count less: weight min(snr, gamma) / snr with snr = abar / (1 - abar) (min-SNR, Hang et al.
    2023, arXiv 2303.09556). gamma = inf is DDPM's plain mean; experiments/options.json compares.
    x_0 (B, 3, h, w) in [-1, 1], y (B,). A share `drop` of the labels becomes "none", so that one network learns
    both the conditional and the unconditional noise (classifier-free guidance, Ho & Salimans 2022, arXiv 2207.12598).
    rows: the samples to compute; times and noise are drawn for all, so that several processes can share one batch.
    """
    B = len(x_0)
    t = torch.randint(T, (B,), device=x_0.device)
    eps = torch.randn_like(x_0)
    y = torch.where(torch.rand(B, device=x_0.device) < drop, classes, y)
    x_0, t, eps, y = (v[rows] for v in (x_0, t, eps, y))
    abar = alpha_bars(x_0.device)[t]
    error = (model(add_noise(x_0, t, eps), t, y).float() - eps).square().mean(dim=(1, 2, 3))              # (B,)
    return (error * (gamma * (1 - abar) / abar).clamp(max=1)).mean()


def ddim_timesteps(steps):
    """(steps,) integer times from T-1 down to 0, evenly spaced. Raises ValueError outside 1 .. T."""
    if not 1 <= steps <= T:
        raise ValueError(f"DDIM steps = {steps} is outside 1 .. {T}")
    return torch.linspace(T - 1, 0, steps).round().long() if steps > 1 else torch.tensor([T - 1])


def ddim_step(x, eps, a_t, a_s, sigma=0.0):
    """x_t and the noise in it -> (x_s, x_0~): DDIM eq. 12 from t down to s, without its random part.

    a_t, a_s: abar at t and s (1: the picture itself), numbers or tensors (B, 1, 1, 1).
    """
    # Not clamped to [-1, 1], as many samplers do: at t near T an error of eps is 1/sqrt(abar) = 157 times as large in
    # x_0~, as noise of mean 0, and clamped noise is grey (experiments/README.md). eq. 12 takes most of it back.
    x_0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    return a_s**0.5 * x_0 + (1 - a_s - sigma**2) ** 0.5 * eps, x_0


@torch.no_grad()
def ddim(model, x, y=None, steps=50, guidance=1.0, eta=0.0, generator=None):
    """Draw images, one step at a time: a generator that yields (t, x_t, eps, x_0~) at every step, DDIM eq. 12.

    model(x, t, y) -> eps; x (B, 3, h, w) is standard normal noise; y (B,) labels or None.
    guidance: 1 plain, above 1 eps_none + guidance (eps_y - eps_none), which costs two evaluations a step.
    eta: 0 is deterministic DDIM, 1 adds DDPM's noise back (DDIM eq. 16), taken from `generator` (on x's device).
    t is yielded as a Python integer. The x_0~ of the last yield is the picture, of pixels about -1 to 1:

        for t, x_t, eps, x_0 in ddim(model, torch.randn(4, 3, 32, 32)): pass
    """
    times = ddim_timesteps(steps).tolist()
    abar = alpha_bars().tolist()                     # Python floats: nothing to move to the device, nothing to wait for
    if y is None:
        y = torch.full((len(x),), model.classes, device=x.device)
    for t, s in zip(times, times[1:] + [None]):
        tt = torch.full((len(x),), t, device=x.device)
        if guidance == 1.0:
            eps = model(x, tt, y)
        else:
            # Two evaluations of batch B rather than one of 2B: the same sums for every batch size.
            none = model(x, tt, torch.full_like(y, model.classes))
            eps = none + guidance * (model(x, tt, y) - none)
        a_t, a_s = abar[t], 1.0 if s is None else abar[s]
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        x_s, x_0 = ddim_step(x, eps, a_t, a_s, sigma)
        yield t, x, eps, x_0
        x = x_s + sigma * torch.randn(x.shape, generator=generator, device=x.device) if sigma > 0 else x_s
