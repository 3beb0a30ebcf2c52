"""The float network and the diffusion around it."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import DEVICES
from torch.testing import assert_close

import unet as U


def test_size_and_widths():
    """About 9 M parameters; every inner width is a multiple of 32, so that the default block fits all layers."""
    unet = U.UNet()
    assert 8.5e6 < sum(p.numel() for p in unet.parameters()) < 9.5e6
    layers = [(name, m) for name, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) > 81 and all(m.weight.shape[1] % 32 == 0 for name, m in layers if name != "conv_in")
    for wrong, message in ((dict(channels=48), "channels = 48 is not a multiple of 32"), (dict(size=30), "size = 30 .* 3 times"),
                           (dict(size=6, mults=(1, 1, 1)), "size = 6 .* 2 times"), (dict(size=0), "size = 0"),
                           (dict(blocks=0), "0 blocks"), (dict(mults=()), "blocks")):
        with pytest.raises(ValueError, match=message):
            U.UNet(**wrong)
    for size, mults in ((12, (1, 1, 1)), (1, (1,)), (8, (1, 1, 1, 1))):      # as small as they can be
        assert U.UNet(channels=32, mults=mults, blocks=1, attention=(), size=size).config["size"] == size
    assert sum(isinstance(m, U.Attention) for m in unet.modules()) == 2 + 1 + 3              # down, middle, up, at 16 x 16


def test_shapes_and_labels(unet):
    """Output has the input's shape; y = None means "none", the last row of the class table; labels and t matter."""
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    none = unet(x, t)
    assert none.shape == x.shape and torch.equal(none, unet(x, t, torch.tensor([10, 10])))
    assert not torch.equal(none, unet(x, t, torch.tensor([1, 2])))
    assert not torch.allclose(none[1], unet(x, torch.tensor([3, 200]))[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_norm_is_pytorchs(offset, silu, device):
    """Values and gradients of F.group_norm in float64, also where the mean is far larger than the spread."""
    torch.manual_seed(0)
    C, H, W = 96, 13, 6                              # groups of 3, more channels and pixels than one program does, not twice
    norm = U.GroupNorm(C, silu).to(device)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, C, H, W, device=device) + offset
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    g, x64 = torch.randn(3, C, H, W, device=device), x.detach().double().requires_grad_()
    exact = nn.functional.group_norm(x64, 32, norm.weight.double(), norm.bias.double(), norm.eps)
    exact = nn.functional.silu(exact) if silu else exact
    oracle = torch.autograd.grad(exact, (x64, norm.weight, norm.bias), g.double())
    arguments = x, 32, norm.weight, norm.bias, norm.eps, silu
    # PyTorch's own on a CPU errs by 6e-3 where the mean is 100, ours by 5e-5.
    for y, slack in ((norm(x), 20 * offset), (U.group_norm(*arguments), offset / 10),
                     (U.group_norm.__wrapped__(*arguments), offset / 10)):
        tolerance = dict(rtol=1e-4, atol=1e-4 * (1 + slack))
        assert_close(y.double(), exact, **tolerance)
        for a, b in zip(torch.autograd.grad(y, (x, norm.weight, norm.bias), g), oracle):
            assert_close(a.double(), b.double(), **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, d", [(256, 32), (70, 16), (1, 64)])
def test_attention_is_a_weighted_mean(n, d, device):
    """Against its formula in float64, values and gradients; weights from next to nothing to nearly all."""
    qkv, g = 3 * torch.randn(3, 2, 2, n, d, dtype=torch.float64), torch.randn(2, 2, n, d, dtype=torch.float64)
    mine, oracle = (qkv.to(device, torch.float32).requires_grad_(), qkv.requires_grad_())
    y, (q, k, v) = U.attend(*mine), oracle
    expected = (q @ k.mT / d**0.5).softmax(-1) @ v
    pairs = (y, expected), tuple(torch.autograd.grad(u, x, g.to(u))[0] for u, x in ((y, mine), (expected, oracle)))
    for a, b in pairs:
        assert (a.cpu().double() - b).norm() < 2e-5 * b.norm()        # with TF32 alone: 1e-3


def test_attention_takes_what_pytorchs_takes():
    """Heads in one dimension, values as wide as they like, nothing at all, and tensors without numbers."""
    for q, v in ((torch.randn(6, 7, 32),) * 2, (torch.randn(1, 2, 7, 32), torch.randn(1, 2, 7, 8)),
                 (torch.randn(0, 2, 7, 32),) * 2, (torch.randn(1, 2, 7, 32, device="meta"),) * 2):
        assert U.attend(q, q, v).shape == (*q.shape[:-1], v.shape[-1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_is_normalised_alike_in_every_batch(device):
    """The same bits alone as among others; and half precision comes back as float32, from float32 sums."""
    weight, bias, x = *torch.randn(2, 64, device=device), torch.randn(5, 64, 9, 9, device=device).half()
    norm = lambda x: U.group_norm(x, 32, weight, bias, 1e-5, True)       # noqa: E731
    many = norm(x.float())
    assert torch.equal(norm(x.float()[3:4]), many[3:4])
    assert_close(norm(x), many, rtol=1e-5, atol=1e-6)


def test_alpha_bars_by_hand():
    """abar_t = prod (1 - beta_i) in plain Python floats, DDPM's linear schedule."""
    abar = 1.0
    for t in range(1000):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert math.isclose(U.alpha_bars()[t], abar, rel_tol=1e-5)


def test_add_noise_by_hand():
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, each sample at its own t."""
    x_0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x = U.add_noise(x_0, torch.tensor([0, 999]), eps)
    for i, t in enumerate((0, 999)):
        a = float(U.alpha_bars()[t])
        assert_close(x[i], math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * eps[i])


class Oracle(nn.Module):
    """Knows x_0 and returns exactly the noise that is in x: the perfect network."""
    classes = 10

    def __init__(self, x_0):
        super().__init__()
        self.x_0, self.seen = x_0, []

    def forward(self, x, t, y):
        self.seen.append((int(t[0]), y.tolist()))
        a = U.alpha_bars().double()[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * self.x_0) / (1 - a).sqrt()


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_finds_what_a_perfect_network_knows(steps, eta):
    """With the true noise every x_0~ is x_0, and each x_t has the noise level of its t, for any steps and eta."""
    x_0 = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    oracle, noise = Oracle(x_0), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for t, x, _, guess in U.ddim(oracle, noise, steps=steps, eta=eta, generator=torch.Generator().manual_seed(0)):
        assert_close(guess, x_0, rtol=0, atol=1e-4)
        if t != 999:
            a = U.alpha_bars()[t].double()
            assert_close((x - a.sqrt() * x_0).std(), (1 - a).sqrt(), rtol=0.03, atol=2e-3)
    assert [t for t, _ in oracle.seen] == U.ddim_timesteps(steps).tolist()


def test_timesteps():
    """From 999 to 0, evenly and rounded; at most all 1,000; another number of steps is refused."""
    assert U.ddim_timesteps(50).tolist() == [round(999 - 999 * i / 49) for i in range(50)]
    assert sum(1 for _ in U.ddim(Linear(1), torch.zeros(1, 3, 1, 1))) == 50                   # where nobody says how many
    assert U.ddim_timesteps(1).tolist() == [999] and U.ddim_timesteps(1000).tolist() == list(range(999, -1, -1))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="outside 1 .. 1000"):
            U.ddim_timesteps(steps)


def test_time_and_class_are_added(unet):
    """What every block reads is silu(mlp(time) + the class's row)."""
    seen, t, y = [], torch.tensor([3, 700]), torch.tensor([1, 10])
    unet.mid1.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    unet(torch.randn(2, 3, 32, 32), t, y)
    emb = unet.time_mlp(U.time_embedding(t, 32)) + unet.class_emb.weight[y]
    assert_close(seen[0], emb * emb.sigmoid())


def test_group_norm_of_hardly_any_spread():
    """Where the variance is no larger than eps, eps halves it rather than doubles it."""
    x, one = 0.003 * torch.randn(2, 64, 5, 4), torch.ones(64)
    exact = nn.functional.group_norm(x.double(), 32, one.double(), 0 * one.double(), 1e-5)
    assert_close(U.group_norm(x, 32, one, 0 * one, 1e-5).double(), exact, rtol=1e-3, atol=1e-4)


def test_guidance(unet):
    """guidance 1 is the conditional model, 0 the unconditional one, 2 goes as far again beyond."""
    x, y, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), torch.full((2,), 999)
    eps = {g: next(U.ddim(unet, x, y, 10, guidance=g))[2] for g in (0.0, 1.0, 2.0)}
    assert_close(eps[1.0], unet(x, t, y).detach())
    assert_close(eps[0.0], unet(x, t).detach())
    assert_close(eps[2.0], 2 * eps[1.0] - eps[0.0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop, expected", [(0.0, {0, 1}), (1.0, {10})])
def test_label_dropout(drop, expected):
    """A dropped label becomes "none"; nothing else is ever changed."""
    spy = Oracle(torch.zeros(8, 3, 4, 4, dtype=torch.float64))
    U.ddpm_loss(spy, torch.zeros(8, 3, 4, 4), torch.tensor([0, 1] * 4), 10, drop)
    assert set(spy.seen[0][1]) == expected


def test_loss_of_a_perfect_network_is_zero():
    """ddpm_loss asks for the noise that it added, at the t that it gives."""
    x_0 = torch.rand(8, 3, 4, 4) * 2 - 1
    assert U.ddpm_loss(Oracle(x_0), x_0, torch.zeros(8, dtype=torch.long), 10).item() < 1e-6


def test_loss_draws_every_time_and_a_tenth_of_the_labels():
    """t over all of 0 .. 999, label "none" for each sample by a coin of its own, and gamma = 5 unless told."""
    seen, args = {}, (torch.zeros(20_000, 3, 1, 1), torch.zeros(20_000, dtype=torch.long), 10)
    def spy(x, t, y):
        seen.update(t=t, y=y)
        return x
    torch.manual_seed(0)
    loss = U.ddpm_loss(spy, *args)
    assert len(seen["t"].unique()) == 1000 and abs((seen["y"] == 10).double().mean() - 0.1) < 0.01
    torch.manual_seed(0)
    assert loss == U.ddpm_loss(spy, *args, drop=0.1, gamma=5.0)


@pytest.mark.parametrize("gamma", [5.0, math.inf])
def test_loss_weighs_by_min_snr(gamma):
    """mean of min(snr, gamma) / snr * (eps - prediction)^2 over samples, in float64; gamma = inf is the plain mean."""
    seen = {}
    def nothing(x, t, y):
        seen.update(t=t, x=x)
        return torch.zeros_like(x)
    torch.manual_seed(0)
    loss = U.ddpm_loss(nothing, torch.zeros(512, 3, 2, 2), torch.zeros(512, dtype=torch.long), 10, gamma=gamma)
    abar = U.alpha_bars()[seen["t"]].double().view(-1, 1, 1, 1)
    eps, snr = seen["x"].double() / (1 - abar).sqrt(), abar / (1 - abar)         # x_0 = 0, so x_t is noise alone
    assert abs(loss.item() - (eps**2 * snr.clamp(max=gamma) / snr).mean().item()) < 1e-5
    assert 0.05 < (snr > 5).double().mean() < 0.5                # both cases happen


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_one_step_is_eq_12(sigma):
    """ddim_step against eq. 12 in Python floats, value by value, for tensors abar (B, 1, 1, 1) and for numbers.

    t and s differ between samples; abar_s = 1, the picture itself, is among them; most x_0~ are far outside of [-1, 1].
    """
    x, eps = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    a_t, a_s = torch.tensor([0.01, 0.5, 0.9]).double(), torch.tensor([0.3, 0.7, 0.98 if sigma else 1.0]).double()
    x_s, x_0 = U.ddim_step(x, eps, a_t.view(3, 1, 1, 1), a_s.view(3, 1, 1, 1), sigma)
    for i, (a, b) in enumerate(zip(a_t.tolist(), a_s.tolist())):
        pairs = list(zip(x[i].flatten().tolist(), eps[i].flatten().tolist()))
        believed = [(v - math.sqrt(1 - a) * e) / math.sqrt(a) for v, e in pairs]
        after = [math.sqrt(b) * p + math.sqrt(1 - b - sigma**2) * e for p, (_, e) in zip(believed, pairs)]
        for got in ((x_s[i], x_0[i]), U.ddim_step(x[i], eps[i], a, b, sigma)):
            assert_close(torch.stack(got).flatten().tolist(), after + believed, rtol=1e-12, atol=1e-12)
    assert (x_0.abs() > 1).double().mean() > 0.3


class Linear(nn.Module):
    """The simplest network: eps = factor * x, for the label "none" alone."""
    classes = 10

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, t, y):
        assert y.tolist() == [10] * len(x)
        return self.factor * x


def test_ddim_follows_eq_12():
    """x_s = sqrt(abar_s) x_0~ + sqrt(1 - abar_s) eps of the step before; without labels the class is "none"."""
    last = None
    for t, x, eps, x_0 in U.ddim(Linear(3), torch.randn(1, 3, 8, 8, dtype=torch.float64), steps=5):
        if last is not None:
            abar = float(U.alpha_bars()[t])
            assert_close(x, math.sqrt(abar) * last[1] + math.sqrt(1 - abar) * last[0], rtol=1e-12, atol=1e-12)
        last = eps, x_0


def test_noise_comes_from_the_generator():
    """With eta = 1, two walks from one seed are one walk, and another seed's is another."""
    x, seeded = torch.ones(1, 3, 8, 8), torch.Generator().manual_seed
    a, b, c = ([x_t for _, x_t, _, _ in U.ddim(Linear(1), x, steps=3, eta=1.0, generator=seeded(i))] for i in (0, 0, 1))
    assert torch.equal(a[-1], b[-1]) and not torch.equal(a[-1], c[-1])


def test_noise_of_eta_1_is_ddpm_noise():
    """With eta = 1 and every time visited, sigma^2 is DDPM's posterior variance beta_t (1 - abar_s) / (1 - abar_t)."""
    x_0 = torch.zeros(8, 3, 32, 32, dtype=torch.float64)
    steps = U.ddim(Oracle(x_0), torch.randn_like(x_0), steps=1000, eta=1.0, generator=torch.Generator().manual_seed(0))
    abar, before = U.alpha_bars().double(), None
    for t, x, eps, _ in steps:
        if before is not None:
            a_t, a_s = abar[t + 1], abar[t]
            sigma = ((1 - a_t / a_s) * (1 - a_s) / (1 - a_t)).sqrt()
            assert_close((x - (1 - a_s - sigma**2).sqrt() * before).std(), sigma, rtol=0.03, atol=0)
        before = eps
    assert t == 0


def test_errors_of_the_first_steps_average_out():
    """A network that adds noise to eps leaves brightness as it is: x_0~ is not clamped, and clamped noise is grey.

    Of a bright picture (0.9) an x_0~ with noise of 2 would be 0.3 on average, clamped, and the walk would go there.
    """
    picture = torch.full((64, 3, 8, 8), 0.9, dtype=torch.float64)
    right, (a_t, a_s) = Oracle(picture), U.alpha_bars()[[999, 979]].tolist()
    x = torch.randn_like(picture)
    eps = right(x, torch.full((64,), 999), torch.zeros(64))
    noisy = eps + 2 * (a_t / (1 - a_t)) ** 0.5 * torch.randn_like(eps)
    _, x_0 = U.ddim_step(x, noisy, a_t, a_s)
    assert abs(x_0.mean() - 0.9) < 0.1 and x_0.std() > 1.5 and abs(x_0.clamp(-1, 1).mean()) < 0.5


def test_time_embedding_by_hand():
    """Frequencies 10,000^(-i / (width / 2)): sines first, then cosines."""
    e = U.time_embedding(torch.tensor([0, 7]), 8)
    assert_close(e[1], torch.tensor([f(7 / 10_000 ** (i / 4)) for f in (math.sin, math.cos) for i in range(4)]))


def test_a_new_network():
    """The last matrix of every block is 0, so that training starts near the identity; dropout works in training."""
    matrices = [(name, p) for name, p in U.UNet(channels=32, mults=(1, 2), blocks=1).named_parameters() if p.ndim > 1]
    last = ("conv2.weight", "proj.weight", "conv_out.weight")
    assert [n for n, p in matrices if not p.any()] == [n for n, _ in matrices if n.endswith(last)]
    noisy = U.UNet(channels=32, mults=(1,), blocks=1, dropout=0.9).train().mid1
    torch.nn.init.normal_(noisy.conv2.weight)
    x = torch.randn(1, 32, 4, 4)
    assert not torch.equal(noisy(x, torch.zeros(1, 128)), noisy(x, torch.zeros(1, 128)))
