"""Whole networks: integer pictures, checkpoints, scores, and bad input to sample.py."""
import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, small_unet
from torch.testing import assert_close

import hqdm
import sample
from unet import UNet, ddim_timesteps

TIMES = ddim_timesteps(4).tolist()
BUNDLED = ["teacher.pt", "w4a3-single.pt", "w4a3-none.pt"]


def quantized(rotation="single", wbits=4, abits=3, block=16):
    """A small UNet, quantized and calibrated, LoRA filled so that folding it matters."""
    teacher = small_unet()
    student = copy.deepcopy(teacher)
    quant = dict(wbits=wbits, abits=abits, rotation=rotation, block=block, timesteps=TIMES, rank=4)
    hqdm.quantize_unet(student, **quant)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 10])
    hqdm.calibrate(student, teacher, [(x, torch.full((2,), t), y) for t in TIMES])
    for layer in hqdm.layers(student):
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    return student, teacher, quant


@pytest.mark.parametrize("rotation", hqdm.ROTATIONS)
def test_integer_pictures_are_the_fake_quantized_pictures(rotation):
    """Training form, frozen form, integer view A and view B: the same uint8 pictures, byte for byte."""
    student, _, _ = quantized(rotation)
    pictures = [sample.draw(student, 2, 3)[0]]
    hqdm.freeze(student)
    pictures.append(sample.draw(student, 2, 3)[0])
    for view in "AB":
        hqdm.set_integer(student, True, view)
        pictures.append(sample.draw(student, 2, 3)[0])
    assert all(torch.equal(p, pictures[0]) for p in pictures) and pictures[0].float().std() > 10


def test_every_layer_is_in_the_report_and_none_is_forgotten():
    """Each conv and linear is quantized or the report says why not; 8-bit layers by name, the rest at the asked bits."""
    unet = small_unet()
    rows = hqdm.quantize_unet(unet, 4, 3, block=16, timesteps=TIMES)
    by_name = {r["layer"]: r for r in rows}
    assert not any(type(m) in (torch.nn.Conv2d, torch.nn.Linear) for m in unet.modules())
    assert len(hqdm.layers(unet)) == sum(r["wbits"] != 32 for r in rows)
    for name, bits in (("conv_in", 8), ("conv_out", 8), ("time_mlp.0", 8), ("down.0.resample", 8), ("mid1.conv1", 4)):
        assert by_name[name]["wbits"] == bits and by_name[name]["abits"] == (8 if bits == 8 else 3)
    assert all(r["rotation"] == "single" or r["note"] for r in rows)
    assert "mid_attn" in by_name and "class_emb" in by_name and "times smaller" in hqdm.format_report(rows)


def test_bytes_of_the_report_are_the_bytes_of_the_tensors():
    """What the report says each layer takes is what its packed tensors take."""
    student, _, _ = quantized()
    rows = {r["layer"]: r for r in hqdm.quantize_unet(small_unet(), 4, 3, block=16, timesteps=TIMES)}
    hqdm.freeze(student)
    for name, layer in student.named_modules():
        if isinstance(layer, hqdm.HQLayer):
            assert sum(v.numel() * v.element_size() for v in layer.state_dict().values()) == rows[name]["bytes"]


def test_a_width_that_the_block_does_not_divide_names_layer_and_choices():
    with pytest.raises(ValueError, match=r"down.0.rows.0.res.conv1: 32 channels are not .* block 64; use block 32, 16 or 8"):
        hqdm.quantize_unet(small_unet(), 4, 3, block=64)


def test_a_refused_network_is_left_as_it_was():
    """Block 64 does not fit every width: the error leaves a float network, which block 16 then quantizes."""
    unet = small_unet()
    with pytest.raises(ValueError, match="block 64"):
        hqdm.quantize_unet(unet, 4, 3, block=64)
    assert not hqdm.layers(unet) and hqdm.quantize_unet(unet, 4, 3, block=16)


def test_a_network_is_quantized_once():
    student, _, quant = quantized()
    with pytest.raises(ValueError, match="quantized already"):
        hqdm.quantize_unet(student, **quant)


def test_calibration_makes_the_difference():
    """Scales from the teacher's activations give a far smaller error than the scales of 1 that layers are born with."""
    student, teacher, quant = quantized()
    for layer in hqdm.layers(student):
        torch.nn.init.zeros_(layer.lora_B)
    born = small_unet()
    hqdm.quantize_unet(born, **quant)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([999, TIMES[2]])
    error = [(m(x, t) - teacher(x, t)).square().mean().item() for m in (student, born)]
    assert error[0] < 0.5 * error[1]


def test_a_copy_has_its_own_clock():
    """deepcopy of a quantized network keeps working: its layers read its own clock, not the original's."""
    student, _, _ = quantized()
    twin = copy.deepcopy(student)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([999])
    expected = twin(x, t)
    student.clock.set(torch.tensor([0]))
    assert torch.equal(twin(x, t), expected) and twin.clock is not student.clock


def test_checkpoint_round_trip(tmp_path):
    """Saved packed and loaded again the model draws the same pictures; nothing but tensors and plain values is inside."""
    student, _, quant = quantized()
    hqdm.freeze(student)
    sample.save_checkpoint(tmp_path / "m.pt", kind="quantized", unet=student.config, quant=quant, model=student.state_dict())
    model = sample.load_model(tmp_path / "m.pt")
    assert torch.equal(sample.draw(model, 2, 4)[0], sample.draw(student, 2, 4)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]      # no temporary file left


def test_loading_other_weights_forgets_the_old_ones():
    """A frozen network that was already used and then gets other integers computes with those, not with what it kept."""
    (one, _, _), (two, _, _) = quantized(), quantized()
    for layer in hqdm.layers(two):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    hqdm.freeze(one), hqdm.freeze(two)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([999])
    assert not torch.equal(one(x, t), two(x, t))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x, t), two(x, t))


class Trap:
    def __reduce__(self):
        return (open, (str(ROOT / "trap-was-run"), "w"))


def test_bad_checkpoints_are_refused_and_not_run(tmp_path):
    """Missing, damaged, hiding code, newer, of another shape, of another kind: one ValueError or FileNotFoundError each."""
    good = dict(kind="float", unet=small_unet().config, model=small_unet().state_dict())
    path = tmp_path / "c.pt"
    sample.save_checkpoint(path, **good)
    whole = path.read_bytes()
    def refused(message, error=ValueError, **kw):
        with pytest.raises(error, match=message):
            sample.load_model(path, **kw)
    path.write_bytes(whole[:len(whole) // 2])
    refused("damaged")
    path.write_bytes(b"")
    refused("damaged")
    torch.save({"format": 1, **good}, path)                      # not compressed, as a run's own state: one bit flips
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    refused("damaged")
    torch.save({"format": 1, "kind": "float", "model": Trap()}, path)
    refused("nothing of it was run")
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    refused("nothing of it was run")
    assert not (ROOT / "trap-was-run").exists()
    torch.save({"format": sample.FORMAT + 1, **good}, path)
    refused("update the code")
    torch.save([1, 2], path)
    refused("not a checkpoint of this project")
    sample.save_checkpoint(path, **{**good, "unet": {**good["unet"], "channels": 64}})
    refused("does not fit its own configuration")
    sample.save_checkpoint(path, **{**good, "model": {**good["model"], "conv_in.bias": torch.full((32,), math.nan)}})
    refused("conv_in.bias holds values that are not finite")
    sample.save_checkpoint(path, kind="judge", model={})
    refused("'judge' checkpoint")
    with pytest.raises(ValueError, match="another network than the judge"):
        sample.load_judge(path=path)
    path.unlink()
    refused("no checkpoint at", FileNotFoundError)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """A kill in the middle of writing leaves the old file as it was."""
    sample.save_checkpoint(tmp_path / "c.pt", kind="judge", model={})
    before = (tmp_path / "c.pt").read_bytes()
    def half(_, file):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        sample.save_checkpoint(tmp_path / "c.pt", kind="judge", model={1: 2})
    assert (tmp_path / "c.pt").read_bytes() == before
    (tmp_path / "c.pt.tmp").unlink()
    for error in (RuntimeError("file write failed"), OSError("no space left")):          # a full disk, in torch's words and the system's
        monkeypatch.setattr(torch, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match="could not write"):
            sample.save_checkpoint(tmp_path / "c.pt", kind="judge", model={1: 2})
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"] and (tmp_path / "c.pt").read_bytes() == before


def test_noise_of_a_picture_depends_on_seed_and_index_alone():
    few, many = sample.noise_and_labels(3, seed=5), sample.noise_and_labels(12, seed=5)
    assert torch.equal(few[0], many[0][:3]) and not torch.equal(few[0], sample.noise_and_labels(3, seed=6)[0])
    assert many[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances commute: |m1 - m2|^2 + sum (a - b)^2 for standard deviations a and b; and 0 to itself."""
    a, b, m = torch.rand(5).double() + 0.1, torch.rand(5).double() + 0.1, torch.randn(5).double()
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    A, B = turn @ torch.diag(a**2) @ turn.T, turn @ torch.diag(b**2) @ turn.T
    assert_close(sample.frechet_distance(m, A, 0 * m, B), float((m**2).sum() + ((a - b) ** 2).sum()), rtol=1e-9, atol=1e-9)
    assert abs(sample.frechet_distance(m, A, m, A)) < 1e-9


def test_calibration_leaves_the_teacher_alone():
    """Later calls of the teacher refit nothing; every step and layer got a scale; t is found by name as well as by place."""
    student, teacher, _ = quantized()
    before = copy.deepcopy(student.state_dict())
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    assert all((layer.log_s_x != 0).all() for layer in hqdm.layers(student))
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([999, 0]), torch.tensor([1, 10])
    assert torch.equal(student(x, t, y), student(x, y=y, t=t))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


class Stub(sample.Judge):
    """A judge that answers with given probabilities."""

    def forward(self, images):
        return self.p[:len(images)].log(), torch.randn(len(images), 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p, expected", [
    (torch.eye(10, dtype=torch.float64).clamp(min=1e-9)[torch.arange(20) % 2], 2.0),        # sure, and two classes: 2
    (torch.full((20, 10), 0.1, dtype=torch.float64), 1.0),                                  # never sure: 1
    (torch.tensor([[0.75, 0.25], [0.25, 0.75]] * 10, dtype=torch.float64), 2 * (0.75**0.75 * 0.25**0.25))])
def test_inception_score_by_hand(p, expected):
    """exp of the mean KL(p(y|x) || p(y)): 2 for two classes told apart surely, exp(ln 2 - entropy) in between."""
    judge = Stub()
    judge.p, judge.cov = p, torch.eye(256)
    scores = sample.score(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), p.argmax(1), judge)
    assert math.isclose(scores["c_is"], expected, rel_tol=1e-5) and scores["accuracy"] == 1
    assert sample.score(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.full((20,), 10), judge)["accuracy"] is None     # no class asked for
    mixed = torch.where(torch.arange(20) % 2 == 0, 10, p.argmax(1))                      # for every second picture none was
    assert sample.score(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), mixed, judge)["accuracy"] == 1
    features = judge(torch.zeros(20, 1))[1].double().numpy()
    cov = torch.from_numpy(np.cov(features, rowvar=False))
    expected = sample.frechet_distance(torch.from_numpy(features.mean(0)), cov, torch.zeros(256).double(), torch.eye(256).double())
    assert math.isclose(scores["c_fid"], expected, rel_tol=1e-9)


def test_one_picture_has_no_scores():
    with pytest.raises(ValueError, match="two or more"):
        sample.score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))


def test_psnr_of_a_known_error():
    """Off by 1 everywhere: 20 log10(255) = 48.13 dB."""
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert abs(sample.psnr(a, a + 1) - 48.1308) < 1e-3 and sample.psnr(a, a) == 99
    a[1] += 9                                                    # the mean is of decibels, picture by picture
    assert abs(sample.psnr(a, torch.full_like(a, 99)) - (48.1308 + 28.1308) / 2) < 1e-3


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
    """All times, all pictures, the same ones at every batch size; seeds differ; class 0 is a class."""
    net = Net()
    whole, labels = sample.draw(net, 5, 3, seed=7)
    assert [t for t, _ in net.seen] == [999, 500, 0] and labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(sample.draw(net, 5, 3, seed=7, batch=2)[0], whole) and not torch.equal(sample.draw(net, 5, 3)[0], whole)
    assert sample.draw(net, 2, 3, label=0)[1].tolist() == [0, 0]


def test_grids_show_the_pictures(tmp_path):
    """Read back, every second pixel of the PNG is the picture, in its place, in its colours."""
    import matplotlib.pyplot as plt
    a = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    sample.save_grids(tmp_path / "g.png", {"a": a, "b": 255 - a[:3]}, columns=3, zoom=2)
    png = torch.from_numpy((plt.imread(tmp_path / "g.png")[..., :3] * 255).round()).to(torch.uint8)
    for block, pictures in enumerate((a, 255 - a[:3])):
        for i, picture in enumerate(pictures):
            top, left = (block + 1) * 28 + block * 128 + i // 3 * 64, i % 3 * 64         # 28 pixels of title, two rows of 64
            assert torch.equal(png[top:top + 64:2, left:left + 64:2].permute(2, 0, 1), picture)


def test_pictures_that_are_not_finite_are_refused():
    """An absurd guidance gives NaN, which would become black pixels: an error instead."""
    with pytest.raises(FloatingPointError, match="guidance 1e\\+38"):
        sample.draw(small_unet(), 2, 3, guidance=1e38)


def test_steps_come_from_the_checkpoint(checkpoint, capsys):
    """Without --steps a quantized model draws with the steps that its scales were trained for; other steps are said aloud."""
    student = sample.load_model(checkpoint)
    assert sample.trained_steps({"q": student}) == len(TIMES) and sample.trained_steps({"f": small_unet()}) == 50
    other = small_unet()
    hqdm.quantize_unet(other, 4, 3, block=16, timesteps=[999, 0])
    with pytest.raises(ValueError, match="choose with --steps"):
        sample.trained_steps({"q": student, "other": other})
    for more, said in (([], False), (["--steps", 3], True)):
        sample.main([str(a) for a in [checkpoint, "-n", 1, "--device", "cpu", "--out", checkpoint.with_name("s.png"), *more]])
        assert ("activation scales for 4 steps" in capsys.readouterr().out) == said


def test_to_uint8():
    assert sample.to_uint8(torch.tensor([-1.0, 0.0, 1.0, 1.2])).tolist() == [0, 128, 255, 255]


# ---------------------------------------------------------------- the bundled files

def test_the_judge_knows_real_images():
    """On 200 of the bundled training images: nearly all right, C-IS near 10, C-FID far below that of noise."""
    import train
    images, labels = (part[:200] for part in train.load_bundled())
    judge = sample.load_judge()
    real = sample.score(images, labels, judge)
    noise = sample.score(torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8), labels[:100], judge)
    assert real["accuracy"] > 0.95 and real["c_is"] > 9 and noise["accuracy"] < 0.2 and noise["c_fid"] > 10 * real["c_fid"]
    assert sum(p.numel() for p in judge.parameters()) <= 2_500_000
    assert sample.read_checkpoint(ROOT / "checkpoints/judge.pt")["test_accuracy"] >= 0.94


def test_the_bundled_teacher_predicts_noise():
    """Its error on real images at random times: what a wrong scale in attention, or a skip taken twice, would double."""
    import train
    from unet import add_noise
    images, labels = (part[:32] for part in train.load_bundled())
    torch.manual_seed(0)
    x_0, t = images.float() / 127.5 - 1, torch.randint(1000, (32,))
    eps = torch.randn_like(x_0)
    with torch.no_grad():
        guess = sample.load_model(ROOT / "checkpoints/teacher.pt")(add_noise(x_0, t, eps), t, labels)
    assert (guess - eps).square().mean() < 0.045


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_and_are_small(name):
    model = sample.load_model(ROOT / "checkpoints" / name)
    assert model.config["channels"] == 64
    assert (ROOT / "checkpoints" / name).stat().st_size <= (6e6 if name.startswith("w4") else 19e6)


def test_bundled_integer_pictures():
    """The real W4A3 model at full size: every picture the same bytes from integers as from fake quantization."""
    model = sample.load_model(ROOT / "checkpoints/w4a3-single.pt")
    fake, _ = sample.draw(model, 2, steps=3)
    hqdm.set_integer(model)
    assert torch.equal(sample.draw(model, 2, steps=3)[0], fake)


# ---------------------------------------------------------------- the command line

def run(capsys, *argv):
    """sample.py in this process -> (exit code, what it printed on stderr)."""
    try:
        sample.run_cli(lambda: sample.main([str(a) for a in argv]))
        return 0, ""
    except SystemExit as e:
        return e.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def quantized_bytes(tmp_path_factory):
    student, _, quant = quantized()
    hqdm.freeze(student)
    path = tmp_path_factory.mktemp("quantized") / "q.pt"
    sample.save_checkpoint(path, kind="quantized", unet=student.config, quant=quant, model=student.state_dict())
    return path.read_bytes()


@pytest.fixture
def checkpoint(quantized_bytes, tmp_path):
    (tmp_path / "q.pt").write_bytes(quantized_bytes)
    return tmp_path / "q.pt"


@pytest.mark.parametrize("argv, message", [
    (["--class", "dragon"], "choose from airplane"), (["-n", "0"], "not a positive number"), (["-n", "1", "--score"], "-n 2 or more"), (["--out", ""], "cannot write"), (["-n", "-3"], "not a positive number"),
    (["--steps", "0"], "not a positive number"), (["--steps", "1001"], "outside 1 .. 1000"), (["--out", "/no/such/folder/x.png"], "cannot write"),
    (["--seed", "-1"], "not a number from 0"), (["--seed", "9" * 30], "not a number from 0"), (["--npz", "/"], "cannot write"), (["--guidance", "nan"], "guidance"), (["--device", "tpu"], "choose from cpu"), (["no-such.pt"], "no checkpoint"), (["twice"], "named twice")])
def test_bad_input_is_one_line_and_exit_code_2(argv, message, checkpoint, capsys):
    argv = [checkpoint] * 2 if argv == ["twice"] else argv if argv[0] == "no-such.pt" else [checkpoint, "--device", "cpu", "--out", checkpoint.with_name("s.png")] + argv
    code, err = run(capsys, *argv)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_files_that_sample_writes(checkpoint, tmp_path, capsys):
    """PNG, npz in the layout of the public FID tools, and scores with their provenance."""
    out, npz = tmp_path / "s.png", tmp_path / "s.npz"
    assert run(capsys, checkpoint, "-n", 4, "--steps", 2, "--class", "cat", "--integer", "--score", "--npz", npz,
               "--out", out, "--device", "cpu")[0] == 0
    arrays, report = np.load(npz), json.loads((tmp_path / "s.json").read_text())
    assert arrays["arr_0"].shape == (4, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].tolist() == [3] * 4
    assert out.read_bytes()[:4] == b"\x89PNG" and report["settings"]["seed"] == 0
    assert report["scores"][str(checkpoint)]["psnr"] == 99 and report["hardware"] and report["date"]


def test_sample_writes_over_nothing_but_its_own(checkpoint, tmp_path, capsys):
    """Targets that are one file, a checkpoint as a target, a .json of something else: refused before the work, the file as it was."""
    before, metrics = checkpoint.read_bytes(), tmp_path / "metrics.json"
    metrics.write_text("{}")
    for argv in (["--out", checkpoint], ["--out", tmp_path / "a.png", "--npz", checkpoint], ["--out", tmp_path / "a.png", "--npz", tmp_path / "a.png"],
                 ["--score", "--out", tmp_path / "a.png", "--npz", tmp_path / "a.json"], ["--score", "--out", tmp_path / "metrics.png"]):
        code, err = run(capsys, checkpoint, "-n", 2, "--steps", 1, "--device", "cpu", *argv)
        assert code == 2 and ("different files" in err or "holds no scores" in err)
    assert checkpoint.read_bytes() == before and metrics.read_text() == "{}" and not (tmp_path / "a.png").exists()


def test_a_report_is_whole_or_not_there(tmp_path, monkeypatch):
    """A report that cannot be finished leaves the old one as it was; a place where nothing can be written is known before."""
    path = tmp_path / "a.json"
    sample.write_json(path, {"a": 1})
    with monkeypatch.context() as m:
        m.setattr(sample.os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    sample.check_out(path, None, str(tmp_path / "new"))
    for bad in ("", tmp_path, tmp_path / "no" / "a.json"):
        with pytest.raises(ValueError, match="cannot write"):
            sample.check_out(path, bad)


def test_options_arrive(checkpoint, tmp_path, monkeypatch):
    """What the command line says is what draw gets; the npz holds the last checkpoint's pictures, PSNR is to the first one's."""
    teacher = small_unet()
    sample.save_checkpoint(tmp_path / "f.pt", kind="float", unet=teacher.config, model=teacher.state_dict())
    calls, pictures = [], torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    def draw(model, n, steps, label, guidance, seed, progress):
        calls.append((n, steps, label, guidance, seed, {layer.integer for layer in hqdm.layers(model)}))
        return pictures[len(calls) - 1], torch.full((n,), label)
    monkeypatch.setattr(sample, "draw", draw)
    argv = [tmp_path / "f.pt", checkpoint, "-n", 2, "--steps", 3, "--class", "none", "--guidance", 2, "--seed", 7, "--integer", "--score",
            "--npz", tmp_path / "s.npz", "--out", tmp_path / "s.png", "--device", "cpu"]
    sample.main([str(a) for a in argv])
    assert calls == [(2, 3, 10, 2.0, 7, set()), (2, 3, 10, 2.0, 7, {True})]
    assert np.array_equal(np.load(tmp_path / "s.npz")["arr_0"], pictures[1].permute(0, 2, 3, 1).numpy())
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert scores[str(checkpoint)]["psnr"] == sample.psnr(pictures[1], pictures[0])


def test_names_are_no_mathematics(tmp_path):
    """A $ in a path is printed, not parsed."""
    sample.save_grids(tmp_path / "a.png", {"a$_$b/model.pt": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)})
    assert (tmp_path / "a.png").stat().st_size > 500


def test_classes_are_the_models_own(tmp_path, capsys):
    """A network with five classes knows no dog, and its "none" is number 5."""
    small = UNet(channels=32, mults=(1, 2), blocks=1, classes=5)
    sample.save_checkpoint(tmp_path / "five.pt", kind="float", unet=small.config, model=small.state_dict())
    argv = [tmp_path / "five.pt", "-n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "s.png", "--npz", tmp_path / "s.npz", "--class"]
    code, err = run(capsys, *argv, "dog")
    assert code == 2 and "none of the 5 classes" in err
    assert run(capsys, *argv, "none")[0] == 0 and np.load(tmp_path / "s.npz")["arr_1"].tolist() == [5]


def test_integer_flag_keeps_float_models_as_they_are(tmp_path, capsys):
    """`python sample.py --integer`: the teacher in float beside the W4A3 model in integers."""
    assert run(capsys, "--integer", "-n", 1, "--steps", 1, "--out", tmp_path / "s.png", "--device", "cpu") == (0, "")
