"""Whole networks: integer pictures, calibration, threads, checkpoints, scores, and bad input to sample.py."""
import contextlib
import copy
import functools
import json
import math
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, small_unet, tiny_unet
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint as compute_again

import hqdm
import sample
from plumbing import runs
from unet import UNet, add_noise, ddim_timesteps

TIMES = tuple(ddim_timesteps(4).tolist())
SCHEME = hqdm.Scheme(4, 3, "single", block=16, rank=4, timesteps=TIMES)
BUNDLED = ["teacher.pt", "w4a3-single-midrise.pt", "w4a3-none.pt", "w4a4-single.pt"]


@functools.cache
def made(scheme):
    teacher = tiny_unet()
    student = copy.deepcopy(teacher)
    hqdm.quantize_network(student, scheme)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 10])
    with pytest.MonkeyPatch.context() as m:                      # from fewer values: faster
        m.setattr(hqdm, "fit_scale", functools.partial(hqdm.fit_scale, samples=1024))
        hqdm.calibrate(student, teacher, [(x, torch.full((2,), t), y) for t in scheme.timesteps])
    for layer in hqdm.layers(student):
        torch.nn.init.normal_(layer.weights.lora_B, std=0.01)
    return student, teacher


def quantized(frozen=False, **changes):
    """A small UNet, quantized as SCHEME says and calibrated, LoRA filled so that folding it matters; its teacher."""
    student, teacher = copy.deepcopy(made(SCHEME._replace(**changes)))
    torch.manual_seed(0)
    if frozen:
        hqdm.freeze(student)
    return student, teacher


def empty(**changes):
    """The same, packed and without a value in it; takes a moment."""
    network = tiny_unet()
    hqdm.quantize_network(network, SCHEME._replace(**changes), packed=True)
    return network


def some_input():
    return torch.randn(2, 3, 32, 32), torch.tensor([999, 0]), torch.tensor([1, 10])


# ---------------------------------------------------------------- quantized networks

@pytest.mark.parametrize("rotation, grid", [*((r, "midtread") for r in hqdm.ROTATIONS), ("single", "midrise")])
def test_integer_pictures_are_the_fake_quantized_pictures(rotation, grid):
    """Training form, frozen form, integer view A and view B: the same uint8 pictures, byte for byte."""
    student, _ = quantized(rotation=rotation, grid=grid)
    pictures = [sample.draw(student, 2, 3)[0]]
    hqdm.freeze(student)
    pictures.append(sample.draw(student, 2, 3)[0])
    for view in "AB":
        hqdm.set_integer(student, True, view)
        pictures.append(sample.draw(student, 2, 3)[0])
    assert all(torch.equal(p, pictures[0]) for p in pictures) and pictures[0].float().std() > 10


def test_every_layer_is_in_the_report_and_none_is_forgotten():
    """Each conv and linear is quantized, each other module with parameters in float: why, and all their bytes.

    8-bit layers by name, the rest at the asked bits; what a layer takes is what its packed tensors take.
    """
    unet = small_unet()
    size = 4 * sum(p.numel() for p in unet.parameters())
    rows = {r["layer"]: r for r in hqdm.quantize_network(unet, SCHEME)}
    assert not any(type(m) in (torch.nn.Conv2d, torch.nn.Linear) for m in unet.modules())
    assert len(hqdm.layers(unet)) == sum(r["wbits"] != 32 for r in rows.values())
    eight = {"conv_in": 8, "conv_out": 8, "time_mlp.0": 8, "down.0.resample": 8}
    for name, bits in {**eight, "mid1.conv1": 4}.items():
        assert rows[name]["wbits"] == bits and rows[name]["abits"] == (8 if name in eight else 3)
    assert all(r["rotation"] == "single" or r["note"] for r in rows.values()) and "a table" in rows["class_emb"]["note"]
    assert sum(r["float_bytes"] for r in rows.values()) == size
    text = runs.report_table(list(rows.values()))
    assert f"total {size:,d} bytes in float32" in text and "q k^T" in text and "no matrix" in text
    hqdm.freeze(unet)
    for name, layer in unet.named_modules():
        if isinstance(layer, hqdm.HQLayer):
            assert sum(v.numel() * v.element_size() for v in layer.state_dict().values()) == rows[name]["bytes"]


def test_rows_of_the_report():
    """What each column says of layers with and without bias, and of a float module, by hand."""
    net = torch.nn.Sequential(torch.nn.Conv2d(32, 8, 3, bias=False), torch.nn.Linear(64, 4), torch.nn.LayerNorm(4))
    conv, linear, norm = hqdm.quantize_network(net, hqdm.Scheme(4, 3, timesteps=(9, 0)), eight_bits=["1"])
    assert (conv["kind"], linear["kind"], norm["kind"]) == ("Conv2d", "Linear", "LayerNorm")
    assert [r["float_bytes"] for r in (conv, linear, norm)] == [4 * 8 * 288, 4 * (4 * 64 + 4), 4 * 8]
    # packed weights, s_w, z_w, bias, and s_x of two steps; asymmetric activations have two z_x more
    assert conv["bytes"] == 8 * 288 // 2 + 8 * (4 + 1 + 4) + 2 * 4 and linear["bytes"] == 4 * 64 + 4 * (4 + 1 + 4) + 4 * 4
    assert [(r["wbits"], r["abits"], r["rotation"], r["block"]) for r in (conv, linear, norm)] == [
        (4, 3, "single", 32), (8, 8, "none", 1), (32, 32, "none", 1)]
    assert linear["accumulator_bound"] == 64 * 255 * 255 and norm["bytes"] == 32


def test_a_refused_network_is_left_as_it_was():
    """Block 64 does not fit every width: layer and choices are named, the network stays float; block 16 fits, once."""
    unet = small_unet()
    message = r"down.0.rows.0.res.conv1: 32 channels are not .* block 64; use a block of 32 or less"
    with pytest.raises(ValueError, match=message):
        hqdm.quantize_network(unet, SCHEME._replace(block=64), packed=True)
    for change in (dict(wbits=1), dict(grid="foo"), dict(timesteps=(1.0,)), dict(block=33)):     # no layer's fault
        with pytest.raises(ValueError) as e:
            hqdm.quantize_network(unet, SCHEME._replace(**change))
        assert "skip" not in str(e.value) and "conv" not in str(e.value)
    x, t, y = some_input()
    assert not hqdm.layers(unet) and torch.equal(unet(x, t, y), small_unet()(x, t, y))
    hqdm.quantize_network(unet, SCHEME, packed=True)
    for net in (unet, torch.nn.Sequential(torch.nn.Linear(32, 32), unet)):
        with pytest.raises(ValueError, match="quantized already"):
            hqdm.quantize_network(net, SCHEME)


def test_a_packed_network_without_its_weights_computes_nothing():
    """Calibrated instead of loaded: NaN in both arithmetics, no picture of zero weights; loaded: the model's outputs."""
    net, x = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))), torch.randn(4, 32)
    made, empty = copy.deepcopy(net), copy.deepcopy(net)
    hqdm.quantize_network(made), hqdm.calibrate(made, net, [(x,)]), hqdm.freeze(made)
    hqdm.quantize_network(empty, packed=True), hqdm.calibrate(empty, net, [(x,)])
    for integer in (False, True):
        hqdm.set_integer(empty, integer)
        assert empty(x).isnan().all()
    empty.load_state_dict(made.state_dict())
    assert torch.equal(empty(x), made(x))


@pytest.mark.parametrize("more", [dict(skip=["1", "layers.1"]), dict(eight_bits="layers.1"), dict(skip=iter(["layers.1"]))])
def test_names_that_mean_nothing_are_refused(more):
    """A name that no module has would leave a layer at bits that nobody asked for; names may come in any collection."""
    net = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
    with pytest.raises(ValueError, match="no module is called 'layers.1'; choose from 0, 1, 2$"):
        hqdm.quantize_network(net, **more)
    assert not hqdm.layers(net)
    assert [r["wbits"] for r in hqdm.quantize_network(net, skip=iter(["1"]))] == [8, 32, 8]


def test_a_weight_norm_goes_with_its_layer():
    """The report has its parameters in the layer's size before, no row of their own; and the first call may be checkpointed."""
    norm = torch.nn.utils.parametrizations.weight_norm
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), norm(torch.nn.Linear(32, 32)), torch.nn.Linear(32, 32))
    total, teacher, x = 4 * sum(p.numel() for p in net.parameters()), copy.deepcopy(net), torch.randn(4, 32)
    rows = hqdm.quantize_network(net)
    assert [r["layer"] for r in rows] == ["0", "1", "2"] and sum(r["float_bytes"] for r in rows) == total
    hqdm.calibrate(net, teacher, [(x,)])
    compute_again(net, x, use_reentrant=False).sum().backward()
    assert net[1].weights.lora_B.grad.any()


class OwnForward(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Standardized(torch.nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


def patched(layer):
    layer.forward = lambda x: x
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("odd, message", [
    (torch.nn.ConvTranspose2d(32, 32, 2), "ConvTranspose2d has no"), (torch.nn.Conv1d(32, 32, 1), "Conv1d has no"),
    (torch.nn.Conv3d(32, 32, 1), "Conv3d has no"), (torch.nn.MultiheadAttention(32, 2), "MultiheadAttention has no"),
    (torch.nn.LSTM(32, 32), "LSTM has no"), (torch.nn.GRUCell(32, 32), "GRUCell has no"), (OwnForward(32, 32, 1), "OwnForward has no"),
    (Standardized(32, 32, 1), "Standardized has no"), (patched(torch.nn.Linear(32, 32)), "a Linear has no"),
    (hooked(torch.nn.Linear(32, 32)), "hooks"), (torch.nn.Conv2d(32, 32, 3, groups=2), "groups 1"),
    (torch.nn.Conv2d(48, 32, 1), "48 channels are not a multiple")])
def test_what_has_no_quantized_form_is_named(odd, message):
    """The error names layer and remedy; the network is as it was; with skip it is a row, and the totals are whole."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Linear(32, 32), odd, torch.nn.Conv2d(32, 3, 3))
    total = 4 * sum(p.numel() for p in net.parameters())
    with pytest.raises(ValueError, match=rf"2: .*{message}.*skip=\['2'\]"):
        hqdm.quantize_network(net)
    assert not hqdm.layers(net) and all(p.requires_grad for p in net.parameters())
    rows = hqdm.quantize_network(net, skip="2")
    assert sum(r["float_bytes"] for r in rows) == total and net[2] is odd
    assert all(r["note"] == "float: skip asked for it" for r in rows if r["layer"].startswith("2"))


def test_one_layer_under_two_names_is_refused():
    """A shared layer, and a weight tied to a table: both names are in the error. A lone layer, none at all: refused."""
    shared, table, tied = torch.nn.Linear(32, 32), torch.nn.Embedding(32, 32), torch.nn.Linear(32, 32)
    tied.weight = table.weight
    for layers in ((shared, torch.nn.SiLU(), shared), (table, torch.nn.SiLU(), tied)):
        with pytest.raises(ValueError, match="several names: 0.weight, 2.weight"):
            hqdm.quantize_network(torch.nn.Sequential(*layers))
    for net in (torch.nn.Linear(32, 32), torch.nn.Sequential(torch.nn.SiLU())):
        with pytest.raises(ValueError, match="lone layer|no nn.Conv2d or nn.Linear"):
            hqdm.quantize_network(net)


@pytest.mark.parametrize("eight_bits, expected", [
    (None, [8, 4, 4, 4, 8]), (["1", "3"], [4, 8, 4, 8, 4]), ("2", [4, 4, 8, 4, 4]), ((), [4] * 5),
    (lambda name, module: int(name or 0) > 2, [4, 4, 4, 8, 8])])
def test_which_layers_stay_at_8_bits(eight_bits, expected):
    """By default first and last; else by name or by a function. The report says so."""
    net = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(5)])
    rows = hqdm.quantize_network(net, hqdm.Scheme(4, 3), eight_bits=eight_bits)
    assert [r["wbits"] for r in rows] == expected == [layer.scheme.wbits for layer in net]
    for r in rows:
        assert ("8 bits, not rotated" in r["note"]) == (r["wbits"] == r["abits"] == 8) == (r["rotation"] == "none")


def test_networks_of_other_shapes_of_call():
    """forward(x) has one scale; of several t picks, the second input or the one named so; without t, an error."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(3)])

        def forward(self, x, t=None):
            return self.layers(x)
    teacher, one, two, x = Net(), Net(), Net(), torch.randn(4, 32)
    one.load_state_dict(teacher.state_dict()), two.load_state_dict(teacher.state_dict())
    hqdm.quantize_network(one, hqdm.Scheme(8, 8)), hqdm.quantize_network(two, hqdm.Scheme(8, 8, timesteps=(9, 0)))
    hqdm.calibrate(one, teacher, [(x,)]), hqdm.calibrate(two, teacher, [(x * (1 + t), t) for t in (9, 0)])
    assert (one(x) - teacher(x)).norm() < 0.05 * teacher(x).norm()
    assert torch.equal(two(x, torch.tensor([9] * 4)), two(x, t=9)) and not torch.equal(two(x, 9), two(x, 0))
    with pytest.raises(TypeError, match="takes t"):
        two(x)


def test_a_layer_used_twice_is_refused():
    """One scale for two inputs would be that of the last: calibrate names the layer and the remedy."""
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.a(self.a(x))
    student = Twice()
    hqdm.quantize_network(student)
    with pytest.raises(ValueError, match=r"a is used twice .*skip=\['a'\]"):
        hqdm.calibrate(student, Twice(), [(torch.randn(2, 32),)])


def test_t_by_name_comes_first():
    """network(x, labels, t=t): the second input is no t where one is named so."""
    assert hqdm.time_of((1, 2), {"t": 3}) == 3 and hqdm.time_of((1, 2)) == 2 and hqdm.time_of((1,), {"t": 0}) == 0


def test_calibration_makes_the_difference():
    """Scales from the teacher's activations give a far smaller error than scales of 1; without any it is refused."""
    (student, teacher), args = quantized(), some_input()
    for layer in hqdm.layers(student):
        torch.nn.init.zeros_(layer.weights.lora_B)
    ones = copy.deepcopy(student)
    for layer in hqdm.layers(ones):
        torch.nn.init.zeros_(layer.activations.log_s_x)
    error = [(m(*args) - teacher(*args)).square().mean().item() for m in (student, ones)]
    assert error[0] < 0.5 * error[1]
    with pytest.raises(RuntimeError, match="scales are missing"):
        empty()(*args)


def test_calibration_leaves_the_teacher_alone():
    """Later calls of the teacher refit nothing; each step and layer got a scale; t is found by name and by place."""
    student, teacher = quantized()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    assert all(layer.activations.log_s_x.isfinite().all() for layer in hqdm.layers(student))
    x, t, y = some_input()
    teacher(x, t, y)
    assert torch.equal(student(x, t, y), student(x, y=y, t=t))
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())


X, GOOD = torch.zeros(2, 3, 32, 32), [(torch.zeros(2, 3, 32, 32), torch.full((2,), t)) for t in TIMES]


@pytest.mark.parametrize("batches, error, message", [
    ([], ValueError, "no batch to calibrate t = 999, 666, 333, 0"),
    (GOOD[:2], ValueError, "no batch to calibrate t = 333, 0"),
    (GOOD[:1] * 2, ValueError, "one batch for each of the timesteps"),
    ([(X, torch.tensor([999, 0]))], ValueError, "with that t for all samples"),
    ([(X, torch.full((2,), 998))], ValueError, "with that t for all samples"),
    (GOOD[:1] + [(X * math.nan, torch.full((2,), 666))], ValueError, "finite"),
    ([(X,)], TypeError, "takes t")])
def test_calibrate_refuses(batches, error, message):
    """No batches, missing steps, one twice, two in a batch, NaN, no t; no hook stays, the student cannot be used."""
    student, teacher = empty(), tiny_unet()
    with pytest.raises(error, match=message):
        hqdm.calibrate(student, teacher, iter(batches))
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    with pytest.raises(RuntimeError, match="scales are missing"):
        student(*some_input())


def test_each_sample_takes_the_scale_of_its_own_step():
    """In every layer, of the nearest of the timesteps: 700 is nearer to 666 than to 999."""
    student, _ = quantized()
    layer, seen = student.mid1.conv1.activations, []
    layer.register_forward_hook(lambda _, args, result: seen.append(result[1]))
    student(torch.randn(4, 3, 32, 32), torch.tensor([0, 700, 999, 990]))
    assert torch.equal(seen[0], layer.log_s_x.exp()[[3, 1, 0, 0]]) and len(set(seen[0].tolist())) == 3


def test_a_call_that_fails_takes_nobody_elses_step():
    """A hook of somebody's that raises before the network knows its t; an input that it cannot compute."""
    student, _ = quantized()
    layer, x = student.mid1.conv1, torch.randn(2, 64, 4, 4)
    with hqdm.at(torch.tensor(333), TIMES):
        y = layer(x[:, :layer.activations.channels])
        with pytest.raises(RuntimeError):
            student(torch.zeros(2, 5, 32, 32), torch.tensor([0, 0]))
        student.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):
            student(*some_input())
        assert torch.equal(layer(x[:, :layer.activations.channels]), y)


def test_a_copy_has_its_own_steps():
    """deepcopy of a quantized network: the same outputs, also when the original's timesteps and scales have changed."""
    student, _ = quantized()
    twin, args = copy.deepcopy(student), some_input()
    expected = student(*args)
    student.hqdm_timesteps.zero_()
    for layer in hqdm.layers(student):
        torch.nn.init.zeros_(layer.activations.log_s_x)
    assert torch.equal(twin(*args), expected) and not torch.equal(student(*args), expected)


def test_two_threads_draw_from_one_model():
    """Each gets the bytes that it gets alone. A barrier in the middle of the network: both are inside, at other t."""
    student, _ = quantized(frozen=True)
    jobs = (1, 4, 5), (2, 2, 6)                                  # pictures, steps, seed: four forwards each at batch 1
    def draw(n, steps, seed):
        try:
            return sample.draw(student, n, steps, seed=seed, batch=1)[0]
        except Exception:
            both.abort()
            raise
    alone, both, crowds = [draw(*job) for job in jobs], threading.Barrier(2), []
    student.mid1.register_forward_pre_hook(lambda *_: crowds.append(both.wait()))
    for integer in (False, True):
        hqdm.set_integer(student, integer)
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(draw, *zip(*jobs)))
        assert all(map(torch.equal, together, alone))
    assert len(crowds) == 16                                     # two threads, four forwards, floats and integers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("times", [TIMES, (500,)])
def test_a_block_computed_again_in_backward(times, reentrant):
    """torch.utils.checkpoint of a block: the right gradient with one step; with several an error, not a wrong one.

    The whole network knows its t, and so does a backward pass in hqdm.at: right again, up to the order of sums.
    """
    student, _ = quantized(timesteps=times)
    args, block = some_input(), student.mid1.forward
    def gradient(network=student, around=lambda: hqdm.at(args[1], times)):
        student.zero_grad()
        loss = network(*args).square().mean()
        with around():
            loss.backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.requires_grad])
    same = functools.partial(assert_close, expected=gradient(), rtol=1e-3, atol=1e-6)
    same(gradient(lambda *inputs: compute_again(student, *inputs, use_reentrant=False)))
    student.mid1.forward = lambda *inputs: compute_again(block, *inputs, use_reentrant=reentrant)
    same(gradient())
    if len(times) == 1:
        same(gradient(around=torch.enable_grad))
    else:
        with pytest.raises(RuntimeError, match="which DDIM step"):
            gradient(around=torch.enable_grad)


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("change, theirs, mine", [
    (dict(timesteps=(999, 666, 333, 1)), "timesteps .999, 666, 333, 0.", "timesteps .999, 666, 333, 1."),
    (dict(rotation="double"), ".*W4A3 single midtread, block 16", ".*W4A3 double midtread, block 16"),
    (dict(block=8), ".*W4A3 single midtread, block 16", ".*W4A3 single midtread, block 8"),
    (dict(grid="midrise"), ".*W4A3 single midtread, block 16", ".*W4A3 single midrise, block 16")])
def test_tensors_of_another_meaning_are_refused(change, theirs, mine, tmp_path):
    """Other timesteps, rotation, block: the shapes are the same, and yet it is refused, before anything is loaded."""
    student, _ = quantized(frozen=True)
    message = f"these tensors have {theirs}; this network has {mine}"
    other = empty(**change)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(student.state_dict())
    assert all(torch.equal(v, before[k]) or v.isnan().all() for k, v in other.state_dict().items())
    save(tmp_path / "q.pt", student, scheme=SCHEME._replace(**change)._asdict())
    with pytest.raises(ValueError, match="does not fit its own configuration.*" + message):
        sample.load_model(tmp_path / "q.pt")
    for name in ("hqdm_timesteps", "hqdm_layers"):
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            empty().load_state_dict({k: v for k, v in student.state_dict().items() if k != name})


def test_layers_of_other_bits_are_refused():
    """Which layers have 8 bits is an argument, and part of what the tensors mean."""
    a, b = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(2))
    for made, eight in ((a, ["0"]), (b, ["1"])):                 # five bits are stored in a byte, too
        hqdm.quantize_network(made, hqdm.Scheme(5, 5, "none"), eight_bits=eight, packed=True)
    with pytest.raises(ValueError, match="these tensors have 0 W8A8 none .*; this network has 0 W5A5 none"):
        b.load_state_dict(a.state_dict())


def save(path, model, **changes):
    """A checkpoint of a float or a quantized network."""
    kind = dict(kind="quantized", scheme=model.hqdm._asdict()) if hasattr(model, "hqdm") else dict(kind="float")
    runs.save_checkpoint(path, **kind | dict(unet=model.config, model=model.state_dict()) | changes)


def test_checkpoint_round_trip(tmp_path):
    """Saved packed and loaded again the model draws the same pictures; its scheme is the same, timesteps a tuple."""
    student, _ = quantized(frozen=True)
    save(tmp_path / "m.pt", student)
    model = sample.load_model(tmp_path / "m.pt")
    assert model.hqdm == SCHEME and isinstance(model.hqdm.timesteps, tuple) and not model.training
    assert torch.equal(sample.draw(model, 2, 4)[0], sample.draw(student, 2, 4)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]      # no temporary file left
    save(tmp_path / "again.pt", student)
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "m.pt").read_bytes()


def test_loading_other_weights_forgets_the_old_ones():
    """A frozen network that was used and then gets other integers computes with those, not with what it kept."""
    one, two = quantized(frozen=True)[0], quantized()[0]
    for layer in hqdm.layers(two):
        torch.nn.init.normal_(layer.weights.lora_B, std=0.1)
    hqdm.freeze(two)
    args = some_input()
    assert not torch.equal(one(*args), two(*args))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(*args), two(*args))


class Trap:
    def __reduce__(self):
        return (open, (str(ROOT / "trap-was-run"), "w"))


def test_bad_checkpoints_are_refused_and_not_run(tmp_path):
    """Missing, damaged, hiding code, older, newer, of another shape or kind: one error in words each."""
    good, path = dict(kind="float", unet=tiny_unet().config, model=tiny_unet().state_dict()), tmp_path / "c.pt"
    def refused(message, content=None, error=ValueError, load=sample.load_model):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(error, match=message):
            load(path)
    runs.save_checkpoint(path, **good)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b""):
        refused("damaged", damaged)
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    refused("damaged", bytes(flipped))
    refused("nothing of it was run", {"format": 1, "kind": "float", "model": Trap()})
    refused("nothing of it was run", pickle.dumps(Trap(), protocol=2))
    assert not (ROOT / "trap-was-run").exists()
    for kind, mine in runs.FORMATS.items():
        for other, remedy in ((mine + 1, "update the code"), (mine - 1, "make it anew")):
            message = f"has format {other}; this code reads format {mine}: {remedy}"
            refused(message, {**good, "kind": kind, "format": other})
    for other in ([1, 2], good, {"format": "1", **good}, {"format": 1}, {"format": 1, "kind": "mine"}):
        refused("not a checkpoint of this project", other)
    refused("does not fit its own configuration", {"format": 1, **good, "unet": {**good["unet"], "channels": 64}})
    nan = {**good["model"], "conv_in.bias": torch.full((32,), math.nan)}
    refused("conv_in.bias holds values that are not finite", {"format": 1, **good, "model": nan})
    refused("'judge' checkpoint, not 'float' or 'quantized'", {"format": 1, "kind": "judge", "model": {}})
    refused("another network than the judge", load=lambda path: sample.load_judge(path=path))
    path.unlink()
    refused("no checkpoint at", error=FileNotFoundError)
    path.symlink_to(path)                            # a link to itself
    refused("no checkpoint at", error=FileNotFoundError)


@pytest.mark.parametrize("name, where, value, message", [
    ("mid1.conv2.weights.s_w", (3, 0), 0.0, "mid1.conv2 has s_w = 0"), ("mid1.conv2.weights.z_w", (3, 0), 16, "mid1.conv2 has z_w = 16"),
    ("mid1.conv2.activations.log_s_x", 1, 200.0, "mid1.conv2 has s_x = inf"), ("mid1.conv2.activations.log_s_x", 1, -200.0, "s_x = 0"),
    ("mid1.conv2.weights.q_w", 5, 0x70, None), ("mid1.conv2.bias", 2, math.inf, "mid1.conv2.bias holds")])
def test_values_that_no_training_makes_are_refused(name, where, value, message, tmp_path):
    """Scales that are not positive numbers, zero points off the grid: the line names the layer."""
    student = quantized(frozen=True)[0]
    dict(student.state_dict())[name][where] = value
    save(tmp_path / "c.pt", student)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        sample.load_model(tmp_path / "c.pt")


def test_absurd_checkpoints_are_refused(tmp_path):
    """A configuration of other sizes than its tensors takes no memory; times that are none; weights off a 3-bit grid."""
    student, path = quantized(frozen=True, wbits=3)[0], tmp_path / "c.pt"
    for changes, message in ((dict(unet={**student.config, "channels": 2**20}), "parameters are not in its tensors"),
                             (dict(unet={**student.config, "blocks": 10**9}), "blocks are not from 1 to 100"),
                             (dict(scheme={**student.hqdm._asdict(), "timesteps": (1000, 600, 200, 0)}), "timesteps")):
        save(path, student, **changes)
        with pytest.raises(ValueError, match=message):
            sample.load_model(path)
    student.mid1.conv2.weights.q_w[5] = 0x80                     # half a byte holds 8, three bits 7 at most
    save(path, student)
    with pytest.raises(ValueError, match="mid1.conv2 has q_w = 8"):
        sample.load_model(path)
    student.hqdm_timesteps[0] = 1000                               # not only the scheme beside it says so
    save(path, student, scheme={**student.hqdm._asdict(), "timesteps": (1000, *student.hqdm.timesteps[1:])})
    with pytest.raises(ValueError, match="has q_w|timesteps .* from 0 to 999"):
        sample.load_model(path)


@pytest.mark.parametrize("name", [*BUNDLED, "judge.pt"])
def test_bundled_files_are_plain(name):
    """Anyone's torch.load opens them."""
    content = torch.load(sample.CHECKPOINTS / name, weights_only=True)
    assert content["kind"] in runs.FORMATS and content["format"] == runs.FORMATS[content["kind"]]


def test_a_kind_that_is_no_word_is_refused(tmp_path):
    """A list as the kind: not a checkpoint of this project."""
  
    torch.save({"format": 1, "kind": ["float"]}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        runs.read_checkpoint(tmp_path / "c.pt")


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """A kill in the middle of writing leaves the old file as it was; a full disk also no temporary one."""
    path = tmp_path / "c.pt"
    runs.save_checkpoint(path, kind="judge", model={})
    before = path.read_bytes()
    def stops_with(error):
        def half(_, file):
            file.write(b"half")
            raise error
        monkeypatch.setattr(runs.torch, "save", half)
    stops_with(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        runs.save_checkpoint(path, kind="judge", model={1: 2})
    assert path.read_bytes() == before
    for error in (RuntimeError("file write failed"), OSError("no space left")):          # torch's words, the system's
        stops_with(error)
        with pytest.raises(OSError, match=f"could not write .*{error}"):
            runs.save_checkpoint(path, kind="judge", model={1: 2})
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"] and path.read_bytes() == before


def test_a_report_is_whole_or_not_there(tmp_path, monkeypatch):
    """A report that cannot be finished leaves the old one; a place where nothing can be written is known before."""
    path = tmp_path / "a.json"
    runs.write_json(path, {"a": 1})
    with monkeypatch.context() as m:
        m.setattr(runs.os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    for good in (path, None, str(tmp_path / "new.json")):
        runs.check_out(good, ".json")
    (tmp_path / "link.json").symlink_to(path)
    for bad in ("", tmp_path, tmp_path / "no" / "a.json", "/dev/full", tmp_path / "link.json", "a.md"):
        with pytest.raises(ValueError, match="cannot write"):
            runs.check_out(bad, "" if bad == "/dev/full" else ".json")
    with pytest.raises(ValueError, match="no plain file"):       # as root, a rename would take the device's place
        runs.write_json("/dev/full", {})
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_that_is_held_for_a_moment(tmp_path, monkeypatch):
    """Windows refuses a rename while a scanner holds the file: tried again; two writers have a temporary name each."""
    real, refused = os.replace, iter([True, True, False])
    def replace(part, path):
        if next(refused):
            raise PermissionError("held")
        real(part, path)
    monkeypatch.setattr(runs.os, "replace", replace)
    monkeypatch.setattr(runs.time, "sleep", lambda _: None)
    with runs.whole_file(tmp_path / "a") as one:
        one.write_text("1")
        with monkeypatch.context() as m:
            m.setattr(runs.os, "replace", real)
            with runs.whole_file(tmp_path / "a") as two:
                two.write_text("2")
    assert (tmp_path / "a").read_text() == "1" and one != two and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- drawing and scores

def test_noise_of_a_picture_depends_on_seed_and_index_alone():
    """Three pictures start as the first three of twelve; another seed gives others; labels go round."""
    few, many = sample.noise_and_labels(3, seed=5), sample.noise_and_labels(12, seed=5)
    assert torch.equal(few[0], many[0][:3]) and not torch.equal(few[0], sample.noise_and_labels(3, seed=6)[0])
    assert many[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


class Net(torch.nn.Module):
    """A network of one line that remembers what it was asked."""
    classes = 10

    def __init__(self):
        super().__init__()
        self.p, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, t, y):
        self.seen.append((int(t[0]), y.tolist()))
        return 0.3 * x + 0.01 * y.view(-1, 1, 1, 1)


def test_draw():
    """All times, all pictures, the same ones at every batch size and share; seeds differ; class 0 is a class."""
    net = Net()
    whole, labels = sample.draw(net, 5, 3, seed=7)
    assert [t for t, _ in net.seen] == [999, 500, 0] and labels.tolist() == [0, 1, 2, 3, 4]
    done = []                                                    # in pictures, after each step of each batch
    assert torch.equal(sample.draw(net, 5, 3, seed=7, batch=2, progress=done.append)[0], whole)
    assert_close(torch.tensor(done), torch.tensor([2, 4, 6, 8, 10, 12, 13, 14, 15]) / 3)
    share = sample.draw(net, 5, 3, seed=7, rows=slice(1, None, 2))
    assert torch.equal(share[0], whole[1::2]) and share[1].tolist() == [1, 3]
    assert torch.equal(sample.draw(net, 5, 3)[0], sample.draw(net, 5, 3, seed=0)[0])
    assert not torch.equal(sample.draw(net, 5, 3)[0], whole) and sample.draw(net, 2, 3, label=0)[1].tolist() == [0, 0]


def test_a_model_in_training_draws_as_in_use():
    """Without its dropout; afterwards each part is in the mode that it was in."""
    model = tiny_unet(dropout=0.5)
    whole, _ = sample.draw(model, 2, 2)
    model.train().mid1.eval()
    modes = [m.training for m in model.modules()]
    assert torch.equal(sample.draw(model, 2, 2)[0], whole) and [m.training for m in model.modules()] == modes


def test_pictures_have_the_networks_own_size(tmp_path):
    """A network of 16 x 16 draws those, and the block of pictures is as large; the judge wants 32 x 32."""
    pictures, labels = sample.draw(tiny_unet(size=16), 2, 2)
    assert pictures.shape == (2, 3, 16, 16)
    sample.save_grids(tmp_path / "s.png", {"a": pictures})
    assert read_png(tmp_path / "s.png").shape == (3, 32 + 28, 64)
    with pytest.raises(ValueError, match=r"looks at uint8 \(N, 3, 32, 32\), not torch.uint8 \(2, 3, 16, 16\)"):
        sample.score(pictures, labels, sample.Judge().eval())


def test_pictures_that_are_not_finite_are_refused():
    """An absurd guidance gives NaN, which would become black pixels: an error instead."""
    with pytest.raises(FloatingPointError, match="guidance 1e\\+38"):
        sample.draw(tiny_unet(), 2, 3, guidance=1e38)


def test_to_uint8():
    """-1 is 0, 1 is 255, the rest is rounded to the nearest and clamped."""
    assert sample.to_uint8(torch.tensor([-1.0, 0.0, 1.0, 1.2])).tolist() == [0, 128, 255, 255]


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances commute: |m1 - m2|^2 + sum (a - b)^2 for standard deviations a and b; and 0 to itself."""
    a, b, m = torch.rand(5).double() + 0.1, torch.rand(5).double() + 0.1, torch.randn(5).double()
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    A, B = turn @ torch.diag(a**2) @ turn.T, turn @ torch.diag(b**2) @ turn.T
    by_hand = float((m**2).sum() + ((a - b) ** 2).sum())
    assert_close(sample.frechet_distance(m, A, 0 * m, B), by_hand, rtol=1e-9, atol=1e-9)
    assert abs(sample.frechet_distance(m, A, m, A)) < 1e-9


class Stub(sample.Judge):
    """A judge that answers with given probabilities."""

    def forward(self, images):
        return self.p[:len(images)].log(), torch.randn(len(images), 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p, expected", [
    (torch.eye(10, dtype=torch.float64).clamp(min=1e-9)[torch.arange(20) % 2], 2.0),        # sure, and two classes: 2
    (torch.full((20, 10), 0.1, dtype=torch.float64), 1.0),                                  # never sure: 1
    (torch.tensor([[0.75, 0.25], [0.25, 0.75]] * 10, dtype=torch.float64), 2 * (0.75**0.75 * 0.25**0.25))])
def test_scores_by_hand(p, expected):
    """C-IS = exp of the mean KL(p(y|x) || p(y)): 2 for two classes told apart surely, exp(ln 2 - entropy) in between.

    Accuracy counts pictures of which a class was asked; C-FID uses the mean and unbiased covariance of the features.
    """
    judge, pictures = Stub().eval(), torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    judge.p, judge.cov = p, torch.eye(256)
    scores = sample.score(pictures, p.argmax(1), judge)
    assert math.isclose(scores["c_is"], expected, rel_tol=1e-5) and scores["accuracy"] == 1
    assert sample.score(pictures, torch.full((20,), 10), judge)["accuracy"] is None      # no class asked for
    mixed = torch.where(torch.arange(20) % 2 == 0, 10, p.argmax(1))                      # for every second one
    assert sample.score(pictures, mixed, judge)["accuracy"] == 1
    features = judge(torch.zeros(20, 1))[1].double().numpy()
    mean, cov = torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features, rowvar=False))
    c_fid = sample.frechet_distance(mean, cov, torch.zeros(256).double(), torch.eye(256).double())
    assert math.isclose(scores["c_fid"], c_fid, rel_tol=1e-9)


def test_one_picture_has_no_scores():
    """It has no covariance: an error."""
    with pytest.raises(ValueError, match="two or more"):
        sample.score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))


def test_scores_of_the_wrong_thing_are_refused():
    """Floats, a judge that still trains, a label too few, pictures that would be broadcast: no number at all."""
    pictures, labels, judge = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4), sample.Judge().eval()
    for wrong in ((pictures.float(), labels, judge), (pictures, labels, sample.Judge().train()), (pictures, labels[:3], judge)):
        with pytest.raises(ValueError, match="the judge, in eval mode, looks at|4 pictures and"):
            sample.score(*wrong)
    for other in (pictures[:1], pictures.float()):
        with pytest.raises(ValueError, match="no PSNR between"):
            sample.psnr(pictures, other)


def test_psnr_of_a_known_error():
    """Off by 1 everywhere: 20 log10(255) = 48.13 dB."""
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert abs(sample.psnr(a, a + 1) - 48.1308) < 1e-3 and sample.psnr(a, a) == 99
    a[1] += 9                                                    # the mean is of decibels, picture by picture
    assert abs(sample.psnr(a, torch.full_like(a, 99)) - (48.1308 + 28.1308) / 2) < 1e-3


def read_png(path):
    """A PNG -> uint8 (3, h, w)."""
    from matplotlib.image import imread
    return torch.from_numpy((imread(path)[..., :3] * 255).round()).to(torch.uint8).permute(2, 0, 1)


def test_grids_show_the_pictures(tmp_path):
    """Read back, every second pixel of the PNG is the picture, in its place and colours. A $ in a title is no maths."""
    a = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    sample.save_grids(tmp_path / "g.png", {"a$_$b/model.pt": a, "b": 255 - a[:3]}, columns=3, zoom=2)
    png = read_png(tmp_path / "g.png")
    for block, pictures in enumerate((a, 255 - a[:3])):
        for i, picture in enumerate(pictures):
            top, left = (block + 1) * 28 + block * 128 + i // 3 * 64, i % 3 * 64         # title 28 pixels, rows 64
            assert torch.equal(png[:, top:top + 64:2, left:left + 64:2], picture)
    sample.save_grids(tmp_path / "g.png", {"a": a, "b": a[:3]})
    assert read_png(tmp_path / "g.png").shape[2] == 5 * 64       # as wide as the longest row


# ---------------------------------------------------------------- the bundled files

def test_the_judge_knows_real_images():
    """On 200 of the bundled training images: nearly all right, C-IS near 10, C-FID far below that of noise."""
    import train
    images, labels = (part[:200] for part in train.load_bundled())
    judge = sample.load_judge()
    real = sample.score(images, labels, judge)
    noise = sample.score(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), labels[:50], judge)
    assert real["accuracy"] > 0.95 and real["c_is"] > 9
    assert noise["accuracy"] < 0.2 and noise["c_fid"] > 10 * real["c_fid"]
    assert sum(p.numel() for p in judge.parameters()) <= 2_500_000
    assert runs.read_checkpoint(sample.CHECKPOINTS / "judge.pt")["test_accuracy"] >= 0.94


def test_the_bundled_teacher_predicts_noise():
    """Its error on real images at random t: what a wrong scale in attention, or a skip taken twice, would double."""
    import train
    images, labels = (part[:32] for part in train.load_bundled())
    torch.manual_seed(0)
    x_0, t = images.float() / 127.5 - 1, torch.randint(1000, (32,))
    eps = torch.randn_like(x_0)
    with torch.no_grad():
        guess = sample.load_model(sample.CHECKPOINTS / "teacher.pt")(add_noise(x_0, t, eps), t, labels)
    assert (guess - eps).square().mean() < 0.045


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_and_are_small(name):
    """Full width; at most 19 MB in half precision, 6 MB in 4-bit weights."""
    assert sample.load_model(sample.CHECKPOINTS / name).config["channels"] == 64
    assert (sample.CHECKPOINTS / name).stat().st_size <= (6e6 if name.startswith("w4") else 19e6)


def test_bundled_integer_pictures():
    """The real W4A3 model at full size: every picture the same bytes from integers as from fake quantization."""
    model = sample.load_model(sample.CHECKPOINTS / "w4a3-single-midrise.pt")
    fake, _ = sample.draw(model, 2, steps=3)
    hqdm.set_integer(model)
    assert torch.equal(sample.draw(model, 2, steps=3)[0], fake)


# ---------------------------------------------------------------- the command line

def run(capsys, *argv):
    """sample.py in this process on a CPU -> (exit code, what it printed on stdout, on stderr)."""
    code = 0
    try:
        runs.run_cli(lambda: sample.main([str(a) for a in (*argv, "--device", "cpu")]))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    save(path := tmp_path_factory.mktemp("quantized") / "q.pt", quantized(frozen=True)[0])
    return path


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copy(original, tmp_path / "q.pt")


@pytest.mark.parametrize("argv, message", [
    (["--class", "dragon"], "choose from airplane"), (["-n", "0"], "not a positive number"),
    (["-n", "-3"], "not a positive number"), (["-n", "1", "--score"], "-n 2 or more"),
    (["--out", ""], "cannot write"), (["--out", "/no/such/folder/x.png"], "cannot write"),
    (["--npz", "/"], "cannot write"),
    (["--steps", "0"], "not a positive number"), (["--steps", "1001"], "outside 1 .. 1000"),
    (["--seed", "-1"], "not a number from 0"), (["--seed", "9" * 30], "not a number from 0"),
    (["--guidance", "nan"], "not a number from 0 on, and finite"), (["--guidance", "-1"], "not a number from 0 on, and finite"), (["--png", ""], "new or empty"),
    (["--png", str(ROOT)], "new or empty"), (["--png", __file__], "new or empty"), (["no-such.pt"], "no checkpoint"),
    (["q.pt"], "named twice"), (["--score", "--out", "s.json"], "must end in .png"), (["--n", "-1"], "unrecognized"),
    (["--out", "notes.md"], "must end in .png"), (["--npz", "s.zip"], "must end in .npz")])
def test_bad_input_is_one_line_and_exit_code_2(argv, message, checkpoint, monkeypatch, capsys):
    """Each mistake is named on stderr, without a traceback; nothing is written."""
    monkeypatch.chdir(checkpoint.parent)
    code, _, err = run(capsys, "q.pt", *argv)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("error: ") and message in line
    assert [p.name for p in checkpoint.parent.iterdir()] == ["q.pt"]


def test_a_device_that_is_not_here(checkpoint):
    """The choices are named; one that is no device at all, too."""
    for name in ("tpu", "cpu:x"):
        with pytest.raises(ValueError, match=f"--device {name} .*choose from cpu"):
            sample.parse([str(checkpoint), "--device", name])


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(checkpoint, capsys):
    """--png in a folder that does not exist: as --out and --npz, not after an hour of drawing."""
  
    out = checkpoint.with_name("s.png")
    code, said, err = run(capsys, checkpoint, "-n", 1, "--steps", 1, "--png", "/no/such/folder/x", "--out", out)
    assert code == 2 and "/no/such/folder/x" in err and "pictures" not in said and not out.exists()


def test_files_that_sample_writes(checkpoint, tmp_path, capsys):
    """PNG, npz and PNG files for the public FID tools, scores with their provenance; 0 bytes differ in integers."""
    (tmp_path / "empty").mkdir()
    code, out, _ = run(capsys, checkpoint, "-n", 4, "--steps", 2, "--class", "cat", "--integer", "--score",
                       "--npz", tmp_path / "s.npz", "--png", tmp_path / "empty", "--out", tmp_path / "s.png")
    arrays, report = np.load(tmp_path / "s.npz"), json.loads((tmp_path / "s.json").read_text())
    assert code == 0 and "q: 0 of 12,288 bytes differ" in out
    assert arrays["arr_0"].shape == (4, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [3] * 4
    files = sorted((tmp_path / "empty").iterdir())
    assert [p.name for p in files] == [f"{i:05d}.png" for i in range(4)]
    for file, picture in zip(files, torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)):
        assert torch.equal(read_png(file), picture)
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG" and report["settings"]["seed"] == 0
    assert report["scores"][str(checkpoint)]["psnr"] == 99 and report["hardware"] and report["date"]


def test_sample_writes_over_nothing_but_its_own(checkpoint, tmp_path, monkeypatch, capsys):
    """Targets that are one file, a checkpoint as a target, a .json of something else: refused, the file as it was."""
    before, metrics, a = checkpoint.read_bytes(), tmp_path / "metrics.json", tmp_path / "a.png"
    metrics.write_text("{}")
    for argv in (["--out", checkpoint], ["--out", a, "--npz", checkpoint], ["--out", a, "--npz", a],
                 ["--out", a, "--png", a], ["--out", tmp_path / "b.png", "--npz", a, "--png", a],
                 ["--score", "--out", a, "--npz", a.with_suffix(".json")],
                 ["--score", "--out", metrics.with_suffix(".png")]):
        code, _, err = run(capsys, checkpoint, "-n", 2, "--steps", 1, *argv)
        assert code == 2 and ("different files" in err or "holds no scores" in err or "must end in" in err)
    metrics.write_bytes(b"\xff")
    assert "holds no scores" in run(capsys, checkpoint, "-n", 2, "--score", "--out", metrics.with_suffix(".png"))[2]
    assert checkpoint.read_bytes() == before and metrics.read_bytes() == b"\xff" and not a.exists()
    metrics.unlink(), metrics.symlink_to(tmp_path / "nowhere"), (tmp_path / "empty").mkdir()
    assert "no plain file" in run(capsys, checkpoint, "-n", 2, "--score", "--out", metrics.with_suffix(".png"))[2]
    monkeypatch.setattr(sample.os, "access", lambda path, mode: os.path.basename(path) != "empty")
    assert "may be written to" in run(capsys, checkpoint, "-n", 2, "--out", a, "--png", tmp_path / "empty")[2]


def test_networks_without_parameters_or_classes_draw():
    """A frozen one that had no norms has buffers alone; without classes all labels are 0."""
    class Net(torch.nn.Module):
        classes = 0

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.Conv2d(32, 3, 1))

        def forward(self, x, t, y):
            assert not y.any()
            return self.layers(x)
    net = Net()
    teacher = copy.deepcopy(net)
    hqdm.quantize_network(net)
    hqdm.calibrate(net, teacher, [(torch.randn(2, 3, 8, 8), 0, torch.zeros(2))])
    hqdm.freeze(net)
    assert not [*net.parameters()] and sample.draw(net, 3, 2)[1].tolist() == [0, 0, 0]


@pytest.fixture
def stubs(monkeypatch):
    """draw and save_grids that remember what they were asked; pictures are random, each call its own."""
    calls, pictures, titles = [], torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8), []
    def draw(model, n, steps, label, guidance, seed, batch, progress):
        calls.append((n, steps, label, guidance, seed, batch, {layer.integer for layer in hqdm.layers(model)}))
        return pictures[len(calls) - 1], torch.full((n,), label or 0)
    monkeypatch.setattr(sample, "draw", draw)
    monkeypatch.setattr(sample, "save_grids", lambda path, grids: titles.extend(grids))
    return calls, pictures, titles


def test_options_arrive(checkpoint, tmp_path, stubs, capsys):
    """What the command line says is what draw gets; --integer draws both ways and counts the bytes that differ.

    The npz and PNG files hold the last checkpoint's pictures; PSNR is to the first one's.
    """
    calls, pictures, titles = stubs
    save(tmp_path / "f.pt", tiny_unet())
    code, out, _ = run(capsys, tmp_path / "f.pt", checkpoint, "-n", 2, "--steps", 3, "--class", "none", "--guidance", 2,
                       "--seed", 7, "--batch", 9, "--integer", "--score", "--npz", tmp_path / "s.npz", "--png", tmp_path / "s",
                       "--out", tmp_path / "s.png")
    assert code == 0 and calls == [(2, 3, 10, 2.0, 7, 9, integer) for integer in (set(), {False}, {True})]
    assert titles == ["f", "q"] and "f:" not in out and "note: C-FID of 2 pictures is large by itself" in out
    assert f"q: {int((pictures[1] != pictures[2]).sum())} of 6,144 bytes differ" in out
    assert np.array_equal(np.load(tmp_path / "s.npz")["arr_0"], pictures[1].permute(0, 2, 3, 1).numpy())
    assert torch.equal(read_png(tmp_path / "s" / "00001.png"), pictures[1, 1])
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert scores[str(tmp_path / "f.pt")]["psnr"] == 99
    assert scores[str(checkpoint)]["psnr"] == sample.psnr(pictures[1], pictures[0])


def test_titles_are_names(checkpoint, tmp_path, stubs, capsys):
    """NAME.pt and NAME/model.pt are called NAME; two of one name by their paths."""
    paths = [tmp_path / name for name in ("a/model.pt", "b/model.pt", "c/q.pt")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(checkpoint.read_bytes())
    assert run(capsys, *paths, checkpoint, "-n", 2, "--out", tmp_path / "s.png")[0] == 0
    assert stubs[2] == ["a", "b", str(paths[2]), str(checkpoint)] and sample.name_of("model.pt") == "model"


def test_defaults(checkpoint, monkeypatch):
    """16 pictures on a CPU, 64 elsewhere, of the bundled teacher and W4A3 model."""
    args = sample.parse(["--device", "cpu"])
    assert args.n == 16 and [sample.name_of(path) for path in args.checkpoints] == ["teacher", "w4a3-single-midrise"]
    monkeypatch.setattr(sample, "pick_device", lambda name: torch.device("cuda"))
    assert sample.parse([str(checkpoint)]).n == 64 and sample.parse([str(checkpoint), "-n", "3"]).n == 3


def test_integers_go_to_the_cpu_where_a_device_has_none(checkpoint, monkeypatch, capsys):
    """A Mac's GPU multiplies no integers: --integer draws on the CPU, and says so."""
    monkeypatch.setattr(sample, "pick_device", lambda name: torch.device("mps"))
    assert sample.parse([str(checkpoint), "--integer"]).device.type == "cpu" and "note: mps" in capsys.readouterr().out
    assert sample.parse([str(checkpoint)]).device.type == "mps"


def test_steps_come_from_the_checkpoint(checkpoint, stubs, capsys):
    """Without --steps a quantized model draws with the steps of its scales; other steps are said aloud."""
    student = sample.load_model(checkpoint)
    assert sample.trained_steps({"q": student}) == len(TIMES) and sample.trained_steps({"f": tiny_unet()}) == 50
    with pytest.raises(ValueError, match="q: 4, other: 2.*choose with --steps"):
        sample.trained_steps({"q": student, "other": empty(timesteps=(999, 0))})
    for more, steps in (([], 4), (["--steps", 3], 3)):
        _, out, _ = run(capsys, checkpoint, "-n", 2, "--out", checkpoint.with_name("s.png"), *more)
        assert ("q has activation scales for 4 steps; each of the 3" in out) == (steps == 3)
        assert stubs[0][-1][1] == steps


def test_classes_are_the_models_own(tmp_path, capsys):
    """A network with five classes knows no dog; its "none", number 5, is 10 in files and scores, as for all."""
    save(tmp_path / "five.pt", UNet(channels=32, mults=(1, 2), blocks=1, classes=5))
    argv = [tmp_path / "five.pt", "-n", 1, "--steps", 1, "--out", tmp_path / "s.png", "--npz", tmp_path / "s.npz"]
    code, _, err = run(capsys, *argv, "--class", "dog")
    assert code == 2 and "none of the 5 classes" in err
    code, _, err = run(capsys, *argv, "--integer")
    assert code == 2 and "--integer needs a quantized checkpoint" in err
    assert run(capsys, *argv, "--class", "none")[0] == 0 and np.load(tmp_path / "s.npz")["arr_1"].tolist() == [10]


def test_the_bundled_command(tmp_path, capsys):
    """`python sample.py --integer`: the teacher in float beside the W4A3 model in floats and integers."""
    code, out, err = run(capsys, "--integer", "-n", 1, "--steps", 1, "--out", tmp_path / "s.png")
    assert (code, err) == (0, "") and "w4a3-single-midrise: 0 of 3,072 bytes differ" in out and "teacher: 0 of" not in out
