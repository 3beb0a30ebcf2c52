"""One quantized layer: the paper's formula, the scale that t picks, LoRA, and the limits."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import hqdm
from conftest import DEVICES


def layer(kind="conv", rotation="single", wbits=4, abits=4, seed=0, device="cpu", **kwargs):
    """A quantized layer with 64 input channels, its input, and the float layer it came from; scale already fitted."""
    torch.manual_seed(seed)
    plain = nn.Conv2d(64, 16, 3, padding=1) if kind == "conv" else nn.Linear(64, 16)
    x = torch.randn(4, 64, 5, 5) * (1 + 9 * (torch.arange(64) == 3))[:, None, None]        # channel 3 is an outlier
    x = x if kind == "conv" else x[..., 0, 0]
    x, plain = x.to(device), plain.to(device)
    new = (hqdm.HQConv2d if kind == "conv" else hqdm.HQLinear)(plain, wbits, abits, rotation, **kwargs)
    new.clock.set(torch.zeros(4, dtype=torch.long, device=device))
    if abits != 32:
        new.fit_input(x)
    return new, x, plain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_layer_is_the_paper_formula(kind, rotation, device):
    """y = conv(x_hat, w_hat) + bias with x_hat, w_hat dequantized and a dense float64 H: what the integer grid stands for."""
    new, x, _ = layer(kind, rotation, device=device)
    y, (new, x) = new(x).cpu(), (new.cpu(), x.cpu())
    H = torch.block_diag(*[hqdm.hadamard_matrix(32).double() / 32**0.5] * 2)
    def rotate(v, dim):
        return (v.movedim(dim, -1) @ H).movedim(-1, dim)
    dim, v, w = (1 if kind == "conv" else -1), x.double(), new.weight.double()
    v = v if rotation == "none" else rotate(v, dim)
    s, z = new.log_s_x.exp().double(), (new.z_x.double() if rotation == "none" else 0)
    v = s * (((v / s).round() + z).clamp(*hqdm.grid(4, rotation != "none")) - z)
    s_w, z_w = new.log_s_w.exp().double(), new.z_w.double()
    w = (s_w * (((w.flatten(1) / s_w).round() + z_w).clamp(0, 15) - z_w)).view_as(w)
    v = rotate(v, dim) if rotation != "none" else v              # x_hat; for double the stored weight is W H: rotate it back
    w = rotate(w, 1) if rotation == "double" else w
    oracle = (F.conv2d(v, w, padding=1) if kind == "conv" else F.linear(v, w)) + new.bias.double().view(new.per_channel)
    assert_close(y.double(), oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not (torch.cuda.is_available() or hqdm.INTERPRETED), reason="kernels need a GPU, or TRITON_INTERPRET=1 and triton")
@pytest.mark.parametrize("block", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("rotation", ["none", "single"])
def test_kernels_are_their_definitions(rotation, block, monkeypatch):
    """Section 6 on and off, over several tiles, pictures, 160 outputs and all blocks: outputs, gradients, and integer as fake."""
    results, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(hqdm, "fast_gpu", lambda *_: False)
        torch.manual_seed(0)
        new = hqdm.HQConv2d(nn.Conv2d(256, 160, 3, padding=1), 4, 4, rotation, block, clock=hqdm.Clock([9, 0])).to(device)
        nn.init.normal_(new.lora_B, std=0.01)
        x = torch.randn(2, 256, 9, 9).to(device, memory_format=torch.channels_last).requires_grad_()
        for t in (0, 9):
            new.clock.set(torch.full((2,), t, device=device))
            new.fit_input(x.detach() * (1 + t))
        new.clock.set(torch.tensor([0, 9], device=device))
        y = new(x)
        learned = [new.log_s_x, new.log_s_w, new.lora_A, new.lora_B] + ([new.z_x] if rotation == "none" else [])
        results.append([y] + list(torch.autograd.grad((y * torch.randn_like(y, memory_format=torch.channels_last)).mean(), [x] + learned)))
        new.integer = True
        assert torch.equal(new(x), y)
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()     # a rare value on the border of two steps may round either way


def test_the_baseline_calibrates_its_zero_point():
    """Values out of a SiLU and one outlier, at 3 bits: the zero point leaves a level below 0, which a grid whose ends shrink together lacks."""
    new, x, _ = layer("conv", "none", 4, 3)
    v = F.silu(torch.randn_like(x))
    v[0, 0, 0, 0] = 12
    new.fit_input(v)
    lo, hi = v.amin().view(1, 1), v.amax().view(1, 1)
    assert new.z_x.tolist() == [1] and hqdm.search_scale(v.view(1, -1), 3, False, 2, lo=lo, hi=hi)[1].item() == 0


@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
def test_sixteen_bits_reproduce_the_float_layer(rotation):
    """The limit of many bits is the float layer: nothing is left out and nothing scaled twice."""
    new, x, plain = layer("conv", rotation, 16, 16)
    assert (new(x) - plain(x)).norm() / plain(x).norm() < 1e-3
    new.freeze()
    assert sum(v.numel() * v.element_size() for v in new.state_dict().values()) == new.bytes[1]


@pytest.mark.parametrize("wbits, abits", [(32, 4), (4, 32), (32, 32)])
def test_bits_of_32_leave_that_side_in_float(wbits, abits):
    """W32A4 errs by its activations alone, W4A32 by its weights alone, W32A32 not at all; freezing changes nothing."""
    new, x, plain = layer("conv", "single", wbits, abits)
    y = new(x)
    error = (y - plain(x)).norm() / plain(x).norm()
    assert error < 1e-5 if (wbits, abits) == (32, 32) else 1e-3 < error < 0.5
    new.freeze()
    assert_close(new(x), y, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no integer form"):
        new.integer_accumulator(x)


def test_rotation_helps_against_an_outlier():
    """The point of the paper, on one layer at 3 bits with one loud channel: single errs least."""
    error = {}
    for rotation in hqdm.ROTATIONS:
        new, x, plain = layer("conv", rotation, 4, 3)
        error[rotation] = ((new(x) - plain(x)).norm() / plain(x).norm()).item()
    assert error["single"] < error["none"] and error["single"] < error["double"]


def test_lora_changes_nothing_at_the_start():
    """B = 0: any rank gives the layer without LoRA, and only B has a gradient at first."""
    (one, x, _), (big, _, _) = layer(rank=1), layer(rank=32)
    assert torch.equal(one(x), big(x))
    big(x).square().sum().backward()
    assert big.lora_B.grad.abs().sum() > 0 and big.lora_A.grad.abs().sum() == 0


def test_lora_is_what_gets_rounded():
    """Adding D to the weight and adding it by B A give the same integers: LoRA acts before the rounding."""
    new, x, _ = layer()
    nn.init.normal_(new.lora_B, std=0.05)
    other = copy.deepcopy(new)
    with torch.no_grad():
        other.weight += (new.lora_B @ new.lora_A.flatten(1)).view_as(other.weight)
        other.lora_B.zero_()
    assert torch.equal(new.quantize_weight()[0], other.quantize_weight()[0]) and torch.equal(new(x), other(x))


def test_t_picks_the_scale_per_sample():
    """A batch that mixes steps equals its samples one by one, in any order, after any number of calls."""
    new, x, _ = layer(clock=hqdm.Clock([900, 500, 100]))
    new.log_s_x.data = torch.tensor([0.1, 0.5, 1.5]).log()
    t = torch.tensor([100, 880, 520, 900])                       # nearest: steps 2, 0, 1, 0
    new.clock.set(t)
    assert new.clock.step.tolist() == [2, 0, 1, 0]
    together = new(x)
    for i in (3, 1, 2, 0, 0):
        new.clock.set(t[i:i + 1])
        assert_close(new(x[i:i + 1]), together[i:i + 1], rtol=0, atol=0)
    s = new.log_s_x.exp()
    new.clock.set(t)
    assert_close(new.quantize_input(x)[1].flatten(), s[[2, 0, 1, 0]])


def test_a_layer_with_many_steps_asks_which_one():
    new, x, _ = layer(clock=hqdm.Clock([900, 100]))
    new.clock.set(torch.tensor([100, 100]))                      # two answers for four samples
    with pytest.raises(RuntimeError, match="size"):
        new(x)
    new.clock.step = None
    with pytest.raises(RuntimeError, match="which DDIM step"):
        new(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
def test_one_step_serves_the_whole_batch(rotation, device):
    """No clock at all, or one t for many samples: the same as that t for each of them."""
    new, x, _ = layer("conv", rotation, device=device)
    y = new(x)
    new.clock.set(torch.zeros(1, dtype=torch.long, device=device))
    assert torch.equal(new(x), y)
    new.clock.step = None
    assert torch.equal(new(x), y)


@pytest.mark.parametrize("integer", [False, True])
def test_a_frozen_layer_has_gradients_after_inference(integer):
    """What a frozen layer keeps is made once, perhaps in inference mode; later calls may still want the gradient of x."""
    layer = hqdm.HQConv2d(nn.Conv2d(32, 8, 3), 4, 4)
    layer.freeze()
    x = torch.randn(1, 32, 5, 5)
    with torch.inference_mode():
        y = layer(x)
        layer.integer = integer
        assert torch.equal(layer(x), y)
    layer.integer = False
    x.requires_grad_()
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_gradients_reach_everything_that_is_learned():
    """LoRA, weight scale and activation scale all move; the bias and the float weight stay."""
    for rotation in hqdm.ROTATIONS:
        new, x, _ = layer("conv", rotation, 4, 3)
        nn.init.normal_(new.lora_B, std=0.01)
        new(x).square().mean().backward()
        for p in (new.lora_A, new.lora_B, new.log_s_w, new.log_s_x) + ((new.z_x,) if rotation == "none" else ()):
            assert p.grad.abs().sum() > 0
        assert new.bias.grad is None and not new.weight.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", ["none", "single"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradient_is_that_of_the_dequantized_layer(kind, rotation, device):
    """Autograd through the integer grid equals autograd through conv(x_hat, w_hat), in x and all that is learned, term by term."""
    new, x, _ = layer(kind, rotation, 4, 3, device=device)
    nn.init.normal_(new.lora_B, std=0.01)
    names = ["log_s_x", "log_s_w", "lora_A", "lora_B"] + ["z_x"] * (rotation == "none")
    grads = torch.autograd.grad(new(x.requires_grad_()).square().mean(), [x] + [getattr(new, n) for n in names])
    new, x = new.cpu(), x.detach().cpu().requires_grad_()
    s_x, s_w = new.log_s_x.exp(), new.log_s_w.exp()
    v = hqdm.hadamard(x, new.dim) if rotation == "single" else x
    z = hqdm.round_ste(new.z_x) if rotation == "none" else 0
    x_hat = s_x * ((hqdm.round_ste(v / s_x) + z).clamp(*hqdm.grid(3, rotation != "none")) - z)
    x_hat = hqdm.hadamard(x_hat, new.dim) if rotation == "single" else x_hat
    w = (new.weight.flatten(1) + new.lora_B @ new.lora_A.flatten(1)) / s_w
    w_hat = (s_w * ((hqdm.round_ste(w) + new.z_w).clamp(0, 15) - new.z_w)).view_as(new.weight)
    y = F.conv2d(x_hat, w_hat, new.bias, padding=1) if kind == "conv" else F.linear(x_hat, w_hat, new.bias)
    oracle = torch.autograd.grad(y.square().mean(), [x] + [getattr(new, n) for n in names])
    for a, b in zip(grads, oracle):
        assert (a.cpu() - b).norm() < 2e-3 * b.norm()            # convolutions on a GPU round their gradients to TF32


@pytest.mark.parametrize("kwargs, message", [
    (dict(wbits=1), "1 bits are not possible"), (dict(abits=17), "17 bits"), (dict(rotation="triple"), "choose from none"),
    (dict(block=128), "64 channels are not a multiple of the Hadamard block 128"), (dict(block=12), "not a power of two")])
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hqdm.HQLinear(nn.Linear(64, 8), **kwargs)


def test_weight_scales_are_the_searched_ones():
    """A new layer starts from the 80-shrink search with p = 2.4 on its own weight; for double on W H."""
    for rotation in hqdm.ROTATIONS:
        new, _, plain = layer("conv", rotation)
        w = hqdm.hadamard(plain.weight.detach(), 1, 32) if rotation == "double" else plain.weight.detach()
        s, z = hqdm.search_scale(w.flatten(1), 4, False, 2.4)
        assert_close(new.log_s_w.exp(), s)
        assert_close(new.z_w, z)


def test_zero_point_stays_on_the_grid():
    """A learned zero point below 0 is held at 0: else 0.0 leaves the grid, and the bound on q_x with it."""
    new, x, _ = layer("conv", "none", 4, 7)
    new.z_x.data.fill_(-3.0)
    new.log_s_x.data -= 3                                        # so fine a grid that values are clipped at its end
    q_x, _ = new.quantize_input(x)
    assert q_x.min() >= 0 and q_x.abs().max() <= new.q_x_max
    new.z_x.data.fill_(400.0)                                    # and one past the grid's end at that end
    assert new.quantize_input(x)[0].max() <= 0
    new.z_x.data.fill_(-3.0)
    y = new(x)
    new.integer = True
    assert torch.equal(new(x), y)


def test_autocast_does_not_reach_the_integers():
    """Under bf16 autocast a layer gives what it gives in float32."""
    new, x, _ = layer()
    y = new(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(new(x), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
def test_memory_formats_change_nothing(rotation, device):
    """However the numbers lie in memory: NCHW and channels_last images, four-dimensional tokens and their transposes."""
    conv, x, _ = layer("conv", rotation, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.quantize_input(x)[0], conv.quantize_input(last)[0]) and torch.equal(conv(x), conv(last))
    linear, _, _ = layer("linear", rotation, device=device)
    tokens = torch.randn(4, 3, 5, 64, device=device)
    y = linear(tokens.flatten(1, 2)).view(4, 3, 5, 16)
    for same in (tokens, tokens.contiguous(memory_format=torch.channels_last), tokens.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_close(linear(same), y, rtol=1e-6, atol=1e-6)
        linear.integer = True
        assert_close(linear(same), y, rtol=1e-6, atol=1e-6)
        linear.integer = False


@pytest.mark.filterwarnings("ignore:.*lru_cache")
def test_a_layer_compiles_in_one_piece(monkeypatch):
    """torch.compile finds no break in a layer, and computes the same."""
    monkeypatch.setattr(hqdm, "INTERPRETED", False)              # nobody compiles for Triton's interpreter
    new, x, _ = layer("linear", "double", 4, 3)
    assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(x), new(x))


@pytest.mark.parametrize("rotation", ["none", "single"])
def test_fitted_scale_has_the_least_squared_error(rotation):
    """Of x itself for none, of H x for single: no scale from half to twice as large is better by more than 2 % (a sample was searched)."""
    torch.manual_seed(0)
    new = hqdm.HQConv2d(nn.Conv2d(64, 4, 3), 4, 3, rotation)
    x = torch.randn(4, 64, 8, 8) * (1 + 9 * (torch.arange(64) == 3))[:, None, None]      # one loud channel
    new.fit_input(x)
    v, z = (x, new.z_x) if rotation == "none" else (hqdm.hadamard(x), 0)
    def error(factor):
        s = new.log_s_x.exp().detach() * factor
        return (v - s * hqdm.quantize(v, s, z, 3, rotation != "none")).square().mean().item()
    assert error(1) <= 1.02 * min(map(error, torch.linspace(0.5, 2, 50)))


def test_fitted_scale_looks_everywhere():
    """A quiet picture first, loud ones after it: hardly anything is clipped."""
    new = hqdm.HQConv2d(nn.Conv2d(32, 4, 3), 4, 4)
    x = torch.cat([0.01 * torch.randn(2, 32, 32, 32), 5 * torch.randn(2, 32, 32, 32)])
    new.fit_input(x)
    assert (new.quantize_input(x)[0][2:].abs() == 7).float().mean() < 0.1


def test_no_bias_is_a_bias_of_zero():
    bare, zero = nn.Conv2d(32, 8, 1, bias=False), nn.Conv2d(32, 8, 1)
    zero.weight.data = bare.weight.data
    nn.init.zeros_(zero.bias)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(hqdm.HQConv2d(bare)(x), hqdm.HQConv2d(zero)(x))


def test_half_precision_inputs_are_taken_as_float32():
    new, x = hqdm.HQConv2d(nn.Conv2d(32, 8, 1), 4, 4), torch.randn(2, 32, 4, 4).bfloat16()
    new.fit_input(x.float())
    assert torch.equal(new(x), new(x.float()))


def test_float_weights_learn_and_freeze():
    """W32: y = conv(H (s_x q_x), W + B A); freezing, twice too, changes nothing and leaves nothing to learn."""
    torch.manual_seed(0)
    new, x = hqdm.HQConv2d(nn.Conv2d(32, 8, 3), 32, 4), torch.randn(2, 32, 5, 5)
    nn.init.normal_(new.lora_B, std=0.05)
    new.fit_input(x)
    w = new.weight + (new.lora_B @ new.lora_A.flatten(1)).view_as(new.weight)
    q, s = new.quantize_input(x)
    y = new(x)
    assert_close(y, F.conv2d(hqdm.hadamard(q * s), w, new.bias), rtol=1e-4, atol=1e-4)
    new.freeze(), new.freeze()
    assert torch.equal(new(x), y) and not any(p.requires_grad for p in new.parameters())


def test_other_integers_are_noticed():
    """What a frozen layer keeps belongs to its q_w: another tensor in its place, as after .to(device), is read anew."""
    a, b = (hqdm.HQConv2d(nn.Conv2d(32, 8, 1), 4, 4) for _ in "ab")
    a.freeze(), b.freeze()
    x = torch.randn(2, 32, 3, 3)
    a(x)
    a.q_w, a.s_w, a.z_w, a.bias = b.q_w.clone(), b.s_w, b.z_w, b.bias
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("kwargs", [dict(groups=2), dict(dilation=2), dict(padding=1, padding_mode="circular"), dict(padding=(1, 0)), dict(padding="same")])
def test_other_convolutions_are_refused(kwargs):
    with pytest.raises(ValueError, match="one number each"):
        hqdm.HQConv2d(nn.Conv2d(64, 8, 3, **kwargs))


def test_uneven_strides_are_refused():
    with pytest.raises(ValueError, match="one number each"):
        hqdm.HQConv2d(nn.Conv2d(32, 8, 3, stride=(1, 2)))
