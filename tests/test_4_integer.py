"""Integer arithmetic: the same accumulators as the fake-quantized layer, to the last bit."""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import hqdm
from conftest import DEVICES


def conv_int64(q_x, q_w, stride, padding):
    """The oracle: a convolution as four loops over kernel and padding, int64, with no library convolution in it."""
    q_x, q_w = F.pad(q_x.long(), (padding,) * 4), q_w.long()
    _, _, kh, kw = q_w.shape
    h, w = (q_x.shape[2] - kh) // stride + 1, (q_x.shape[3] - kw) // stride + 1
    acc = 0
    for i in range(kh):
        for j in range(kw):
            patch = q_x[:, :, i:i + stride * h:stride, j:j + stride * w:stride]
            acc = acc + torch.einsum("bchw,oc->bohw", patch, q_w[:, :, i, j])
    return acc


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("route", ["int8", "int64"])
@pytest.mark.parametrize("limit", [3, 7, 127, 480, 8160])
@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 1, 0), (1, 2, 1)])
def test_int_conv2d_is_the_integer_convolution(route, limit, size, stride, padding, device):
    """Exact for any operand up to 14 bits, stride and padding, and for shapes that no matrix unit likes (5 -> 3 channels)."""
    q_x = torch.randint(-limit, limit + 1, (2, 5, 6, 6))
    q_w = torch.randint(-255, 256, (3, 5, size, size))
    if device != "cpu" and route == "int64":
        with pytest.raises(ValueError, match="runs on the cpu"):
            hqdm.int_conv2d(q_x.to(device), q_w.to(device), stride, padding, route)
        return
    acc = hqdm.int_conv2d(q_x.to(device, torch.int16), q_w.to(device, torch.int16), stride, padding, route)
    assert acc.dtype == torch.int32 and torch.equal(acc.cpu().long(), conv_int64(q_x, q_w, stride, padding))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_the_least_number_of_a_type(dtype, device):
    """-2^15 has no positive twin in int16, nor has -2^7 in int8: as activation and as weight it counts as large as it is."""
    least, ones = torch.full((3, 16), torch.iinfo(dtype).min, dtype=dtype, device=device), torch.eye(16, dtype=dtype, device=device)[:8]
    for x, w in ((least, ones), (ones, least)):
        assert torch.equal(hqdm.int_linear(x, w).cpu(), hqdm.int_linear(x.cpu(), w.cpu(), "int64"))


def test_what_is_no_integer_product_is_refused():
    """Floats, routes and views that do not exist, and activations larger than those that weights were prepared for: never a wrong sum."""
    x, w = torch.full((2, 8), 9, dtype=torch.int8), torch.full((3, 8), 2, dtype=torch.int8)
    with pytest.raises(TypeError, match="integer tensors"):
        hqdm.int_conv2d(torch.zeros(1, 8, 2, 2), torch.zeros(8, 8, 1, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="'int16' does not exist; choose int8 or int64"):
        hqdm.int_linear(x, w, "int16")
    with pytest.raises(TypeError, match="the weights themselves"):
        hqdm.int_linear(x, hqdm.int_operand(w), "int64")
    prepared = hqdm.int_operand(w, x_max=3)
    assert torch.equal(hqdm.int_linear(x // 3, prepared), hqdm.int_linear(x // 3, w, "int64"))
    if prepared.shifts is not None:                              # CPUs; the kernel takes up to 14 bits whatever it was prepared for
        with pytest.raises(ValueError, match="up to 3, not 9"):
            hqdm.int_linear(x, prepared)
    else:
        with pytest.raises(ValueError, match="up to 16383, not 20000"):
            hqdm.int_linear(x.int() + 19991, prepared)
    layer = hqdm.HQLinear(nn.Linear(32, 8), 4, 4)
    with pytest.raises(ValueError, match="view 'b' does not exist; choose A or B"):
        layer.integer_accumulator(layer.quantize_input(torch.randn(2, 32))[0], "b")


def test_an_empty_batch():
    """No pictures in, none out, of the right shape: integer as fake."""
    for layer, x in ((hqdm.HQConv2d(nn.Conv2d(32, 8, 3), 4, 4), torch.zeros(0, 32, 5, 5)), (hqdm.HQLinear(nn.Linear(32, 8), 4, 4), torch.zeros(0, 32))):
        fake = layer(x)
        layer.integer = True
        assert layer(x).shape == fake.shape and len(fake) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_tall_products(device):
    """As many rows as 70 pictures have pixels: some matrix units refuse that where an operand lies the wrong way round."""
    a, b = torch.randint(-7, 8, (70_000, 27), dtype=torch.int16), torch.randint(-480, 481, (12, 27), dtype=torch.int16)
    assert torch.equal(hqdm.int_linear(a.to(device), b.to(device)).cpu().long(), a.long() @ b.long().T)


def check(layer, x, device):
    """All routes to the accumulator agree, and so do the outputs, before and after freezing."""
    layer, x = layer.to(device), x.to(device)
    layer.clock.set(torch.zeros(len(x), device=device))
    layer.fit_input(x)
    with torch.no_grad():
        q_x, _ = layer.quantize_input(x)
        q_w, _ = layer.operand()
        sums = [layer.integer_accumulator(q_x, view, route) for view in "AB" for route in ("int8", "int64")[:1 + (device == "cpu")]]
        if isinstance(layer, hqdm.HQConv2d):
            oracle = conv_int64(q_x.cpu(), q_w.cpu(), layer.stride, layer.padding)
        else:
            oracle = q_x.cpu().long() @ q_w.cpu().long().T
        assert all(torch.equal(acc.cpu().long(), oracle) for acc in sums)
        assert torch.equal(layer.accumulator(q_x, q_w).cpu(), oracle.float())
        assert oracle.abs().max() <= layer.bound < 2**31
        fake = layer(x)
        for frozen in (False, True):
            if frozen:
                layer.freeze()
            layer.integer = False
            assert torch.equal(layer(x), fake)
            for view in "AB":
                layer.integer, layer.view = True, view
                assert torch.equal(layer(x), fake)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
@pytest.mark.parametrize("wbits", range(2, 9))
@pytest.mark.parametrize("abits", range(2, 9))
def test_integer_layer_is_the_fake_layer(rotation, wbits, abits, device):
    """Identical accumulators and outputs for W 2..8 x A 2..8: 3x3 and 1x1, stride 1 and 2, both memory formats, linear."""
    torch.manual_seed(wbits * 10 + abits)
    x = torch.randn(3, 32, 5, 5) * 3
    for size, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 1, 0)):
        conv = nn.Conv2d(32, 8, size, stride, padding)
        check(hqdm.HQConv2d(conv, wbits, abits, rotation), x.contiguous(memory_format=torch.channels_last), device)
    check(hqdm.HQConv2d(conv, wbits, abits, rotation), x, device)
    check(hqdm.HQLinear(nn.Linear(32, 8), wbits, abits, rotation), x[:, :, 0].transpose(1, 2), device)


@pytest.mark.parametrize("rotation, wbits, abits", [("none", 8, 8), ("single", 8, 8), ("single", 4, 4), ("double", 8, 8)])
@pytest.mark.parametrize("device", DEVICES)
def test_worst_case_is_exact(rotation, wbits, abits, device):
    """Full-scale operands of the widest layer of the UNet, sums near and past 2^24: the split keeps them exact."""
    layer = hqdm.HQConv2d(nn.Conv2d(256, 8, 3, padding=1), wbits, abits, rotation)
    torch.manual_seed(0)
    q_w = torch.randint(-layer.q_w_max, layer.q_w_max + 1, layer.shape)
    q_w[0] = layer.q_w_max                                       # one channel with every weight at the end of its range
    q_w[1] = torch.randint(layer.q_w_max // 2, layer.q_w_max + 1, layer.shape[1:])      # one with large odd and even weights
    q_w = (hqdm.walsh(q_w, 1, 32) if rotation == "single" else q_w).float()
    q_x = torch.where(torch.randn(3, 256, 4, 4) > 0, layer.q_x_max, -layer.q_x_max).float()
    q_x[0] = layer.q_x_max
    q_x[1] = torch.randint(layer.q_x_max // 2, layer.q_x_max + 1, q_x.shape[1:])
    oracle = conv_int64(q_x, q_w, 1, 1)
    assert torch.equal(layer.accumulator(q_x.to(device), q_w.to(device)).cpu(), oracle.float())
    assert oracle.abs().max() <= layer.bound
    # The case is hard enough: above 2^24 a plain float32 convolution is wrong, which is why accumulator cuts into digits.
    assert oracle.abs().max() < 2**24 or not torch.equal(layer.multiply(q_x, q_w), oracle.float())


def test_views_multiply_what_they_say(monkeypatch):
    """View A multiplies R q_x with q_w - z, view B q_x with (q_w - z) R: seen at the integer product itself."""
    layer = hqdm.HQConv2d(nn.Conv2d(64, 8, 3, padding=1), 4, 4)
    layer.fit_input(x := torch.randn(2, 64, 4, 4))               # no clock: both samples have the only step's scale
    q_x, q_w, seen = layer.quantize_input(x)[0].detach(), layer.quantize_weight()[0].detach(), []
    monkeypatch.setattr(hqdm, "int_operand", lambda q_w, x_max, w_max: q_w)
    monkeypatch.setattr(hqdm.HQConv2d, "multiply_int", lambda self, a, b, route, x_max, scales: seen.append((a, b)))
    for view in "AB":
        layer.view = view
        layer.integer_accumulator(q_x)
    assert torch.equal(seen[0][0].float(), hqdm.walsh(q_x)) and torch.equal(seen[0][1].float(), q_w)
    assert torch.equal(seen[1][0].float(), q_x) and torch.equal(seen[1][1].float(), hqdm.walsh(q_w))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer, wbits, abits", [(nn.Linear(1024, 64), 7, 8), (nn.Conv2d(64, 8, 3), 8, 8), (nn.Conv2d(128, 8, 3), 8, 8), (nn.Conv2d(256, 8, 3), 8, 8)])
def test_odd_sums_past_2_to_the_24(layer, wbits, abits, device):
    """All operands at or one below their largest: sums that no float32 sum keeps, odd ones too; with a gradient and without."""
    torch.manual_seed(0)
    layer = (hqdm.HQLinear if layer.weight.ndim == 2 else hqdm.HQConv2d)(layer, wbits, abits, "none")
    q_w = layer.q_w_max - torch.randint(0, 2, layer.shape)
    q_x = layer.q_x_max - torch.randint(0, 2, (9, 1024) if len(layer.shape) == 2 else (3, layer.shape[1], 6, 6))
    oracle = layer.multiply(q_x.double(), q_w.double()).float()
    q_x, q_w = q_x.float().to(device), q_w.float().to(device)
    assert layer.bound >= 2**24
    for x in (q_x, q_x.clone().requires_grad_()):
        assert torch.equal(layer.accumulator(x, q_w).cpu(), oracle)


@pytest.mark.parametrize("block", [1, 32])
def test_the_bound_is_reached_but_never_passed(block):
    """sqrt(k) taps q_x_max q_w_max: equality for all-equal operands without rotation; with rotation random signs stay below."""
    taps, bound = 64, hqdm.accumulator_bound(64, 7, 15, block)
    R = torch.block_diag(*[hqdm.hadamard_matrix(block, dtype=torch.float64)] * (taps // block))
    signs = torch.randn(2000, taps, dtype=torch.float64).sign()
    largest = ((15 * signs) @ R * (7 * signs.roll(1, 0))).sum(1).abs().max()
    best = (15 * signs @ R).abs().sum(1).max() * 7               # the q_x that fits each weight row best
    assert largest <= best <= bound
    assert block > 1 or best == bound == 64 * 7 * 15


@pytest.mark.parametrize("width, rotation, message", [(2**15, "single", "past int32"), (2**17, "none", "no bit for the weights")])
def test_sums_too_long_are_refused(width, rotation, message):
    """Before anything runs: sums that could pass 2^31, and sums too long for the float32 form."""
    with pytest.raises(ValueError, match=message):
        hqdm.HQLinear(nn.Linear(width, 1), 8, 8, rotation)


def test_oblong_pictures_and_filters():
    """5 x 6 x 9 numbers and 3 x 1 filters, stride 2: height and width are not mixed up."""
    q_x, q_w = torch.randint(-7, 8, (2, 5, 6, 9)), torch.randint(-9, 10, (3, 5, 3, 1))
    for route in ("int8", "int64"):
        assert torch.equal(hqdm.int_conv2d(q_x, q_w, 2, 1, route).long(), conv_int64(q_x, q_w, 2, 1))


def test_weights_that_are_all_alike():
    """A row of equal weights is what R gathers: the operands of view B are as large as they can be."""
    conv, x = nn.Conv2d(32, 8, 3), torch.randn(3, 32, 5, 5) * 3
    conv.weight.data[0] = 1.0
    layer = hqdm.HQConv2d(conv, 4, 4)
    layer.fit_input(x)
    fake = layer(x)
    assert layer.operand()[0].abs().max() > 400
    layer.integer = True
    for layer.view in "AB":
        assert torch.equal(layer(x), fake)


def test_integers_on_and_off(unet):
    hqdm.quantize_unet(unet, 4, 3, block=16)
    hqdm.set_integer(unet, True, "A")
    assert all(layer.integer and layer.view == "A" for layer in hqdm.layers(unet))
    hqdm.set_integer(unet, False)
    assert not any(layer.integer for layer in hqdm.layers(unet))


def test_views_need_no_float():
    """Both views of one weight row by hand: sum (q_w - z) (R q_x) = sum ((q_w - z) R) q_x, because R is symmetric."""
    q_x, q_w = torch.tensor([[3, 0, -1, 2]]), torch.tensor([[5, -7, 0, 8]])
    assert int((hqdm.walsh(q_x, 1, 4) * q_w).sum()) == int((q_x * hqdm.walsh(q_w, 1, 4)).sum()) == 68
    assert math.isclose(hqdm.hadamard(q_x.float(), 1, 4)[0, 0], 2.0)


def test_a_float_model_has_no_integer_form(unet):
    with pytest.raises(ValueError, match="no quantized layer"):
        hqdm.set_integer(unet)


def tf32(v):
    """Keep 11 significant bits, as the operands of a TF32 product do."""
    mantissa, exponent = v.frexp()
    return (mantissa * 2**11).round().ldexp(exponent - 11)


@pytest.mark.parametrize("rotation, wbits, abits, channels", [("single", 8, 4, 64), ("single", 8, 2, 64), ("single", 7, 4, 64), ("none", 8, 8, 256)])
def test_tf32_units_multiply_exactly(rotation, wbits, abits, channels, monkeypatch):
    """No operand of any product has more than 11 bits: rounding them all to TF32 changes nothing."""
    layer = hqdm.HQConv2d(nn.Conv2d(channels, 4, 3, padding=1), wbits, abits, rotation)
    torch.manual_seed(0)
    q_w = torch.randint(layer.q_w_max // 2, layer.q_w_max + 1, layer.shape)
    q_w = (hqdm.walsh(q_w, 1, 32) if rotation == "single" else q_w).float()
    q_x = torch.randint(-layer.q_x_max, layer.q_x_max + 1, (1, channels, 4, 4)).float()
    real = layer.multiply
    monkeypatch.setattr(layer, "multiply", lambda a, b: real(tf32(a), tf32(b)))
    assert torch.equal(layer.accumulator(q_x, q_w), conv_int64(q_x, q_w, 1, 1).float())


def test_split_sums_have_the_gradient_of_the_product():
    """Cutting weights into digits changes the value's rounding, never the gradient."""
    layer = hqdm.HQConv2d(nn.Conv2d(256, 4, 3, padding=1), 8, 8, "none")
    q_x = torch.randint(0, 256, (1, 256, 4, 4)).float().requires_grad_()
    q_w = torch.randint(-255, 256, layer.shape).float().requires_grad_()
    assert layer.bound >= 2**24
    g = torch.randn(1, 4, 4, 4)
    for a, b in zip(torch.autograd.grad(layer.accumulator(q_x, q_w), (q_x, q_w), g),
                    torch.autograd.grad(F.conv2d(q_x, q_w, padding=1), (q_x, q_w), g)):
        torch.testing.assert_close(a, b)


def test_cpus_without_vnni():
    """Older instruction sets add int8 products in pairs as int16: our digits are small enough not to saturate it."""
    code = ("import torch, hqdm\n"
            "for x, w in (3, 125), (3, 126), (7, 121), (63, 85), (127, 64), (127, 127), (255, 255), (96, 15), (127, 4159):\n"
            "    a, b = torch.randint(-x, x + 1, (40, 64)), torch.randint(-w, w + 1, (24, 64)); a[0] = x; a[1] = -x; b[0] = w; b[1] = -w\n"
            "    assert torch.equal(hqdm.int_linear(a, b), hqdm.int_linear(a, b, 'int64')), (x, w)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)
