"""The data, both trainings, resuming, and bad input to train.py."""
import argparse
import copy
import importlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import tarfile

import pytest
import torch
from conftest import DEVICES, ROOT, small_unet
from torch.testing import assert_close

import hqdm
import sample
import train
from unet import UNet, ddim_timesteps

sys.path.insert(0, str(ROOT / "experiments"))

BIN = ROOT / "checkpoints" / "cifar10-1k.bin"


# ---------------------------------------------------------------- the data

def test_bundled_images():
    """A thousand images in the official record layout: label byte, then R, G, B planes."""
    images, labels = train.load_bundled()
    raw = BIN.read_bytes()
    assert images.shape == (1000, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist()[:5] == [raw[i * 3073] for i in range(5)]
    assert images[2, 1, 3, 4] == raw[2 * 3073 + 1 + 1024 + 3 * 32 + 4]
    assert labels.tolist() == list(raw[::3073]) and labels.bincount().min() > 80


def test_damaged_data_is_refused(tmp_path):
    """A short file, a flipped byte, a missing file: each says what is wrong."""
    raw, path = bytearray(BIN.read_bytes()), tmp_path / BIN.name
    path.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="cut short"):
        train.read_batch(path)
    raw[12345] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        train.read_batch(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cut short"):
        train.read_batch(path)
    with pytest.raises(FileNotFoundError, match="data_batch_1.bin"):
        train.load_cifar10(tmp_path)


def make_archive(folder, monkeypatch):
    """A tar.gz laid out like the official one, of six small files whose md5 the code is told to expect."""
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    for name in list(train.CIFAR10_MD5)[:6]:
        shutil.copy(BIN, inner / name)
        monkeypatch.setitem(train.CIFAR10_MD5, name, train.CIFAR10_MD5[BIN.name])
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.add(inner, "cifar-10-batches-bin")
    return (folder / "a.tar.gz").as_uri()


def test_download_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """From any address; a cut archive or a wrong file leaves nothing behind under the final name."""
    url = make_archive(tmp_path / "mirror", monkeypatch)
    train.download_cifar10(tmp_path / "data", url)
    assert len(train.load_cifar10(tmp_path / "data")[0]) == 5000 and len(train.load_cifar10(tmp_path / "data", test=True)[0]) == 1000
    archive = tmp_path / "mirror" / "a.tar.gz"
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises((ValueError, OSError)):
        train.download_cifar10(tmp_path / "cut", url)
    assert list((tmp_path / "cut").iterdir()) == []
    with tarfile.open(archive, "w:gz") as tar:                   # whole, but not all of CIFAR-10: not what find_data takes for a lack of network
        tar.add(BIN, "cifar-10-batches-bin/data_batch_1.bin")
    with pytest.raises(ValueError, match="not CIFAR-10 as it should be: no data_batch_2.bin in it"):
        train.download_cifar10(tmp_path / "cut", url)
    with pytest.raises(OSError, match="could not fetch"):
        train.download_cifar10(tmp_path / "cut", (tmp_path / "nowhere.tar.gz").as_uri())


def test_without_data_the_bundled_images_are_used_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def offline(*_):
        raise OSError("could not fetch: offline")
    monkeypatch.setattr(train, "download_cifar10", offline)
    assert len(train.find_data(None)[0]) == 1000 and "1,000 BUNDLED IMAGES" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):                       # but a folder that was asked for must exist
        train.find_data(str(tmp_path))


def test_an_address_is_fetched(tmp_path, monkeypatch):
    """--data ADDRESS; an archive with one file that is not the original is refused and leaves nothing."""
    url = make_archive(tmp_path / "mirror", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert len(train.find_data(url)[0]) == 5000
    monkeypatch.setitem(train.CIFAR10_MD5, "test_batch.bin", "0" * 32)
    with pytest.raises(ValueError, match="damaged"):
        train.download_cifar10(tmp_path / "other", url)
    assert list((tmp_path / "other").iterdir()) == []


# ---------------------------------------------------------------- batches and updates

@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    teacher = small_unet()
    sample.save_checkpoint(path, kind="float", unet=teacher.config, model=teacher.state_dict())
    return path


def test_the_pool_holds_what_the_teacher_says():
    """Each entry: eps is the teacher's own output at its x_t, t and label; a share of the labels is "none"."""
    teacher = small_unet()
    pool = train.make_pool(teacher, 12, 3, seed=1, batch=5)
    assert pool["x"].shape == (3, 12, 3, 32, 32) and pool["y"].tolist()[10] == 10
    for x, t, y, eps in train.pool_batches(pool, 6, 2, seed=0):
        assert_close(teacher(x, t, y), eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["pool", "trajectory"])
def test_batches_after_a_resume_are_the_same(order):
    """Starting at step 5 yields exactly what an unbroken run yields from step 5 on."""
    teacher = small_unet()
    pool = train.make_pool(teacher, 4, 3, seed=1)
    def batches(first):
        if order == "pool":
            return list(train.pool_batches(pool, 2, 8, 0, first))
        return list(train.trajectory_batches(teacher, 2, 8, 3, 0, first))
    whole, rest = batches(0), batches(5)
    assert len(whole) == 8 and len(rest) == 3
    for a, b in zip(whole[5:], rest):
        assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_trajectory_order_is_the_teachers_walk():
    """The paper's order: all samples at one t, from T-1 down to 0, each x_t made from the one before."""
    noise, times, labels, _ = zip(*train.trajectory_batches(small_unet(), 40, 6, 3, 0))
    assert [int(t[0]) for t in times] == ddim_timesteps(3).tolist() * 2
    assert set(torch.cat(labels).tolist()) == set(range(11))     # ten classes and none
    assert not torch.equal(noise[0], noise[3])                   # each walk has its own noise


def test_pool_batches_reach_everything():
    """All steps and all images of the pool come up, and no two batches are the same."""
    pool = {"x": torch.arange(12.).view(3, 4), "eps": torch.arange(12.).view(3, 4), "t": torch.tensor([9, 5, 0]), "y": torch.arange(4)}
    x = torch.stack([batch[0] for batch in train.pool_batches(pool, 6, 20, 0)])
    assert len(x.unique()) == 12 and not torch.equal(x[0], x[1])


def test_a_gradient_that_is_not_finite_stops_the_run():
    """Though the loss is: nothing is saved, and the step is named. Afterwards the signals are as they were."""
    saved, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(FloatingPointError, match="step 1"):
        train.run_updates(iter([(torch.tensor(1.), torch.tensor(math.inf))]), [], 1, 1, lambda: saved.append(1))
    assert not saved and signal.getsignal(signal.SIGTERM) is before


def test_decay():
    assert train.decay(0, 100, warmup=10) == 0.1 and train.decay(10, 100, warmup=10) == 1
    assert math.isclose(train.decay(55, 100, warmup=10), 0.5) and train.decay(50, 100, shape="linear") == 0.5
    assert train.decay(100, 100) < 1e-9 and train.decay(100, 100, shape="linear") == 0


def test_learning_rates():
    """LoRA in units of each layer's mean s_w; d log s = ds / s turns rates of scales into steps of their logarithms."""
    student = small_unet()
    hqdm.quantize_unet(student, 4, 3, block=16, timesteps=[999, 0])
    for layer in hqdm.layers(student):
        layer.log_s_x.data.fill_(-1.0)
    groups = hqdm.parameter_groups(student, lr=2.0)
    first = hqdm.layers(student)[0]
    assert math.isclose(groups[0]["base_lr"], 2 * hqdm.RATES["lora"] * first.log_s_w.exp().mean().item(), rel_tol=1e-5)
    scales = torch.cat([layer.log_s_w.exp().flatten() for layer in hqdm.layers(student)])
    assert math.isclose(groups[-3]["base_lr"], 2 * hqdm.RATES["s_w"] / scales.mean().item(), rel_tol=1e-5)
    scales = torch.cat([layer.log_s_x.exp() for layer in hqdm.layers(student)])
    assert math.isclose(groups[-2]["base_lr"], 2 * hqdm.RATES["s_x"] / scales.mean().item(), rel_tol=1e-5)
    assert groups[-1] == {"params": [l.z_x for l in hqdm.layers(student) if hasattr(l, "z_x")], "base_lr": 2 * hqdm.RATES["z_x"]}
    trained = {id(p) for g in groups for p in g["params"]}
    assert trained == {id(p) for p in student.parameters() if p.requires_grad}


def arguments(teacher_file, out, *more):
    return ["--wbits", "4", "--abits", "3", "--block", "16", "--rank", "4", "--ddim-steps", "3", "--steps", "8", "--batch", "4",
            "--device", "cpu", "--teacher", str(teacher_file), "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(teacher_file, tmp_path_factory):
    """One whole quantized run of the command line."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(arguments(teacher_file, out))
    return out


def test_training_leaves_its_files_and_helps(finished):
    """Checkpoint, metrics with provenance, both pictures; the eps error on fresh noises fell."""
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["eps_error"] < metrics["eps_error_untrained"] and len(metrics["losses"]) == 8
    assert metrics["settings"]["wbits"] == 4 and metrics["hardware"] and metrics["seconds"] > 0 and len(metrics["layers"]) > 20
    assert {"model.pt", "last.pt", "metrics.json", "loss.png", "samples.png"} == {p.name for p in finished.iterdir()}
    assert len(hqdm.layers(sample.load_model(finished / "model.pt"))) > 20


@pytest.mark.parametrize("kind", ["pool", "teacher"])
def test_resume_is_exact(kind, finished, teacher_file, tmp_path, monkeypatch):
    """Killed after a save and resumed: the same losses, bit for bit, as the run that was never killed. Both trainings."""
    if kind == "teacher":
        def unet(dropout):
            model = small_unet()
            for m in model.modules():
                if isinstance(m, torch.nn.Dropout):
                    m.p = dropout
            return model
        monkeypatch.setattr(train, "UNet", unet)
        argv = ["--steps", "8", "--batch", "4", "--device", "cpu", "--ddim-steps", "2", "--dropout", "0.2", "--data"]
        (tmp_path / "data").mkdir()
        make_archive(tmp_path / "data", monkeypatch)
        argv += [str(tmp_path / "data"), "--out"]
        train.main(argv + [str(tmp_path / "whole")])
        whole = tmp_path / "whole"
    else:
        argv, whole = arguments(teacher_file, "")[:-1], finished
    real, count = train.decay, iter(range(100))          # decay is asked once a step
    def killed(*args, **kwargs):
        if next(count) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)                # save after every step
    monkeypatch.setattr(train, "decay", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv + [str(tmp_path / "cut")])
    monkeypatch.setattr(train, "decay", real)
    state = sample.read_checkpoint(tmp_path / "cut" / "last.pt")
    assert len(state["losses"]) == 5 and 0 < state["seconds"] < 100
    sample.save_checkpoint(tmp_path / "cut" / "last.pt", **{k: v for k, v in state.items() if k != "format"} | {"seconds": 1000.0})
    train.main(argv + [str(tmp_path / "cut"), "--resume"])
    runs = [json.loads((out / "metrics.json").read_text()) for out in (whole, tmp_path / "cut")]
    assert runs[0]["losses"] == runs[1]["losses"]
    assert runs[1]["seconds"] >= 1000                            # the first part took that long, it says
    if kind == "teacher":
        state, drawn = sample.read_checkpoint(whole / "last.pt"), sample.read_checkpoint(whole / "model.pt")["model"]
        weight = "mid1.conv1.weight"
        assert torch.equal(drawn[weight], state["ema"][weight].half())           # the average is what draws, not the last weights
        assert not any(torch.equal(state["ema"][weight], other[weight]) for other in (state["model"], small_unet().state_dict()))
        # other data than the run began with: refused
        monkeypatch.setattr(train, "find_data", lambda _: [part[:9] for part in train.load_bundled()])
        with pytest.raises(ValueError, match="other settings: --images 9"):
            train.main(argv + [str(tmp_path / "cut"), "--resume"])
    a, b = (sample.read_checkpoint(out / "model.pt")["model"] for out in (whole, tmp_path / "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(teacher_file, tmp_path, monkeypatch, capsys):
    """A loss that is not finite: exit code 2, the step named, last.pt from before it, no model.pt."""
    real, count = train.updater, iter(range(100))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "updater", lambda optimizer, loss, device: real(
        optimizer, lambda *batch: loss(*batch) * (math.nan if next(count) == 4 else 1), device))
    with pytest.raises(SystemExit) as stop:
        train.run_cli(lambda: train.main(arguments(teacher_file, tmp_path / "nan")))
    assert stop.value.code == 2 and "not finite at step 5" in capsys.readouterr().err
    ckpt = sample.read_checkpoint(tmp_path / "nan" / "last.pt")
    assert len(ckpt["losses"]) == 4 and all(torch.isfinite(v).all() for v in ckpt["model"].values() if torch.is_tensor(v))
    assert not (tmp_path / "nan" / "model.pt").exists()


def test_teacher_learns():
    """A few updates on the bundled images lower the loss of a small UNet."""
    images, labels = train.load_bundled()
    model = small_unet(3)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "base_lr": 2e-3}])
    losses = [loss.item() for loss, _ in train.teacher_updates(model, ema, optimizer, images, labels, 20, 8, seed=0)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_average_looks_back_over_a_tenth():
    """The EMA after n steps is sum w_i theta_i with w_i ~ i^8, against float64: mean age n / 10, and the start forgotten. Later 0.9999."""
    model, n = torch.nn.Linear(1, 1), 500
    ema, age = copy.deepcopy(model), copy.deepcopy(model)
    torch.nn.init.constant_(ema.weight, 1e6)
    values = torch.randn(n, dtype=torch.float64)
    for step in range(n):
        torch.nn.init.constant_(model.weight, values[step].item())
        train.update_ema(ema, model, step)
        torch.nn.init.constant_(model.weight, float(step))
        train.update_ema(age, model, step)
    weights = torch.tensor([9 / (10 + i) * math.prod(1 - 9 / (10 + j) for j in range(i + 1, n)) for i in range(n)], dtype=torch.float64)
    assert abs(ema.weight.item() - float(weights @ values)) < 1e-5 and abs(n - age.weight.item() - n / 10) < 2
    train.update_ema(ema, model, 10**6)
    assert abs(ema.weight.item() - float(weights @ values) - 1e-4 * (n - 1)) < 1e-3


def test_teacher_sees_images_and_mirror_images():
    """Half the pictures are flipped left to right, none upside down, all scaled to [-1, 1]; labels stay with them."""
    images, labels = train.load_bundled()
    seen, model = [], small_unet()
    def look(net, x_0, y, classes, rows):
        seen.append((x_0, y))
        return model.conv_in.weight.sum()
    ema = copy.deepcopy(model)
    list(train.teacher_updates(model, ema, torch.optim.AdamW([{"params": list(model.parameters()), "base_lr": 1e-3}]), images, labels, 2, 32, 0, loss=look))
    scaled = images.float() / 127.5 - 1
    flipped = 0
    for x_0, y in seen:
        for picture, label in zip(x_0, y):
            same, mirrored = (scaled == picture).flatten(1).all(1), (scaled == picture.flip(2)).flatten(1).all(1)
            assert (same | mirrored).any() and labels[(same | mirrored).nonzero()[0, 0]] == label
            flipped += int(mirrored.any() and not same.any())
    assert 16 < flipped < 48
    list(train.teacher_updates(model, ema, torch.optim.AdamW([{"params": list(model.parameters()), "base_lr": 1e-3}]), images, labels, 2, 32, 1, loss=look))
    assert len({tuple(y.tolist()) for _, y in seen}) == 4        # another batch each step, and with each seed
    assert model.training


def test_scores_along_the_way(tmp_path, monkeypatch):
    """--score-every N: a row of curve.json after every N steps and after the last; a resumed run keeps the rows it had reached."""
    monkeypatch.setattr(train, "draw", lambda model, n, *args, **kwargs: (check(not model.training) or torch.zeros(n), torch.arange(n)))
    monkeypatch.setattr(train, "score", lambda _, labels, judge: check(len(labels) == 5000) or {"c_fid": 1.0, "c_is": 2.0, "accuracy": 0.5})
    args = argparse.Namespace(score_every=2, steps=5, batch=8, ddim_steps=3, seed=0)
    pairs = {letter: (torch.tensor(float(i)), torch.tensor(1.0)) for i, letter in enumerate("abcde")}
    def scored(letters, model, first):
        return ("abcde"[int(pair[0])] for pair in train.scored((pairs[letter] for letter in letters), model, None, first, args, tmp_path))
    updates = scored("abcde", small_unet().train(), 0)
    assert next(updates) + next(updates) == "ab" and json.loads((tmp_path / "curve.json").read_text())[-1]["step"] == 2  # before step 2 is saved
    assert list(updates) == list("cde")
    assert [(r["step"], r["images"]) for r in json.loads((tmp_path / "curve.json").read_text())] == [(2, 16), (4, 32), (5, 40)]
    assert list(scored("de", small_unet(), 3)) == list("de") and (tmp_path / "curve.png").stat().st_size > 1000
    assert [r["step"] for r in json.loads((tmp_path / "curve.json").read_text())] == [2, 4, 5]
    nan = (torch.tensor(math.nan), torch.tensor(1.0))            # not drawn from and not scored: run_updates says which step it was
    assert list(train.scored(iter([nan]), small_unet(), None, 3, args, tmp_path)) == [nan]
    (tmp_path / "curve.json").write_text("[{")
    with pytest.raises(ValueError, match="curve.json is damaged"):
        next(scored("a", small_unet(), 0))


def test_rates_of_both_trainings():
    """The teacher warms up for a tenth of a short run, then follows a cosine; distillation goes down in a straight line."""
    model, images, labels = small_unet(), *train.load_bundled()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "base_lr": 1e-3}])
    updates = train.teacher_updates(model, copy.deepcopy(model), optimizer, images, labels, 20, 2, 0, loss=lambda net, *_, **__: model.conv_in.weight.sum())
    rates = [optimizer.param_groups[0]["lr"] / 1e-3 for _ in updates]
    assert_close(rates, [0.5, 1.0] + [0.5 + 0.5 * math.cos(math.pi * i / 18) for i in range(18)])
    next(train.teacher_updates(model, copy.deepcopy(model), optimizer, images, labels, 80_000, 2, 0, loss=lambda net, *_, **__: model.conv_in.weight.sum()))
    assert_close(optimizer.param_groups[0]["lr"], 1e-3 / 500)                   # no warm-up is longer than 500 updates
    class Student(torch.nn.Linear):
        def forward(self, x, t, y):
            return super().forward(x)
    optimizer, batch = torch.optim.SGD([{"params": list((student := Student(4, 4)).parameters()), "base_lr": 1e-3}]), torch.randn(2, 4, 4, 4)
    updates = train.distil_updates(student, optimizer, [(batch, 0, 0, batch)] * 5, 5)
    assert_close([optimizer.param_groups[0]["lr"] / 1e-3 for _ in updates], [1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("order", ["pool", "trajectory"])
def test_options_of_a_quantized_run_arrive(order, teacher_file, tmp_path, monkeypatch):
    """--order, --lr, --seed and --steps are what the training gets, and every scale of every step is calibrated by then."""
    real, got = train.make_pool, []
    monkeypatch.setattr(train, "make_pool", lambda teacher, n, steps, seed: real(teacher, 1, steps, seed))
    monkeypatch.setattr(train, "distil_updates", lambda *args, **_: got.extend(args) or fail(InterruptedError()))
    with pytest.raises(InterruptedError):
        train.main(arguments(teacher_file, tmp_path / "x", "--order", order, "--lr", "2", "--seed", "3"))
    student, optimizer, batches, steps = got
    assert [g["base_lr"] for g in optimizer.param_groups] == [g["base_lr"] for g in hqdm.parameter_groups(student, 2.0)]
    assert batches.gi_code.co_name == f"{order}_batches" and batches.gi_frame.f_locals["seed"] == 3 and steps == 8
    assert all((layer.log_s_x != 0).all() for layer in hqdm.layers(student))


def test_options_of_a_teacher_arrive(tmp_path, monkeypatch):
    """--dropout; the first weights depend on --seed alone; what --score-every draws from is the EMA."""
    weights, seen = [], {}
    def look(model, ema, *args):
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
        weights.append(model.conv_in.weight.detach().clone())
        seen.update(model=model, ema=ema)
    monkeypatch.setattr(train, "teacher_updates", look)
    monkeypatch.setattr(train, "scored", lambda _, net, *args: fail(InterruptedError()) if net is seen["ema"] is not seen["model"] else None)
    monkeypatch.setattr(train, "find_data", lambda _: train.load_bundled())
    monkeypatch.setattr(train, "UNet", lambda dropout: UNet(channels=32, mults=(1,), blocks=1, attention=(), dropout=dropout))
    for seed in ("0", "0", "1"):
        torch.rand(1)
        with pytest.raises(InterruptedError):
            train.main(["--device", "cpu", "--dropout", "0.25", "--score-every", "9", "--seed", seed, "--out", str(tmp_path / "x")])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_noises_of_a_run_are_its_own(teacher_file, tmp_path, monkeypatch):
    """A student is calibrated, trained and tested on three pools from three seeds: the printed error is on noise it never saw."""
    real, pool_batches, seeds = train.make_pool, train.pool_batches, []
    monkeypatch.setattr(train, "make_pool", lambda teacher, n, steps, seed: seeds.append(seed) or real(teacher, 1, steps, seed))
    monkeypatch.setattr(train, "distil_updates", lambda *_, **__: fail(InterruptedError()))
    with pytest.raises(InterruptedError):
        train.main(arguments(teacher_file, tmp_path / "x"))
    assert len(seeds) == len(set(seeds)) == 3
    # before and after training the error is taken on one and the same pool, the one that nothing else uses
    monkeypatch.undo()
    pools, asked, used = [], [], []
    monkeypatch.setattr(train, "make_pool", lambda teacher, n, steps, seed: pools.append(real(teacher, 1, steps, seed)) or pools[-1])
    monkeypatch.setattr(train, "eps_error", lambda student, pool: asked.append(pool) or 1.0)
    monkeypatch.setattr(train, "pool_batches", lambda pool, *args, **_: used.append(pool) or pool_batches(pool, *args, **_))
    train.main(arguments(teacher_file, tmp_path / "y", "--steps", "1"))
    assert len(asked) == 2 and asked[0] is asked[1] is not used[0] and len(pools) == 3


def test_a_long_run_keeps_means_of_its_losses(tmp_path, monkeypatch):
    """metrics.json of 20,001 updates has 6,667 losses, each the mean of three."""
    monkeypatch.setattr(train, "save_grids", lambda *_: None)
    (tmp_path / "model.pt").touch()
    losses = [float(i % 3) for i in range(20_001)]
    train.finish(argparse.Namespace(ddim_steps=1, seed=0), torch.device("cpu"), tmp_path, losses, 1.0, {}, {})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["updates_per_loss"] == 3 and metrics["losses"] == [1.0] * 6667


def test_update_clips_the_gradient_and_scales_the_rate():
    """A gradient of norm 5 is cut to 1; the step is base_lr times the factor."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [p], "base_lr": 0.5}], lr=1.0)
    update = train.updater(optimizer, lambda g: (p * g).sum(), p.device)
    loss, norm = update(0.5, torch.tensor([3.0, 4.0]))
    assert_close(p.detach(), -0.25 * torch.tensor([0.6, 0.8]))
    assert loss == 0 and math.isclose(norm, 5, rel_tol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_recorded_steps_are_the_steps(device):
    """Six updates by train.updater, recorded on a GPU, leave the parameters where plain PyTorch leaves them; rates change by step."""
    torch.manual_seed(0)
    a = torch.nn.Linear(6, 3).to(device)
    b, batches = copy.deepcopy(a), torch.randn(6, 5, 6, device=device)
    optimizer = train.adamw([{"params": list(a.parameters()), "base_lr": 0.01}], torch.device(device))
    optimizer.param_groups[0].update(capturable=True, lr=torch.tensor(9.0))      # as the state of a run on a GPU has them
    ours = train.updater(optimizer, lambda x: a(x).square().mean(), torch.device(device))
    adam = torch.optim.AdamW(b.parameters(), weight_decay=0.0)
    for i, x in enumerate(batches):
        loss, norm = ours(1 - i / 6, x)
        adam.param_groups[0]["lr"] = 0.01 * (1 - i / 6)
        adam.zero_grad()
        oracle = b(x).square().mean()
        oracle.backward()
        assert_close(norm, torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)), assert_close(loss, oracle.detach())
        adam.step()
        assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-6)


def test_distillation_loss_is_the_mean_squared_error():
    """loss = mean (eps_student - eps_teacher)^2, at the first step."""
    teacher = small_unet()
    student = copy.deepcopy(teacher)
    hqdm.quantize_unet(student, 4, 3, block=16, timesteps=[999, 500, 0])
    batch = next(train.pool_batches(train.make_pool(teacher, 4, 3, seed=1), 4, 1, 0))
    expected = (student(*batch[:3]) - batch[3]).square().mean()
    optimizer = torch.optim.AdamW(hqdm.parameter_groups(student))
    assert_close(next(train.distil_updates(student, optimizer, [batch], 1))[0], expected)


def test_a_quantized_checkpoint_is_no_teacher(finished, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.run_cli(lambda: train.main(arguments(finished / "model.pt", tmp_path / "x")))
    assert stop.value.code == 2 and "'quantized' checkpoint, not 'float'" in capsys.readouterr().err


def test_error_of_each_image():
    """experiments/overfit.py: per image, at one time t, against the sum written out in float64, in batches that do not divide the images."""
    overfit, model, t = importlib.import_module("overfit"), small_unet(1).eval(), 300
    x_0, eps, y = torch.randn(5, 3, 32, 32), torch.randn(5, 3, 32, 32), torch.tensor([0, 3, 9, 1, 10])
    abar = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t])
    x_t = (math.sqrt(abar) * x_0.double() + math.sqrt(1 - abar) * eps.double()).float()
    with torch.no_grad():
        expected = ((model(x_t, torch.full((5,), t), y).double() - eps.double()) ** 2).flatten(1).mean(1)
    assert_close(overfit.errors(model, x_0, y, t, eps, batch=2), expected, rtol=1e-5, atol=0)


def test_eps_error_is_the_mean_squared_difference():
    teacher = small_unet()
    pool = train.make_pool(teacher, 3, 2, seed=0)
    shifted = copy.deepcopy(pool)
    shifted["eps"] += 0.5
    assert train.eps_error(teacher, pool) < 1e-9 and abs(train.eps_error(teacher, shifted) - 0.25) < 1e-4


# ---------------------------------------------------------------- several processes

def check(true):
    assert true


def fail(error):
    raise error


def share_the_work(rank, port, processes, kind, teacher_file, folder):
    """What each process runs: five updates of the float teacher, its pictures' score, five of a quantized student, and a whole train.main."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                         # in one process, too: other sums would round otherwise, and choose other scales
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = train.start_processes(torch.device(kind))
    model, images = small_unet(3).train().to(device), [v.to(device) for v in train.load_bundled()]
    model.register_forward_pre_hook(lambda _, args: check(len(args[0]) == 8 // processes))
    ema = copy.deepcopy(model)
    model.conv_in.weight.data += rank
    train.same_start(model)                          # all begin with what the first one has
    optimizer = train.adamw([{"params": list(model.parameters()), "base_lr": 0.1, "eps": 1.0}], device)       # so large an eps: steps as of SGD
    steps = [[loss.item(), norm.item()] for loss, norm in train.teacher_updates(model, ema, optimizer, *images, 5, 8, seed=0)]
    teacher = small_unet().to(device)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    hqdm.quantize_unet(student, 8, 8, block=16, timesteps=ddim_timesteps(3).tolist())
    pool = train.make_pool(teacher, 8, 3, seed=1)
    hqdm.calibrate(student, teacher, ((x, t.expand(8), pool["y"]) for x, t in zip(pool["x"], pool["t"])))
    optimizer = train.adamw([{**g, "base_lr": 0.01, "eps": 1.0} for g in hqdm.parameter_groups(student)], device)
    batches = train.pool_batches(pool, 6, 5, seed=0)
    steps += [[loss.item(), norm.item()] for loss, norm in train.distil_updates(student, optimizer, batches, 5)]
    score, train.score = train.score, lambda *seen: torch.save(seen[:2], folder / f"{processes}-pictures.pt") or {"c_fid": 1.0, "c_is": 2.0, "accuracy": 0.5}
    args, pair = argparse.Namespace(score_every=1, steps=1, batch=8, ddim_steps=3, seed=7), (torch.tensor(0.0), torch.tensor(1.0))
    assert list(train.scored(iter([pair]), teacher, None, 0, args, folder, n=5)) == [pair]
    train.score = score
    if rank == 0:
        torch.save(steps, folder / f"{processes}.pt")
    torch.set_num_threads(threads)
    if processes > 1:
        calibrate, adamw = hqdm.calibrate, train.adamw
        def calibrated(student, *more):
            calibrate(student, *more)
            for p in student.parameters():
                p.data += 0.01 * rank
        def equal(groups, device):
            mine, both = [[g["base_lr"], *(float(p.detach().double().sum()) for p in g["params"])] for g in groups], [None, None]
            torch.distributed.all_gather_object(both, mine)
            return check(both[0] == both[1]) or adamw(groups, device)
        hqdm.calibrate, train.adamw = calibrated, equal
        train.main(arguments(teacher_file, folder / "run", "--order", "trajectory", "--steps", "2", "--device", kind))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))])
def test_two_processes_share_one_batch(kind, teacher_file, tmp_path):
    """Two processes that share each batch have the losses and gradient norms of one process, one set of files, and score all pictures.

    Five updates: on GPUs the fourth is recorded and the fifth replayed.
    """
    share_the_work(0, None, 1, kind, teacher_file, tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(share_the_work, (port, 2, kind, teacher_file, tmp_path), nprocs=2, start_method="spawn")
    one, two = (torch.tensor(torch.load(tmp_path / f"{n}.pt")) for n in (1, 2))
    assert_close(two, one, rtol=5e-4 if kind == "cpu" else 0.03, atol=0)         # on a GPU in bf16
    whole = sample.draw(small_unet().to(kind), 5, 3, seed=7)
    for n in (1, 2):                                             # 5 pictures: the second process draws two of them
        pictures, labels = torch.load(tmp_path / f"{n}-pictures.pt")
        apart = (pictures.int() - whole[0].int()).abs().float()             # a batch of another size rounds a little differently:
        assert torch.equal(labels, whole[1]) and (apart.max() <= 1 if kind == "cpu" else apart.mean() < 4)   # on a GPU to 11 bits
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["command"].startswith("torchrun --nproc_per_node=2 ") and len(metrics["losses"]) == metrics["settings"]["steps"]


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("more, message", [
    (["--wbits", "1"], "choose 2 to 8"), (["--abits", "9"], "choose 2 to 8"), (["--block", "64"], "use block 32, 16 or 8"),
    (["--block", "0"], "not a positive number"), (["--steps", "0"], "not a positive number"), (["--batch", "-1"], "not a positive number"),
    (["--lr", "nan"], "not a positive number"), (["--score-every", "3"], "is for the teacher"), (["--teacher", "/no/teacher.pt"], "no teacher at"), (["--device", "tpu"], "choose from cpu"),
    (["--ddim-steps", "1001"], "outside 1 .. 1000"), (["--rotation", "triple"], "invalid choice"), (["--out", "/proc/x"], "cannot write"),
    (["--resume"], "nothing to resume"), (["--data", "data"], "is for the teacher"), (["--dropout", "0.1"], "is for the teacher"), (["--batch", "9" * 20], "not a positive number"), (["--out", ""], "--out is empty")])
def test_bad_input_is_one_line_and_exit_code_2(more, message, teacher_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.run_cli(lambda: train.main(arguments(teacher_file, tmp_path / "x", *more)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("argv, message", [
    (["--rotation", "single"], "--rotation is for a quantized model"), (["--teacher", "t.pt"], "--teacher is for a quantized model"),
    (["--ddim-steps", "1001"], "outside 1 .. 1000"), (["--data", "nowhere"], "no data_batch_1.bin"),
    (["--dropout", "1"], "not a share"), (["--dropout", "nan"], "not a share")])
def test_the_teacher_refuses_before_it_trains(argv, message, tmp_path, monkeypatch, capsys):
    """Options of the other training, and what the pictures at the end could not use. A folder that was there before stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit) as stop:
        train.run_cli(lambda: train.main(["--device", "cpu", "--steps", "1", "--out", "mine", *argv]))
    assert stop.value.code == 2 and message in capsys.readouterr().err and (tmp_path / "mine").is_dir()


def test_files_that_are_there_are_a_run(teacher_file, tmp_path):
    """A folder with a metrics.json of somebody's is not written into."""
    (tmp_path / "metrics.json").write_text("precious")
    with pytest.raises(ValueError, match="already holds a run"):
        train.main(arguments(teacher_file, tmp_path))
    assert (tmp_path / "metrics.json").read_text() == "precious"


def test_a_run_is_never_written_over(finished, teacher_file, tmp_path, capsys):
    """--out of a finished run, and --resume with other settings: refused, and every file stays as it was."""
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    others = (("--seed", "1"), ("--batch", "8"), ("--lr", "2"), ("--block", "8"), ("--rank", "2"), ("--order", "trajectory"))
    for more, message in (([], "already holds a run"), *((["--resume", *other], ' '.join(other)) for other in others)):
        with pytest.raises(SystemExit) as stop:
            train.run_cli(lambda: train.main(arguments(teacher_file, finished, *more)))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    sample.save_checkpoint(tmp_path / "other.pt", kind="float", unet=small_unet(1).config, model=small_unet(1).state_dict())
    with pytest.raises(ValueError, match="other settings: --teacher-md5"):
        train.main(arguments(tmp_path / "other.pt", finished, "--resume"))
    assert "drawing" not in capsys.readouterr().out              # refused before the work
    assert before == {p.name: p.read_bytes() for p in finished.iterdir()}


def test_resume_without_out_takes_the_latest_run_of_its_name(tmp_path, monkeypatch):
    """A second run without --out goes to NAME-2; --resume without --out goes on with the one written last, not with NAME-other."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(out=None, resume=False)
    folders = [train.open_out(args, "w4a3")]
    for seconds, name in enumerate(("last.pt", "last.pt", "last.pt")):
        (folders[-1] / name).touch()
        os.utime(folders[-1] / name, (seconds, seconds))
        folders.append(train.open_out(args, "w4a3"))
    (tmp_path / "runs" / "w4a3-other").mkdir()
    (tmp_path / "runs" / "w4a3-other" / "last.pt").touch()
    args.resume = True
    assert [f.name for f in folders] == ["w4a3", "w4a3-2", "w4a3-3", "w4a3-4"] and train.open_out(args, "w4a3").name == "w4a3-3"


def test_two_runs_that_start_together_take_two_folders(tmp_path, monkeypatch):
    """The second finds the first one's folder still empty, and leaves it alone."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(out=None, resume=False)
    assert [train.open_out(args, "w4a3").name for _ in range(3)] == ["w4a3", "w4a3-2", "w4a3-3"]


def test_ctrl_c_is_one_word(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.run_cli(lambda: fail(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_lack_of_memory_is_one_line(capsys):
    """On a CPU torch has no type for it, on a GPU it has; a RuntimeError of another kind is a fault and keeps its traceback."""
    for work in (lambda: torch.empty(10**15), lambda: fail(MemoryError()), lambda: fail(torch.cuda.OutOfMemoryError("can't: out of memory"))):
        with pytest.raises(SystemExit) as stop:
            sample.run_cli(work)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "memory" in err.lower() and len(err.splitlines()) == 1
    with pytest.raises(RuntimeError, match="a fault"):
        sample.run_cli(lambda: fail(RuntimeError("a fault")))
    with pytest.raises(NotImplementedError):                     # one of many faults that are RuntimeErrors by descent
        sample.run_cli(lambda: fail(NotImplementedError("a fault")))


def test_a_polite_kill_saves_and_the_run_goes_on(finished, teacher_file, tmp_path, monkeypatch):
    """SIGTERM in the middle: exit code 130, the step done and saved, with the losses of a run that was not killed."""
    real, count = train.decay, iter(range(100))          # decay is asked once a step
    def kill(*args, **kwargs):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    monkeypatch.setattr(train, "decay", kill)
    out = tmp_path / "killed"
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(teacher_file, out))
    assert stop.value.code == 130 and len(sample.read_checkpoint(out / "last.pt")["losses"]) == 4
    assert sample.read_checkpoint(out / "last.pt")["losses"] == sample.read_checkpoint(finished / "last.pt")["losses"][:4]      # the rest: test_resume_is_exact
