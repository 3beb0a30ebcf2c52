"""One quantized layer: the paper's formula, the scale that t picks, LoRA, kernels against definitions, and the limits."""
import contextlib
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import hqdm
import unet  # noqa: F401  its kernel, too
from conftest import DEVICES
from plumbing import kernels

SINGLE = hqdm.Scheme()
KERNELS = torch.cuda.is_available() or kernels.INTERPRETED


def layer(kind="conv", rotation="single", wbits=4, abits=4, seed=0, device="cpu", **kwargs):
    """A quantized layer with 64 input channels, its input, and the float layer it came from; scales already fitted."""
    torch.manual_seed(seed)
    plain = nn.Conv2d(64, 16, 3, padding=1) if kind == "conv" else nn.Linear(64, 16)
    x = torch.randn(4, 64, 5, 5) * (1 + 9 * (torch.arange(64) == 3))[:, None, None]        # channel 3 is an outlier
    x = x if kind == "conv" else x[..., 0, 0]
    x, plain = x.to(device), plain.to(device)
    scheme = hqdm.Scheme(wbits, abits, rotation, **kwargs)
    new = (hqdm.HQConv2d if kind == "conv" else hqdm.HQLinear)(plain, scheme)
    for step in range(len(scheme.timesteps)):
        fit(new, x, step)
    return new, x, plain


def fit(layer, x, step=0):
    hqdm.fit_scale(layer.activations, layer.channels_last(x), step)


def learned(layer):
    """What is trained, in a fixed order."""
    a, w = layer.activations, layer.weights
    return [a.log_s_x, w.log_s_w, w.lora_A, w.lora_B] + ([] if a.symmetric else [a.z_x])


def dequantized(layer, x):
    """conv(x_hat, w_hat) + bias in x's precision, with autograd, H dense: the paper's formula as it stands."""
    H = torch.block_diag(*[hqdm.hadamard_matrix(32, dtype=x.dtype) / 32**0.5] * 2)
    a, w, rotation = layer.activations, layer.weights, layer.scheme.rotation
    dim = 1 if x.ndim == 4 else -1

    def rotate(v, dim):
        return v if rotation == "none" else (v.movedim(dim, -1) @ H).movedim(-1, dim)
    s, s_w, z_w = a.log_s_x.exp().to(x.dtype), w.log_s_w.exp().to(x.dtype), w.z_w.to(x.dtype)
    z = 0 if a.symmetric else hqdm.round_ste(a.z_x.to(x.dtype))
    def clip(q, low, high):                          # with LSQ's gradient, which passes at both ends of the grid
        return q * ((low <= q) & (q <= high)) + low * (q < low) + high * (q > high)
    x_hat = rotate(s * (clip(hqdm.round_ste(rotate(x, dim) / s, a.grid.step) + z, *a.grid[:2]) - z), dim)
    W = (w.weight.flatten(1) + w.lora_B @ w.lora_A.flatten(1)).to(x.dtype)
    w_hat = (s_w * (clip(hqdm.round_ste(W / s_w) + z_w, 0, 15) - z_w)).view(w.shape)
    w_hat = rotate(w_hat, 1) if rotation == "double" else w_hat              # the stored weight is W H: back
    y = F.conv2d(x_hat, w_hat, padding=1) if x.ndim == 4 else F.linear(x_hat, w_hat)
    return y + layer.bias.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation, grid", [*((r, "midtread") for r in hqdm.ROTATIONS), ("single", "midrise")])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_layer_is_the_paper_formula(kind, rotation, grid, device):
    """y = conv(x_hat, w_hat) + bias with x_hat, w_hat dequantized in float64: what the integer grid stands for."""
    new, x, _ = layer(kind, rotation, device=device, grid=grid)
    y, new, x = new(x).cpu(), new.cpu(), x.cpu()
    assert_close(y.double(), dequantized(new, x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation, grid", [("none", "midtread"), ("single", "midtread"), ("single", "midrise")])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradient_is_that_of_the_dequantized_layer(kind, rotation, grid, device):
    """Autograd through the integer grid is autograd through conv(x_hat, w_hat), in x and in all that is learned."""
    new, x, _ = layer(kind, rotation, 4, 3, device=device, grid=grid)
    nn.init.normal_(new.weights.lora_B, std=0.01)
    grads = torch.autograd.grad(new(x.requires_grad_()).square().mean(), [x] + learned(new))
    new, x = new.cpu(), x.detach().cpu().requires_grad_()
    oracle = torch.autograd.grad(dequantized(new, x).square().mean(), [x] + learned(new))
    for a, b in zip(grads, oracle):
        assert (a.cpu() - b).norm() < 2e-3 * b.norm()            # convolutions on a GPU round their gradients to TF32


# ---------------------------------------------------------------- kernels and their definitions

def cases(block, dtype=torch.float32):
    """Arguments of each function that has a kernel, over several tiles, pictures and 160 outputs; None: no gradient."""
    x, g = torch.randn(2, 9, 9, 256), torch.Generator().manual_seed(0)
    s, z, w = torch.rand(2) + 0.5, torch.tensor([0.0, 3.0]), torch.rand(160) + 0.5
    acc, q_x = torch.randn(2, 9, 9, 160), torch.randint(-7, 8, (2, 9, 9, 256), generator=g, dtype=torch.int8)
    q_w = torch.randint(-480, 481, (160, 256, 3, 3), generator=g, dtype=torch.int16)
    scales, aside, qkv = (s, w, torch.randn(160)), q_w.clamp(-99, 99) + 90, 2 * torch.randn(2, 70, 3, 3, 32)
    return {"walsh": [(x, -1, block, 0.3), (x.movedim(-1, 1), 1, block), (x.contiguous().movedim(-1, 1).contiguous(), 1, block),
                      (q_x, -1, block), (q_w, 1, block)],
            "rotate_and_quantize": [(x, s, None, hqdm.Grid(-3, 3), block), (x, s, z, hqdm.Grid(0, 7), 1),
                                    (x, s, None, hqdm.Grid(-7, 7), block, torch.int8), (x, s, None, hqdm.Grid(-7, 7, 2), block)],
            "scale_and_bias": [(acc, scales)],
            "group_norm": [(acc.movedim(-1, 1) + 1, 32, w, scales[2], 1e-5, silu) for silu in (False, True)],
            "attend": [tuple(qkv.permute(2, 0, 3, 1, 4)),
                       (*torch.randn(2, 1, 2, 64, 16), qkv[:1, :64, 0, :2, :16].transpose(1, 2))],
            "int_product": [(q_x, q_w, 1, 1), (q_x, q_w, 2, 1, scales), (q_x.to(torch.int16) * 30, q_w, 1, 0, scales),
                            (q_x, aside, 1, 1), (q_x.to(torch.int16) * 30, aside[:7], 2, 1),
                            (q_x[..., :3], aside[:, :3], 1, 1, scales),
                            (q_x, q_w.clamp(-99, 99).to(torch.int8), 1, 1), (q_x.int() * 999, q_w.long(), 1, 1)]}


def on(device, v):
    if isinstance(v, tuple) and not isinstance(v, hqdm.Grid):
        return tuple(on(device, a) for a in v)
    return v.to(device) if torch.is_tensor(v) else v


def with_gradients(f, args):
    """f(*args), and the gradients of every floating-point argument that f differentiates (not the bias)."""
    leaves = [v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for v in args]
    if isinstance(leaves[-1], tuple) and torch.is_tensor(leaves[-1][0]) and leaves[0].is_floating_point():
        leaves[-1] = (*(v.detach().requires_grad_() for v in leaves[-1][:2]), leaves[-1][2])
    y = f(*leaves)
    inputs = [v for v in leaves[:-1] + list(leaves[-1] if isinstance(leaves[-1], tuple) else leaves[-1:])
              if torch.is_tensor(v) and v.requires_grad]
    if not y.requires_grad:
        return [y]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y, *torch.autograd.grad(y, inputs, g)]


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("name", sorted(kernels.FAST.keys() - {"residual", "attention"}))       # those: test_4_integer.py
def test_kernels_are_their_definitions(name, block, monkeypatch):
    """Each pair, values and gradients; integers exactly. Without a GPU only integer products have a kernel."""
    if block != 32 and name not in ("walsh", "rotate_and_quantize"):
        pytest.skip("knows no block")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for args in cases(block)[name]:
        args = on(device, args)
        fast = with_gradients(kernels.CHOSEN[name], args)
        with monkeypatch.context() as m:
            m.setattr(kernels, "ENABLED", False)
            here = args if name != "int_product" else on("cpu", args)         # whose definition is the CPU's
            slow = with_gradients(kernels.CHOSEN[name].__wrapped__, here)
        for a, b in zip(fast, slow):
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.is_floating_point():                # a rare value on the border of two steps may round either way
                assert (a.cpu() - b.cpu()).norm() < 2e-3 * b.norm()
            else:
                assert (a.cpu() != b.cpu()).sum() <= (1e-5 * b.numel() if name == "rotate_and_quantize" else 0)


def test_the_kernels_are_taken(monkeypatch, capsys):
    """Where they can run they do, said once; where they are off, or compiled, the definitions run."""
    ran = []
    fast, takes = kernels.FAST["int_product"][1], kernels.FAST["int_product"][0]
    monkeypatch.setitem(kernels.FAST, "probe", (takes, lambda *args: ran.append("kernel") or fast(*args)))

    def probe(*args):
        ran.append("definition")
    probe, q = kernels.kernel(probe), torch.ones(1, 2, 2, 8, dtype=torch.int8)
    monkeypatch.setattr(kernels, "_said", set())
    probe(q, q.movedim(-1, 1)), probe(q, q.movedim(-1, 1))
    monkeypatch.setattr(kernels, "ENABLED", False)
    probe(q, q.movedim(-1, 1))
    assert ran == ["kernel", "kernel", "definition"] and capsys.readouterr().out.count("kernels:") == 1


# ---------------------------------------------------------------- calibration and limits

def test_the_baseline_calibrates_its_zero_point():
    """Out of a SiLU with one outlier, at 3 bits: z leaves a level below 0, which ends that shrink together lack."""
    new, x, _ = layer("conv", "none", 4, 3)
    v = F.silu(torch.randn_like(x))
    v[0, 0, 0, 0] = 12
    fit(new, v)
    span = v.amin().view(1, 1), v.amax().view(1, 1)
    assert new.activations.z_x.tolist() == [1] and hqdm.search_scale(v.view(1, -1), hqdm.Grid(0, 7), 2, span=span)[1].item() == 0


@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
def test_more_bits_come_nearer_to_the_float_layer(rotation):
    """2, 4, 6, 8 bits: each two bits more take a third off the error at least; nothing is left out and nothing scaled twice."""
    error = []
    for bits in (2, 4, 6, 8):
        new, x, plain = layer("conv", rotation, bits, bits)
        error.append(((new(x) - plain(x)).norm() / plain(x).norm()).item())
    assert all(b < a / 1.5 for a, b in zip(error, error[1:])) and error[-1] < 0.05


def test_rotation_helps_against_an_outlier():
    """The point of the paper, on one layer at 3 bits with one loud channel: single errs least."""
    error = {}
    for rotation in hqdm.ROTATIONS:
        new, x, plain = layer("conv", rotation, 4, 3)
        error[rotation] = ((new(x) - plain(x)).norm() / plain(x).norm()).item()
    assert error["single"] < error["none"] and error["single"] < error["double"]


@pytest.mark.parametrize("rotation", ["none", "single"])
def test_fitted_scale_has_the_least_squared_error(rotation):
    """Of x for none, of H x for single: no scale from half to twice is better by over 2 % (a sample was searched)."""
    new, x, _ = layer("conv", rotation, 4, 3)
    a, x = new.activations, new.channels_last(x)
    v = x if rotation == "none" else hqdm.hadamard(x, -1)
    z = a.z_x.detach() if rotation == "none" else None

    def error(factor):
        s = a.log_s_x.exp().detach() * factor
        return (v - s * hqdm.quantize(v, s, z, a.grid)).square().mean().item()
    assert error(1) <= 1.02 * min(map(error, torch.linspace(0.5, 2, 50)))


def test_fitted_scale_looks_everywhere():
    """A quiet picture first, loud ones after it: hardly anything is clipped."""
    new = hqdm.HQConv2d(nn.Conv2d(32, 4, 3), SINGLE)
    x = torch.cat([0.01 * torch.randn(2, 32, 32, 32), 5 * torch.randn(2, 32, 32, 32)])
    fit(new, x)
    assert (new.activations(new.channels_last(x))[0][2:].abs() == 7).float().mean() < 0.1


def test_scales_are_missed_where_they_are_missing():
    """Before calibration, and while one step of several has none, a layer refuses; so does a fit to what is not finite."""
    new = hqdm.HQLinear(nn.Linear(32, 8), hqdm.Scheme(timesteps=(9, 0)))
    x = torch.randn(2, 32)
    for step in (0, 1):
        with pytest.raises(RuntimeError, match="scales are missing"), hqdm.at(torch.tensor(0), (9, 0)):
            new(x)
        fit(new, x, step)
    with hqdm.at(torch.tensor(0), (9, 0)):
        assert new(x).isfinite().all()
    x[0, 0] = float("inf")
    for wrong, message in ((x, "not finite"), (x.nan_to_num() * math.nan, "not finite"), (torch.ones(2, 8), "must end in 32 channels")):
        with pytest.raises(ValueError, match=message):
            fit(new, wrong)
    fit(new, torch.zeros(2, 32), step=1)             # as a t of 0 gives: a scale that later values can live with
    assert new.activations.log_s_x[1] == 0
    odd = hqdm.ActivationQuantizer(32, 3, grid="midrise")
    hqdm.fit_scale(odd, torch.zeros(2, 32))          # no level is 0: the nearest must be next to it
    q, s = odd(torch.zeros(2, 32))
    assert q.abs().min() == 1 and (q * s.view(-1, 1)).abs().max() < 1e-6
    one_number = hqdm.ActivationQuantizer(32, 3, "none")
    hqdm.fit_scale(one_number, torch.full((2, 32), 5.0))
    assert_close(one_number(torch.full((2, 32), 5.0))[0] * one_number.log_s_x.exp(), torch.full((2, 32), 5.0))


@pytest.mark.parametrize("scheme, message", [
    (dict(wbits=1), "W1A4"), (dict(abits=9), "2 to 8 bits"), (dict(wbits=32), "2 to 8 bits"), (dict(rotation="triple"), "none, single"),
    (dict(block=128), "64 channels are not a multiple of the Hadamard block 128"), (dict(block=12), "not a power of two"),
    (dict(block=0), "not a power of two"), (dict(timesteps=(5, 5)), "each once"), (dict(timesteps=(0.5, 0)), "integers"),
    (dict(timesteps=()), "one or more"),
    (dict(grid="odd"), "no grid 'odd'"), (dict(rotation="none", grid="midrise"), "for rotated activations")])
def test_bad_arguments_are_refused(scheme, message):
    with pytest.raises(ValueError, match=message):
        hqdm.HQLinear(nn.Linear(64, 8), hqdm.Scheme(**scheme))


def test_what_a_layer_is_without_being_asked():
    """W4A4 single, blocks of 32, rank 32, one scale; block 1 is a transform that does nothing."""
    assert SINGLE == (4, 4, "single", 32, 32, (0,), "midtread") and hqdm.HQLinear(nn.Linear(64, 8)).scheme == SINGLE
    x = torch.randn(2, 64, 3)
    assert torch.equal(hqdm.walsh(x), hqdm.walsh(x, 1, 32)) and torch.equal(hqdm.hadamard(x), hqdm.hadamard(x, 1, 32))
    assert torch.equal(hqdm.hadamard(x, 1, 1), x)
    with pytest.raises(ValueError, match="block 0 is not a power of two"):
        hqdm.walsh(x, 1, 0)


def test_quantizers_are_of_use_alone():
    """Taken out of the layer: H x on its grid times s_x is near H x, q_w - z times s_w near the weight; one step each."""
    x, w = torch.randn(5, 32), torch.randn(8, 32)
    a, b = hqdm.ActivationQuantizer(32, 8), hqdm.WeightQuantizer(w, 8)
    hqdm.fit_scale(a, x)
    (q_x, s_x), (q_w, s_w) = a(x), b()
    assert a.log_s_x.shape == (1,) and b.lora_A.shape == (32, 32)
    assert_close(s_x[:, None] * q_x, hqdm.hadamard(x), rtol=0, atol=0.03)
    assert_close(s_w * q_w, w, rtol=0, atol=0.02)


@pytest.mark.parametrize("rotation, k", [("none", 1), ("single", 32), ("double", 1)])
def test_the_bound_of_a_layer(rotation, k):
    """taps x sqrt(k) x q_max x (2^bits - 1), each from the layer's own grid: 576 products at W4A3."""
    q_max = 7 if rotation == "none" else 3           # asymmetric grids have 0 .. 7 at 3 bits
    new, _, _ = layer("conv", rotation, 4, 3)
    assert new.bound == math.ceil(576 * math.sqrt(k) * q_max * 15) and new.k == k


def test_layers_of_half_precision():
    """A float16 layer is made over in float32: its weights as they are, scales fitted and sums made in float32."""
    plain = nn.Conv2d(64, 8, 3).half()
    new, same = hqdm.HQConv2d(plain), hqdm.HQConv2d(copy.deepcopy(plain).float())
    assert torch.equal(new.weights.weight, plain.weight.float()) and torch.equal(new.weights()[0], same.weights()[0])
    assert all(v.dtype == torch.float32 for v in new.state_dict().values())


@pytest.mark.parametrize("kwargs", [dict(groups=2), dict(dilation=2), dict(padding=1, padding_mode="circular"),
                                    dict(padding=(1, 0)), dict(padding="same"), dict(stride=(1, 2))])
def test_other_convolutions_are_refused(kwargs):
    with pytest.raises(ValueError, match="one number each"):
        hqdm.HQConv2d(nn.Conv2d(64, 8, 3, **kwargs))


# ---------------------------------------------------------------- weights

def test_weight_scales_are_the_searched_ones():
    """A new layer starts from the 80-shrink search with p = 2.4 on its own weight; for double on W H."""
    for rotation in hqdm.ROTATIONS:
        new, _, plain = layer("conv", rotation)
        w = hqdm.hadamard(plain.weight.detach(), 1, 32) if rotation == "double" else plain.weight.detach()
        s, z = hqdm.search_scale(w.flatten(1), hqdm.Grid(0, 15), 2.4)
        assert_close(new.weights()[1], s)
        assert_close(new.weights.z_w, z)


def test_lora_changes_nothing_at_the_start():
    """B = 0: any rank gives the layer without LoRA, and only B has a gradient at first. A is as nn.Linear starts."""
    (one, x, _), (big, _, _) = layer(rank=1), layer(rank=32)
    assert 0.99 < big.weights.lora_A.abs().max() * math.sqrt(576) <= 1
    assert torch.equal(one(x), big(x))
    big(x).square().sum().backward()
    assert big.weights.lora_B.grad.abs().sum() > 0 and big.weights.lora_A.grad.abs().sum() == 0


def test_lora_is_what_gets_rounded():
    """Adding D to the weight and adding it by B A give the same integers: LoRA acts before the rounding."""
    new, x, _ = layer()
    nn.init.normal_(new.weights.lora_B, std=0.05)
    other = copy.deepcopy(new)
    with torch.no_grad():
        w = other.weights
        w.weight += (w.lora_B @ w.lora_A.flatten(1)).view_as(w.weight)
        w.lora_B.zero_()
    assert torch.equal(new.weights()[0], other.weights()[0]) and torch.equal(new(x), other(x))


def test_gradients_reach_everything_that_is_learned():
    """LoRA, weight scale and activation scale all move; bias and float weight are no parameters."""
    for rotation in hqdm.ROTATIONS:
        new, x, _ = layer("conv", rotation, 4, 3)
        nn.init.normal_(new.weights.lora_B, std=0.01)
        new(x).square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in learned(new))
        assert {id(p) for p in learned(new)} == {id(p) for p in new.parameters()}


@pytest.mark.parametrize("rotation, wbits, view, wide", [
    ("none", 5, "B", False), ("single", 4, "B", True), ("single", 4, "A", False), ("none", 8, "B", True)])
def test_operands_are_as_narrow_as_they_can_be(rotation, wbits, view, wide):
    """q_w - z of 4 bits is within 15, (q_w - z) R of equal weights not within 127: int8 where all fit, else int16."""
    new, _, _ = layer("conv", rotation, wbits)
    new.integer, new.view = True, view
    for freeze in (lambda: None, new.freeze):
        freeze()
        q, expected = new.operand()[0], hqdm.walsh(new.weights()[0], 1, new.k if view == "B" else 1)
        fits = expected.abs().max() < 128 if new.weights.frozen else not wide        # before freezing the format says so
        assert torch.equal(q.float(), expected) and q.dtype == (torch.int8 if fits else torch.int16)
    for z, dtype in ((0, torch.int16 if wide else torch.int8), (15, torch.int8)):    # all integers 15 or 255, or 0
        new.weights.q_w.fill_(0xff if wbits != 5 else 15), new.weights.z_w.fill_(z if wbits != 8 else 17 * z)
        assert new.operand()[0].dtype == dtype and bool(new.operand()[0].any()) == (z == 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_freezing_changes_no_bit(bits):
    """Twice, too; what is left are packed integers, two up to 4 bits in a byte, and nothing to learn."""
    new, x, _ = layer("conv", "none", bits, bits)
    nn.init.normal_(new.weights.lora_B, std=0.05)
    y = new(x)
    new.freeze(), new.freeze()
    assert torch.equal(new(x), y) and not any(p.requires_grad for p in new.parameters())
    assert all(v.grad_fn is None and not v.requires_grad for v in new.buffers())
    assert new.weights.q_w.dtype == torch.uint8 and len(new.weights.q_w) == 16 * 64 * 9 // (2 if bits <= 4 else 1)


def test_other_integers_are_noticed():
    """What a frozen layer keeps belongs to its tensors: replaced, written to, or cast, they are read anew."""
    (a, x, _), (b, _, _) = layer("conv", "none", seed=0), layer("conv", "none", seed=1)
    a.freeze(), b.freeze()
    for change in (lambda a: a.weights.q_w.copy_(b.weights.q_w), lambda a: setattr(a.weights, "z_w", b.weights.z_w),
                   lambda a: a.weights.s_w.mul_(2), lambda a: a.activations.log_s_x.add_(1),
                   lambda a: setattr(a.activations, "z_x", 0 * a.activations.z_x)):
        before = a(x)
        change(a)
        again = copy.deepcopy(a)                     # a copy has kept nothing
        assert torch.equal(a(x), again(x)) and not torch.equal(a(x), before)
    fresh, used = copy.deepcopy(a), a
    used(x)
    assert torch.equal(fresh.half().float()(x), used.half().float()(x))


def test_what_is_kept_does_not_travel():
    """A pickle of a used layer is no larger than that of an unused one, and loads to the same outputs."""
    new, x, _ = layer()
    new.freeze()
    before = len(pickle.dumps(new))
    y = new(x)
    assert len(pickle.dumps(new)) == before and torch.equal(pickle.loads(pickle.dumps(new))(x), y)


@pytest.mark.parametrize("integer", [False, True])
def test_a_frozen_layer_has_gradients_after_inference(integer):
    """What a frozen layer keeps is made once, perhaps in inference mode; later calls may still want the gradient of x."""
    new, x, _ = layer()
    new.freeze()
    with torch.inference_mode():
        y = new(x)
        new.integer = integer
        assert torch.equal(new(x), y)
    new.integer = False
    x.requires_grad_()
    assert torch.equal(new(x), y)
    new(x).sum().backward()
    assert x.grad.abs().sum() > 0


# ---------------------------------------------------------------- t and the rest

def test_t_picks_the_scale_per_sample():
    """A batch that mixes steps equals its samples one by one, in any order, after any number of calls."""
    times = (900, 500, 100)
    new, x, _ = layer(timesteps=times)
    new.activations.log_s_x.data = torch.tensor([0.1, 0.5, 1.5]).log()
    t = torch.tensor([100, 880, 520, 900])                       # nearest: steps 2, 0, 1, 0
    with hqdm.at(t, times):
        together = new(x)
        assert_close(new.activations(new.channels_last(x))[1], torch.tensor([1.5, 0.1, 0.5, 0.1]))
    for i in (3, 1, 2, 0, 0):
        with hqdm.at(t[i:i + 1], times):
            assert_close(new(x[i:i + 1]), together[i:i + 1], rtol=0, atol=0)
    with hqdm.at(torch.tensor(520), times):                      # one t serves all
        assert_close(new(x)[2], together[2], rtol=0, atol=0)


def test_a_layer_with_many_steps_asks_which_one():
    """Called alone, for other samples or for other steps: an error, never some scale; also after an error inside."""
    new, x, _ = layer(timesteps=(900, 100))
    for t, times in (([100, 100], (900, 100)), ([100] * 4, (900, 500, 100))):
        with pytest.raises(RuntimeError, match="this layer 4 and 2"), hqdm.at(torch.tensor(t), times):
            new(x)
    with contextlib.suppress(ZeroDivisionError), hqdm.at(torch.tensor(100), (900, 100)):
        1 / 0
    with pytest.raises(RuntimeError, match="which DDIM step"):
        new(x)


def test_calls_inside_calls():
    """A network inside a network has its own step; the outer one's is there again afterwards."""
    new, x, _ = layer(timesteps=(900, 100))
    new.activations.log_s_x.data = torch.tensor([0.1, 1.5]).log()
    with hqdm.at(torch.tensor(900), (900, 100)):
        outer = new(x)
        with hqdm.at(torch.tensor(100), (900, 100)):
            assert not torch.equal(new(x), outer)
        assert torch.equal(new(x), outer)


def test_zero_point_stays_on_the_grid():
    """A learned zero point below 0 is held at 0: else 0.0 leaves the grid, and the bound on q_x with it."""
    new, x, _ = layer("conv", "none", 4, 7)
    a = new.activations
    a.z_x.data.fill_(-3.0)
    a.log_s_x.data -= 3                                          # so fine a grid that values are clipped at its end
    q_x, _ = a(x)
    assert q_x.min() >= 0 and q_x.abs().max() <= a.q_max
    a.z_x.data.fill_(400.0)                                      # and one past the grid's end at that end
    assert a(x)[0].max() <= 0
    y = new(x)
    new.integer = True
    assert torch.equal(new(x), y)


def test_autocast_does_not_reach_the_integers():
    """Under bf16 autocast a layer gives what it gives in float32; half-precision inputs are taken as float32."""
    new, x, _ = layer()
    y = new(x)
    for kind in [k for k in ("cpu", "mps", "xpu") if torch.amp.is_autocast_available(k)]:
        with torch.autocast(kind, dtype=torch.bfloat16), hqdm.full_float32(torch.device(kind)):
            assert not torch.is_autocast_enabled(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(new(x), y)
    assert torch.equal(new(x.bfloat16()), new(x.bfloat16().float()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
def test_memory_formats_change_nothing(rotation, device):
    """However the numbers lie in memory: NCHW and channels_last images, four-dimensional tokens and their transposes."""
    conv, x, _ = layer("conv", rotation, device=device)
    assert torch.equal(conv(x), conv(x.contiguous(memory_format=torch.channels_last)))
    linear, _, _ = layer("linear", rotation, device=device)
    tokens = torch.randn(4, 3, 5, 64, device=device)
    y = linear(tokens.flatten(1, 2)).view(4, 3, 5, 16)
    last = tokens.contiguous(memory_format=torch.channels_last)
    for same in (tokens, last, tokens.transpose(1, 2).contiguous().transpose(1, 2)):
        for linear.integer in (False, True):
            assert_close(linear(same), y, rtol=1e-6, atol=1e-6)
    linear.integer = False


@pytest.mark.skipif(torch.__version__.startswith(("2.4.", "2.5.")), reason="its compiler breaks at context managers")
def test_a_layer_compiles_in_one_piece(monkeypatch):
    """torch.compile finds no break in a layer, and computes what its definitions compute."""
    monkeypatch.setattr(kernels, "ENABLED", False)
    new, x, _ = layer("linear", "double", 4, 3)
    y = new(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_network_is_refused_in_words(dtype):
    new, x, _ = layer()
    y = new(x)
    with pytest.raises(TypeError, match="compute in float32, not torch.*call network.float"):
        new.to(dtype)(x)
    assert_close(new.float()(x), y, rtol=0.2, atol=0.5)


def test_a_layer_owns_its_numbers():
    """What is done to the float layer afterwards does not reach the quantized one."""
    new, x, plain = layer()
    y = new(x)
    with torch.no_grad():
        plain.weight.zero_(), plain.bias.zero_()
    assert torch.equal(new(x), y)


def test_integers_pass_no_gradient():
    """A training that forgot to leave integer mode fails at its first backward, rather than learn half of it."""
    new, x, _ = layer()
    new.integer = True
    with pytest.raises(RuntimeError, match="does not require grad"):
        new(x).sum().backward()


def test_no_bias_is_a_bias_of_zero():
    bare, zero = nn.Conv2d(32, 8, 1, bias=False), nn.Conv2d(32, 8, 1)
    zero.weight.data = bare.weight.data
    nn.init.zeros_(zero.bias)
    x, made = torch.randn(2, 32, 4, 4), [hqdm.HQConv2d(bare), hqdm.HQConv2d(zero)]
    for new in made:
        fit(new, x)
    assert torch.equal(made[0](x), made[1](x))


def test_saved_layers_load(tmp_path):
    """state_dict, torch.save and weights_only=True, into a layer that is born packed: the same outputs."""
    new, x, plain = layer("conv", "none")
    new.freeze()
    torch.save(new.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = hqdm.HQConv2d(plain, new.scheme, packed=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), new(x))
