"""Integer arithmetic: the same accumulators as the fake-quantized layer, to the last bit."""
import copy
import gc
import itertools
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import hqdm
from conftest import DEVICES, ROOT, small_unet, tiny_unet
from plumbing import blocks, int8, kernels


def conv_int64(q_x, q_w, stride, padding):
    """The oracle: channels-last convolution as loops over kernel and padding, int64, no library convolution in it."""
    q_x, q_w = F.pad(q_x.long(), (0, 0) + (padding,) * 4), q_w.long()
    _, _, kh, kw = q_w.shape
    h, w = (q_x.shape[1] - kh) // stride + 1, (q_x.shape[2] - kw) // stride + 1
    acc = 0
    for i in range(kh):
        for j in range(kw):
            patch = q_x[:, i:i + stride * h:stride, j:j + stride * w:stride]
            acc = acc + torch.einsum("bhwc,oc->bhwo", patch, q_w[:, :, i, j])
    return acc


def in_float64(layer, q_x, q_w):
    """Another oracle: PyTorch's own product in float64, which is exact below 2^53."""
    if isinstance(layer, hqdm.HQLinear):
        return F.linear(q_x.double(), q_w.double()).long()
    y = F.conv2d(q_x.double().movedim(-1, 1), q_w.double(), stride=layer.stride, padding=layer.padding)
    return y.movedim(1, -1).long()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("definition", [False, True])
@pytest.mark.parametrize("limit", [3, 7, 127, 480, 8160])
@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 1, 0), (1, 2, 1)])
def test_int_conv2d_is_the_integer_convolution(definition, limit, size, stride, padding, device):
    """Exact for any operand, stride and padding, and for shapes that no matrix unit likes (5 -> 3 channels)."""
    q_x, q_w = torch.randint(-limit, limit + 1, (2, 6, 6, 5)), torch.randint(-255, 256, (3, 5, size, size))
    product = hqdm.int_product.__wrapped__ if definition else hqdm.int_conv2d
    if definition and device != "cpu":
        with pytest.raises(ValueError, match="run on the cpu"):
            product(q_x.to(device), q_w.to(device), stride, padding)
        return
    for dtype in (torch.int16, torch.int32):
        acc = product(q_x.to(device, dtype), q_w.to(device, dtype), stride, padding)
        assert acc.dtype == torch.int32 and torch.equal(acc.cpu().long(), conv_int64(q_x, q_w, stride, padding))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_the_least_number_of_a_type(dtype, device):
    """-2^15 has no positive twin in int16, nor has -2^7 in int8: as activation and as weight it counts in full."""
    least = torch.full((3, 1, 1, 16), torch.iinfo(dtype).min, dtype=dtype)
    ones = torch.eye(16, dtype=dtype)[:8]
    for x, w in ((least, ones[:, :, None, None]), (ones[:, None, None], least.movedim(-1, 1))):
        acc = hqdm.int_conv2d(x.to(device), w.to(device))
        assert torch.equal(acc.cpu().long(), conv_int64(x, w, 1, 0))


def test_what_has_no_integer_product_is_refused():
    """Floats, channels that do not fit, and numbers past int32, where 0 would come back: named, not computed."""
    q_x, q_w = torch.ones(1, 2, 2, 8, dtype=torch.int32), torch.ones(8, 8, 1, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match="integer tensors"):
        hqdm.int_conv2d(q_x.float(), q_w)
    with pytest.raises(ValueError, match="q_x has 5 channels, q_w 8"):
        hqdm.int_conv2d(q_x[..., :5], q_w)
    assert hqdm.int_conv2d(q_x * 2**14, q_w * (2**14 - 1))[0, 0, 0, 0] == 2**17 * (2**14 - 1)
    with pytest.raises(ValueError, match=r"a filter \(3, 1\) is larger than the picture \(2, 2\)"):
        hqdm.int_conv2d(q_x, q_w.expand(8, 8, 3, 1))
    with pytest.raises(ValueError, match="2,147,483,648, past int32"):
        hqdm.int_conv2d(q_x * 2**14, -q_w * 2**14)
    with pytest.raises(ValueError, match="integers up to 268,435,456"):
        hqdm.walsh(torch.full((1, 8), -2**28), 1, 8)


@pytest.mark.filterwarnings("error:float convolutions")
def test_no_library_rounds_the_sums(monkeypatch):
    """Without oneDNN, as on a Mac, NNPACK would take over at 16 pictures; and what rounds all the same is said."""
    torch.manual_seed(0)
    layer, x = hqdm.HQConv2d(nn.Conv2d(64, 64, 3, padding=1), hqdm.Scheme(4, 3)), torch.randn(16, 64, 9, 9)
    hqdm.fit_scale(layer.activations, layer.channels_last(x))
    layer.freeze()
    with torch.backends.mkldnn.flags(enabled=False):
        fake = layer(x)
        layer.integer = True
        assert torch.equal(layer(x), fake)
        layer.integer, real = False, layer.product
        monkeypatch.setattr(layer, "product", lambda q_x, q_w: real(q_x, q_w) + (q_x.dtype == torch.float32))
        layer(x)                                     # a shape that was looked at
        with pytest.raises(UserWarning, match="do not add integers exactly"):
            layer(x[:, :, 1:])


def test_an_empty_batch():
    """No pictures in, none out, of the right shape: integer as fake."""
    for layer, x in ((hqdm.HQConv2d(nn.Conv2d(32, 8, 3)), torch.zeros(0, 32, 5, 5)),
                     (hqdm.HQLinear(nn.Linear(32, 8)), torch.zeros(0, 4, 32))):
        layer.activations.log_s_x.data.zero_()
        fake = layer(x)
        layer.integer = True
        assert layer(x).shape == fake.shape and len(fake) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_tall_products(device):
    """As many rows as 70 pictures have pixels: some matrix units refuse that where an operand lies the wrong way."""
    a, b = torch.randint(-7, 8, (70_000, 1, 1, 27), dtype=torch.int16), torch.randint(-480, 481, (12, 27, 1, 1), dtype=torch.int16)
    acc = hqdm.int_conv2d(a.to(device), b.to(device))
    assert torch.equal(acc.cpu().long().flatten(1), a.flatten(1).long() @ b.flatten(1).long().T)


def sums(layer, x):
    """The layer's accumulators in its present mode, as forward makes them."""
    q_x, _ = layer.activations(layer.channels_last(x), layer.dtype)
    return (layer.multiply_int if layer.integer else layer.multiply)(q_x, layer.operand()[0])


def check(layer, x, device):
    """All routes to the accumulator agree, and so do the outputs, before and after freezing."""
    layer, x = layer.to(device), x.to(device)
    hqdm.fit_scale(layer.activations, layer.channels_last(x), samples=512)
    with torch.no_grad():
        oracle, fake = in_float64(layer, layer.activations(layer.channels_last(x))[0], layer.operand()[0]), layer(x)
        assert oracle.abs().max() <= layer.bound < 2**31
        for frozen in (False, True):
            if frozen:
                layer.freeze()
            for layer.integer, layer.view in ((False, "B"), (True, "A"), (True, "B")):
                assert torch.equal(sums(layer, x).long(), oracle) and torch.equal(layer(x), fake)
            layer.integer = False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation, grid", [*((r, "midtread") for r in hqdm.ROTATIONS), ("single", "midrise")])
@pytest.mark.parametrize("wbits", range(2, 9))
@pytest.mark.parametrize("abits", range(2, 9))
def test_integer_layer_is_the_fake_layer(rotation, grid, wbits, abits, device):
    """Identical accumulators and outputs for W 2..8 x A 2..8: a linear layer, and one of four convolutions in turn.

    3x3 and 1x1, stride 1 and 2, both memory formats.
    """
    torch.manual_seed(wbits * 10 + abits)
    x, scheme = torch.randn(3, 32, 5, 5) * 3, hqdm.Scheme(wbits, abits, rotation, grid=grid)
    size, stride, padding, layout = [(3, 1, 1, torch.channels_last), (3, 2, 1, torch.channels_last),
                                     (1, 1, 0, torch.channels_last), (3, 1, 1, torch.contiguous_format)][(wbits + abits) % 4]
    check(hqdm.HQConv2d(nn.Conv2d(32, 8, size, stride, padding), scheme), x.contiguous(memory_format=layout), device)
    check(hqdm.HQLinear(nn.Linear(32, 8), scheme), x[:, :, 0].transpose(1, 2), device)


def full_scale(rotation, wbits, abits, device, kind="conv", grid="midtread"):
    """A frozen layer whose weights all lie at or one below the end of their range, and inputs at the end of theirs."""
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 8, 3, padding=1) if kind == "conv" else nn.Linear(1024, 64)
    layer = (hqdm.HQConv2d if kind == "conv" else hqdm.HQLinear)(plain, hqdm.Scheme(wbits, abits, rotation, grid=grid), packed=True)
    q_w = torch.randint(2**wbits - 2, 2**wbits, layer.weights.shape)
    layer.weights.q_w = hqdm.pack_weights(q_w, wbits)
    layer.weights.s_w.fill_(1.0)
    layer.activations.log_s_x.data.zero_()
    x = torch.full((3, 256, 4, 4) if kind == "conv" else (9, 1024), float(2 * layer.activations.q_max))
    x[1:] -= torch.randint(0, 2, x[1:].shape) * layer.activations.q_max      # past the grid's end, and at it or near
    return layer.to(device), x.to(device)


@pytest.mark.parametrize("kind, rotation, wbits, abits, grid", [
    ("conv", "none", 8, 8, "midtread"), ("conv", "single", 8, 8, "midtread"), ("conv", "single", 4, 4, "midtread"),
    ("conv", "double", 8, 8, "midtread"), ("linear", "none", 7, 8, "midtread"), ("conv", "single", 8, 7, "midrise")])
@pytest.mark.parametrize("device", DEVICES)
def test_worst_case_is_exact(kind, rotation, wbits, abits, grid, device):
    """Full-scale operands of the widest layer, odd sums past 2^24: exact in all modes, where a float32 product is not."""
    layer, x = full_scale(rotation, wbits, abits, device, kind, grid)
    q_x, q_w = layer.activations(layer.channels_last(x))[0], layer.operand()[0]
    oracle = in_float64(layer, q_x, q_w)
    assert oracle.abs().max() <= layer.bound
    outputs = []
    for layer.integer, layer.view in ((False, "B"), (True, "A"), (True, "B")):
        assert torch.equal(sums(layer, x).double(), oracle.float().double() if not layer.integer else oracle.double())
        outputs.append(layer(x))
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    past = bool(oracle.abs().max() >= 2**24)                     # the case is hard enough: float32 cannot even hold them
    assert q_w.dtype == torch.float64 and not torch.equal(oracle.float().long(), oracle) or not past


def test_the_choice_of_float64_is_about_the_sums():
    """Frozen weights of 2^24 / max |q_x| in sum: one below stays float32, at it float64; in training always float32."""
    layer = hqdm.HQLinear(nn.Linear(1024, 1), hqdm.Scheme(8, 8, "none"), packed=True)
    largest, q = 2**24 // 255, torch.zeros(1, 1024)
    q[0, :largest // 255], q[0, -1] = 255, largest % 255
    assert int(q.sum()) == largest
    for more, dtype in ((0, torch.float32), (1, torch.float64)):
        layer.weights.q_w = hqdm.pack_weights(q + more * (torch.arange(1024) == 1023), 8)
        assert layer.operand()[0].dtype == dtype
    for z, dtype in ((1, torch.float32), (254, torch.float32), (255, torch.float64)):        # |q_x| up to 254, 254, 255
        layer.activations.z_x = torch.full((1,), float(z))
        assert layer.operand()[0].dtype == dtype
    assert hqdm.HQLinear(nn.Linear(1024, 1), hqdm.Scheme(8, 8, "none")).operand()[0].dtype == torch.float32


def test_views_multiply_what_they_say(monkeypatch):
    """View A multiplies R q_x with q_w - z, view B q_x with (q_w - z) R: seen at the integer product itself."""
    layer = hqdm.HQConv2d(nn.Conv2d(64, 8, 3, padding=1))
    x, seen = torch.randn(2, 64, 4, 4), []
    hqdm.fit_scale(layer.activations, layer.channels_last(x))
    q_x, q_w = layer.activations(layer.channels_last(x))[0], layer.weights()[0]
    monkeypatch.setattr(hqdm, "int_product", lambda a, b, *_: seen.append((a.float(), b.float())) or torch.zeros(1, 1, 1, 1))
    for layer.integer, layer.view in ((True, "A"), (True, "B")):
        layer(x)
    assert torch.equal(seen[0][0], hqdm.walsh(q_x, -1)) and torch.equal(seen[0][1], q_w)
    assert torch.equal(seen[1][0], q_x) and torch.equal(seen[1][1], hqdm.walsh(q_w))


@pytest.mark.parametrize("block", [1, 32])
def test_the_bound_is_reached_but_never_passed(block):
    """sqrt(k) taps q_x_max q_w_max: equality for equal operands without rotation; with rotation random signs stay below."""
    taps, bound = 64, hqdm.accumulator_bound(64, 7, 15, block)
    R = torch.block_diag(*[hqdm.hadamard_matrix(block, dtype=torch.float64)] * (taps // block))
    signs = torch.randn(2000, taps, dtype=torch.float64).sign()
    largest = ((15 * signs) @ R * (7 * signs.roll(1, 0))).sum(1).abs().max()
    best = (15 * signs @ R).abs().sum(1).max() * 7               # the q_x that fits each weight row best
    assert largest <= best <= bound
    assert block > 1 or best == bound == 64 * 7 * 15


def test_sums_too_long_are_refused():
    """Before anything runs: sums that could pass 2^31."""
    with pytest.raises(ValueError, match="past int32"):
        hqdm.HQLinear(nn.Linear(2**15, 1), hqdm.Scheme(8, 8))
    largest = (2**31 - 1) // 255**2                  # products of two 8-bit numbers
    assert hqdm.HQLinear(nn.Linear(largest, 1), hqdm.Scheme(8, 8, "none"), packed=True).bound < 2**31
    with pytest.raises(ValueError, match="past int32"):
        hqdm.HQLinear(nn.Linear(largest + 1, 1), hqdm.Scheme(8, 8, "none"), packed=True)


def test_oblong_pictures_and_filters():
    """5 x 6 x 9 numbers and 3 x 1 filters, stride 2: height and width are not mixed up."""
    q_x, q_w = torch.randint(-7, 8, (2, 6, 9, 5)), torch.randint(-9, 10, (3, 5, 3, 1))
    for product in (hqdm.int_conv2d, hqdm.int_product.__wrapped__):
        assert torch.equal(product(q_x, q_w, 2, 1).long(), conv_int64(q_x, q_w, 2, 1))


def test_the_smallest_block():
    """Blocks of 2 are rotated, too, in both views."""
    check(hqdm.HQLinear(nn.Linear(32, 8), hqdm.Scheme(block=2)), torch.randn(4, 32), "cpu")


def test_weights_that_are_all_alike():
    """A row of equal weights is what R gathers: the operands of view B are as large as they can be."""
    conv, x = nn.Conv2d(32, 8, 3), torch.randn(3, 32, 5, 5) * 3
    conv.weight.data[0] = 1.0
    layer = hqdm.HQConv2d(conv)
    assert layer.operand()[0].abs().max() > 400
    check(layer, x, "cpu")


def test_integers_on_and_off(unet):
    """All layers or none; another view, or a float model, changes nothing."""
    with pytest.raises(ValueError, match="a quantized model"):
        hqdm.set_integer(unet)
    hqdm.quantize_network(unet, hqdm.Scheme(4, 3, block=16))
    hqdm.set_integer(unet, True, "A")
    with pytest.raises(ValueError, match="not a float one or view 'b'"):
        hqdm.set_integer(unet, True, "b")
    assert all(layer.integer and layer.view == "A" for layer in hqdm.layers(unet))
    hqdm.set_integer(unet, False)
    assert not any(layer.integer for layer in hqdm.layers(unet))


def cases(block):
    """Copies of a residual block in integers, each with something that plumbing/blocks.py must leave to the layers."""
    made = [copy.deepcopy(block) for _ in range(5)]
    made[0].conv1.forward = made[0].conv1.forward
    made[1].dropout = nn.Dropout2d(0.5).train()
    made[2].norm1 = nn.GroupNorm(32, 32)
    made[3].norm2.half()
    made[4].conv2.activations.block = 8              # of H, which Triton's matrix products do not take
    return made


@pytest.mark.skipif(not (torch.cuda.is_available() or kernels.INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("view", "AB")
@pytest.mark.parametrize("scheme", [hqdm.Scheme(4, 3, block=16), hqdm.Scheme(4, 3, block=16, grid="midrise"), hqdm.Scheme(4, 4, "none"), hqdm.Scheme(8, 8, "none")])
def test_blocks_in_fewer_passes(scheme, view, monkeypatch):
    """plumbing/blocks.py: the bits of the layers one by one, in both views, and those of the fake-quantized network.

    Where a layer is looked at, left in float or trained, the layers do it.
    """
    device, module, taken = torch.device(DEVICES[-1]), sys.modules["unet"], []
    teacher = small_unet(mults=(1,), attention=(8,), size=8)
    # The interpreter runs on a CPU, where GroupNorm is PyTorch's and rounds otherwise.
    monkeypatch.setattr(module.GroupNorm, "forward", lambda m, x: module.group_norm(x, m.num_groups, m.weight, m.bias, m.eps, m.silu))
    for name in ("residual", "attention"):
        takes, fast = kernels.FAST[name]
        monkeypatch.setitem(kernels.FAST, name, (takes, lambda *args, f=fast, name=name: taken.append(name) or f(*args)))
        monkeypatch.setattr(module, name, kernels.kernel(getattr(module, name).__wrapped__))
    unet = copy.deepcopy(teacher)
    hqdm.quantize_network(unet, scheme)
    x, t, y = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([1, 10])
    hqdm.calibrate(unet, teacher, [(x, t, y)])
    hqdm.freeze(unet)
    unet, x, t, y = (v.to(device) for v in (unet, x.contiguous(memory_format=torch.channels_last), t, y))
    blocks = [m for m in unet.modules() if type(m).__name__ in ("ResBlock", "Attention")]
    with torch.no_grad():
        fake = unet(x, t, y)
        assert not taken and len(blocks) > 5
        hqdm.set_integer(unet, view=view)
        assert torch.equal(unet(x, t, y), fake) and len(taken) == len(blocks) and set(taken) == {"residual", "attention"}
        if view == "A":
            return
        assert torch.equal(unet(x, t[:1], y), fake)                          # one t for all
        wide, takes = x.repeat(1, 11, 1, 1)[:, :32], kernels.FAST["residual"][0]
        assert takes(wide, blocks[0], t) and not any(takes(wide, case, t) for case in cases(blocks[0]))
        taken.clear()
        hook = blocks[0].norm1.register_forward_hook(lambda *_: None)
        blocks[-1].norm.register_forward_pre_hook(lambda *_: None)
        assert torch.equal(unet(x, t, y), fake) and len(taken) == len(blocks) - 2
        hook.remove()
        taken.clear()
        blocks[0].conv2.integer = False
        assert torch.equal(unet(x, t, y), fake) and len(taken) == len(blocks) - 2
        taken.clear()
    assert torch.equal(unet(x, t, y).detach(), fake) and not taken           # with gradients


@pytest.mark.parametrize("low, high", [(-3, 252), (-3, 253), (0, 255), (1, 256), (-8000, 8000), (-128, 127)])
def test_weights_for_triton_are_the_weights(low, high):
    """Digits and middle add up to them: one digit of as many as 256 integers, wherever these lie; else two."""
    q_w = torch.randint(low, high + 1, (5, 3, 3, 3), dtype=torch.int16)
    q_w[:, 0, 0, 0], q_w[:, 1, 1, 1] = low, high
    q_w = q_w.to(hqdm.narrow(max(-low, high)))
    digits, middle = int8.for_triton(q_w)
    assert digits.dtype == torch.int8 and len(digits) == 1 + (high - low > 255) and digits.shape[-1] % 16 == 0
    w = sum(digit.long() << 7 * i for i, digit in enumerate(digits)) + (0 if middle is None else middle[:, None, None, None])
    assert torch.equal(w[..., :3], q_w.movedim(1, -1).long()) and not digits[..., 3:].any()


@pytest.mark.skipif(not (torch.cuda.is_available() or kernels.INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("size", [(16, 8), (24, 25)])            # one turn; four
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_one_pass_has_the_bits_of_two(dtype, size, block, silu):
    """Norm and rounding at once, on a grid so fine that nearly every bit of H norm(x) / s is seen.

    (On a GPU: the interpreter fuses no multiply-add, and what a compiler may fuse is the danger here.)
    """
    device, module = torch.device(DEVICES[-1]), sys.modules["unet"]
    x = torch.randn(3, 64, *size, device=device).contiguous(memory_format=torch.channels_last)
    norm, s = module.GroupNorm(64, silu).to(device), torch.tensor([3e-6, 7e-7, 1.1e-6], device=device)
    z = None if block > 1 else torch.tensor([5.0, 0.0, -3.0], device=device)
    quantizer = types.SimpleNamespace(block=block, grid=hqdm.Grid(-2**22, 2**22, 1), of_steps=lambda n: (torch.eye(n, device=device) @ s, z))
    layer = types.SimpleNamespace(activations=quantizer, dtype=dtype)
    with torch.no_grad():
        y = blocks.last(module.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu))
        expected = kernels.rotate_and_quantize(y, s, z, quantizer.grid, block, torch.float32)
        with torch.autocast(device.type, torch.bfloat16):        # bf16 scales would be others
            q, s_x = blocks.rounded(norm, layer, blocks.last(x))
    assert q.dtype == dtype and torch.equal(q.float(), expected) and torch.equal(s_x, s) and expected.abs().max() > 2**21


def test_views_need_no_float():
    """Both views of one weight row by hand: sum (q_w - z) (R q_x) = sum ((q_w - z) R) q_x, because R is symmetric."""
    q_x, q_w = torch.tensor([[3, 0, -1, 2]]), torch.tensor([[5, -7, 0, 8]])
    assert int((hqdm.walsh(q_x, 1, 4) * q_w).sum()) == int((q_x * hqdm.walsh(q_w, 1, 4)).sum()) == 68
    assert math.isclose(hqdm.hadamard(q_x.float(), 1, 4)[0, 0], 2.0)


def test_what_does_not_pack_is_refused():
    """Outside of the bits' range, between integers, or of more than a byte: no packed weight is another one."""
    for bits, wrong in ((4, 16.0), (4, -1.0), (3, 8.0), (4, 2.5), (9, 0.0), (8, 256.0)):
        with pytest.raises(ValueError, match=f"{bits} bits .8 at most. pack the integers 0"):
            hqdm.pack_weights(torch.tensor([1.0, wrong]), bits)


def test_a_nan_is_one_in_integers_too():
    """Integers have no NaN and no infinity: a sample that came with one leaves with NaN in both modes, the others as they were."""
    unet = tiny_unet()
    teacher = copy.deepcopy(unet)
    hqdm.quantize_network(unet, hqdm.Scheme(4, 3, timesteps=(9, 0)))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([9, 0])
    hqdm.calibrate(unet, teacher, [(x, torch.full((2,), s)) for s in (9, 0)])
    y = unet(x, t)
    for bad, on in itertools.product((math.nan, math.inf, -math.inf), (False, True)):
        x[1, 0, 3, 3] = bad
        hqdm.set_integer(unet, on)
        for out in (unet(x, t), unet(x=x, t=t)):
            assert out[1].isnan().all() and torch.equal(out[0], y[0])
    numbers, classes = (hqdm._keep_nan(unet, (x,), {}, y) for y in (torch.zeros(2), torch.tensor([3, 4])))
    assert numbers.isnan().tolist() == [False, True] and classes.tolist() == [3, 4]  # whole numbers stay such


@pytest.mark.parametrize("end", [lambda y: (y, y), lambda y: y.sum(), lambda y: y[:1], lambda y: y])
def test_integers_of_networks_that_give_other_things(end):
    """A tuple, one number, fewer rows, an input by name: no NaN to look for, and nothing in the way."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))

        def forward(self, x):
            return end(self.layers(x))
    net, x = Net(), torch.randn(3, 32)
    teacher = copy.deepcopy(net)
    hqdm.quantize_network(net)
    hqdm.calibrate(net, teacher, [(x,)])
    fake = net(x)
    hqdm.set_integer(net)
    for y in (net(x), net(x=x)):
        assert all(map(torch.equal, y, fake)) if isinstance(fake, tuple) else torch.equal(y, fake)


def test_narrow_types():
    """What fits int8 is int8; what a kernel's two digits hold is int16."""
    sizes = {0: torch.int8, 127: torch.int8, 128: torch.int16, 2**14 - 1: torch.int16, 2**14: torch.int32}
    assert {n: hqdm.narrow(n) for n in sizes} == sizes


@pytest.mark.parametrize("limit, bits", [(127, 7), (64, 6), (125, 6)])
def test_digits_add_up(limit, bits):
    """Every integer of 16 bits is the sum of its digits, each within its limits."""
    x = torch.arange(-2**15, 2**15)
    digits = int8.int8_digits(x, 2**15, limit, bits)
    assert torch.equal(sum(d.long() << shift for shift, d in digits), x)
    *low, high = [d.long() for _, d in digits]
    assert all(0 <= d.min() and d.max() < 2**bits for d in low) and high.abs().max() <= limit


onednn = pytest.mark.skipif(not kernels.onednn_is_exact(), reason="no oneDNN int8 convolution here")


@onednn
@pytest.mark.parametrize("low, high", [(-3, 3), (-7, 7), (0, 7), (0, 255), (-100, 155), (-128, 127), (5, 9), (0, 0), (-128, 128)])
@pytest.mark.parametrize("largest", [1, 15, 127, 480, 8160])
def test_convolutions_of_bytes(low, high, largest):
    """oneDNN's sums are the int64 ones, whatever the zero point; None, and no guess, where they might not be."""
    for size, stride, padding, C in ((3, 1, 1, 101), (1, 2, 0, 40), (2, 2, 1, 5)):
        q_x = torch.randint(low, high + 1, (2, 6, 5, C)).to(torch.int16)
        q_w = torch.randint(-largest, largest + 1, (9, C, size, size)).to(torch.int16)
        q_x[0, 0, 0, :2], q_w[0] = torch.tensor([low, high]), largest
        q_x[1], q_w[1] = high, -largest
        acc, exact = int8.onednn_product(q_x, q_w, stride, padding), conv_int64(q_x.long(), q_w.long(), stride, padding)
        sure = high - low < 256 and C * size**2 * largest * max(high, -low) < 2**24
        assert acc is None if high - low > 255 else acc is not None or not sure
        assert acc is None or torch.equal(acc.long(), exact)
        assert torch.equal(hqdm.int_conv2d(q_x, q_w, stride, padding).long(), exact)


@onednn
def test_sums_past_float32_are_left_to_others():
    """An odd sum above 2^24 is no float32: no convolution with float32 sums, and still the right integer."""
    q_x, q_w = torch.full((1, 3, 3, 550), 255, dtype=torch.int16), torch.full((2, 550, 3, 3), 15, dtype=torch.int8)
    q_w[0, 0, 0, 0] = 14
    assert int8.onednn_product(q_x, q_w, 1, 0) is None
    assert hqdm.int_conv2d(q_x, q_w).flatten().tolist() == [255 * (15 * 4950 - 1), 255 * 15 * 4950]


@onednn
def test_prepared_weights_follow_their_tensor():
    """They are made once for a tensor and its views, anew after it was written to, and go with it."""
    q_w, q_x, before = torch.randint(-9, 10, (8, 16), dtype=torch.int8), torch.randint(-3, 4, (4, 1, 1, 16), dtype=torch.int8), len(int8._PREPARED)
    first = int8.packed(q_w[:, :, None, None], 127, 1, 0)
    assert int8.packed(q_w[:, :, None, None], 127, 1, 0) is first and int8.packed(q_w[:4, :, None, None], 127, 1, 0) is not first
    for _ in range(2):
        assert torch.equal(hqdm.int_product(q_x, q_w[:, :, None, None])[:, 0, 0].long(), q_x[:, 0, 0].long() @ q_w.long().T)
        q_w[2] += 1
    assert len(int8._PREPARED) == before + 1
    del q_w, first
    gc.collect()
    assert len(int8._PREPARED) == before


def test_a_graph_takes_prepared_weights_and_keeps_none(monkeypatch):
    """While a CUDA graph is recorded, what was prepared before is taken; what is made then is made anew each time."""
    old, new = (torch.randint(-200, 56, (8, 16, 1, 1), dtype=torch.int16) for _ in range(2))
    first = int8.for_triton(old)
    monkeypatch.setattr(int8, "captured", lambda x: True)
    assert int8.for_triton(old) is first and int8.for_triton(new) is not int8.for_triton(new)
    old += 1
    assert int8.for_triton(old) is not first


def test_products_without_onednn(monkeypatch):
    """im2col and a matrix product add up to the same."""
    q_x, q_w = torch.randint(-7, 8, (2, 5, 5, 32), dtype=torch.int8), torch.randint(-99, 100, (8, 32, 3, 3), dtype=torch.int8)
    both = [hqdm.int_product(q_x, q_w, 1, 1)]
    monkeypatch.setattr(kernels, "onednn_is_exact", lambda: False)
    both.append(hqdm.int_product(q_x, q_w, 1, 1))
    assert torch.equal(*both) and torch.equal(both[0].long(), conv_int64(q_x.long(), q_w.long(), 1, 1))


@pytest.mark.parametrize("product", [lambda *_: None, lambda q_x, *_: q_x.new_zeros(3, 4, 3, 9)])
def test_a_missing_or_wrong_convolution_is_noticed(product, monkeypatch, capsys):
    """None, as where an operator is not there, and other sums: said once, and not used."""
    monkeypatch.setattr(int8, "onednn_product", product)
    int8.onednn_is_exact.cache_clear()
    try:
        assert [int8.onednn_is_exact() for _ in range(2)] == [False, False]
    finally:
        int8.onednn_is_exact.cache_clear()
    assert capsys.readouterr().out.count("no exact int8 convolution") == 1


@pytest.mark.parametrize("block, grid", [(32, hqdm.Grid(-3, 3)), (32, hqdm.Grid(-7, 7, 2)), (1, hqdm.Grid(0, 7)), (8, hqdm.Grid(-3, 3))])
def test_rounding_in_place(block, grid):
    """Without gradients a CPU rounds in place: the same bits, and x stays as it was."""
    x, s, z = torch.randn(3, 4, 64) * 3, torch.rand(3) + 0.3, torch.tensor([0.0, 2.0, 5.0]) if block == 1 else None
    x[0, 0, :4] = torch.tensor([0.5, 1.5, -0.5, 40.0])
    before = x.clone()
    with torch.no_grad():
        for dtype in (torch.float32, torch.int8):
            assert torch.equal(hqdm.rotate_and_quantize(x, s, z, grid, block, dtype),
                               hqdm.rotate_and_quantize.__wrapped__(x, s, z, grid, block, dtype))
    assert torch.equal(x, before)
    y = hqdm.rotate_and_quantize(x.requires_grad_(), s, z, grid, block)      # with gradients, as it is defined
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(
        hqdm.rotate_and_quantize.__wrapped__(x, s, z, grid, block).sum(), x)[0])


def test_cpus_without_vnni():
    """Older instruction sets add int8 products in pairs as int16: our digits are small enough not to saturate it."""
    code = ("import torch, hqdm\n"
            "for x, w in (3, 125), (3, 126), (7, 121), (63, 85), (127, 64), (127, 127), (255, 255), (96, 15), (127, 4159):\n"
            "    a, b = torch.randint(-x, x + 1, (40, 1, 1, 64)), torch.randint(-w, w + 1, (24, 64, 1, 1))\n"
            "    a[0], a[1], b[0], b[1] = x, -x, w, -w\n"
            "    assert torch.equal(hqdm.int_conv2d(a, b), hqdm.int_product.__wrapped__(a, b)), (x, w)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)
