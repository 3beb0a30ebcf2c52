"""The data, both trainings, resuming, and bad input to train.py."""
import concurrent.futures
import contextlib
import copy
import functools
import gc
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading

import pytest
import torch
from conftest import DEVICES, ROOT, tiny_unet
from torch.testing import assert_close

import hqdm
import sample
import train
from plumbing import kept, runs
from unet import UNet, ddim, ddim_timesteps

sys.path.insert(0, str(ROOT / "experiments"))
import grid  # noqa: E402
import means  # noqa: E402

BIN = sample.CHECKPOINTS / "cifar10-300.bin"
TIMES = tuple(ddim_timesteps(3).tolist())
SCHEME = hqdm.Scheme(4, 3, "single", block=16, rank=4, timesteps=TIMES)


REAL_PICTURES, PARAMETER_GROUPS = train.untrained_pictures, train.parameter_groups


@contextlib.contextmanager
def small_runs():
    """Runs of train.py in seconds: calibration from fewer values, two walks for 8, two pictures, none of untrained."""
    walks, draw = train.trajectories, train.draw
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hqdm, "fit_scale", functools.partial(hqdm.fit_scale, samples=512))
        m.setattr(train, "trajectories", lambda teacher, n, *more: walks(teacher, 2 if n == 8 else n, *more))
        m.setattr(train, "draw", lambda model, n, *more, **named: draw(model, min(n, 2), *more, **named))
        m.setattr(train, "untrained_pictures", lambda *_: {"float": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)})
        yield


@pytest.fixture(scope="module", autouse=True)
def small():
    with small_runs():
        yield


def check(true):
    assert true


def fail(error):
    raise error


# ---------------------------------------------------------------- the data

def test_bundled_images():
    """The first images in the official record layout: label byte, then R, G, B planes."""
    (images, labels), raw = train.load_bundled(), BIN.read_bytes()
    assert images.shape == (300, 3, 32, 32) and images.dtype == torch.uint8
    assert images[2, 1, 3, 4] == raw[2 * 3073 + 1 + 1024 + 3 * 32 + 4]
    assert labels.tolist() == list(raw[::3073]) and labels.bincount().min() > 20


def test_damaged_data_is_refused(tmp_path):
    """A short file, a flipped byte, a missing file: each says what is wrong."""
    path, raw = tmp_path / BIN.name, BIN.read_bytes()
    flipped = bytearray(raw)
    flipped[12345] ^= 1
    for damaged, message in ((raw[:-1], "cut short"), (b"", "cut short"), (flipped, "damaged")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
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
    with tarfile.open(folder / "a.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(inner, "cifar-10-batches-bin")
    return (folder / "a.tar.gz").as_uri()


def test_an_address_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    """--data ADDRESS; a cut archive, a wrong or a missing file leaves nothing behind under the final name."""
    url, archive = make_archive(tmp_path / "mirror", monkeypatch), tmp_path / "mirror" / "a.tar.gz"
    monkeypatch.chdir(tmp_path)
    assert len(train.find_data(url)[0]) == 1500 and len(train.load_cifar10(tmp_path / "data", test=True)[0]) == 300
    def refused(error, message):
        with pytest.raises(error, match=message):
            train.download_cifar10(tmp_path / "other", url)
        assert list((tmp_path / "other").iterdir()) == []
    with monkeypatch.context() as m:
        m.setitem(train.CIFAR10_MD5, "test_batch.bin", "0" * 32)
        refused(ValueError, "not CIFAR-10 as it should be: .*damaged")
    archive.write_bytes(archive.read_bytes()[:100_000])
    refused(ValueError, "not a whole tar archive")
    with tarfile.open(archive, "w:gz") as tar:                   # not what find_data takes for a lack of network
        tar.add(BIN, "cifar-10-batches-bin/data_batch_1.bin")
    refused(ValueError, "not CIFAR-10 as it should be: no data_batch_2.bin in it")
    archive.unlink()
    refused(ConnectionError, "could not fetch")


def test_two_runs_fetch_at_once(tmp_path, monkeypatch):
    """The slower one finds the folder there, and uses it: neither an error nor a lack of network."""
    url = make_archive(tmp_path / "mirror", monkeypatch)
    monkeypatch.chdir(tmp_path)
    real = train.fetch
    def meanwhile(*args):
        monkeypatch.setattr(train, "fetch", real)
        train.download_cifar10("data", url)
        real(*args)
    monkeypatch.setattr(train, "fetch", meanwhile)
    assert len(train.find_data(url)[0]) == 1500 and len(list((tmp_path / "data").iterdir())) == 1


def test_a_host_that_drips_is_given_up(tmp_path, monkeypatch):
    """A byte every two seconds never times out; after half a minute the speed since the start is too low."""
    class Drip(io.BytesIO):
        def read1(self, n):
            clock[0] += 2
            return b"x"
    clock = [0]
    monkeypatch.setattr(train.time, "time", lambda: clock[0])
    monkeypatch.setattr(train.urllib.request, "urlopen", lambda *_, timeout: Drip())
    with pytest.raises(ConnectionError, match="16 bytes in 32 s"):
        train.fetch("http://x", tmp_path / "f")


def test_without_data_the_bundled_images_are_used_loudly(tmp_path, monkeypatch, capsys):
    """Offline 300 images, and it says so; but a folder that was asked for must exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "download_cifar10", lambda *_: fail(ConnectionError("could not fetch: offline")))
    assert len(train.find_data(None)[0]) == 300 and "300 BUNDLED IMAGES" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        train.find_data(str(tmp_path))
    monkeypatch.setattr(train, "download_cifar10", lambda *_: fail(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):          # is no lack of network
        train.find_data(None)
    for name in list(train.CIFAR10_MD5)[:6]:                     # in data/ itself they are found, too
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(BIN, tmp_path / "data" / name)
        monkeypatch.setitem(train.CIFAR10_MD5, name, train.CIFAR10_MD5[BIN.name])
    assert len(train.find_data(None)[0]) == 1500


# ---------------------------------------------------------------- the carousel: where batches come from

class Teacher(torch.nn.Module):
    """A teacher of one line: its noise tells x, t and y."""
    classes = 10

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y):
        return 0.4 * x.roll(1, 3) + 0.2 * x + (t / 5000 + y / 50).view(-1, 1, 1, 1)


def told(carousel, *args, student=None, **more):
    """carousel.batches(*args); after each the carousel is told what a student says, if it asks."""
    for x, t, y, target in carousel.batches(*args, **more):
        yield x, t, y, target
        if student:
            carousel.advance(student(x, t, y))


def ride(carousel, *args, student=None):
    """The batches of told(..): for each a list of (walk, x_t, t, y, eps), sorted by walk."""
    taken, move = [], carousel.move
    carousel.move = lambda walks: taken.append(walks.tolist()) or move(walks)
    batches = list(told(carousel, *args, student=student))
    carousel.move = move
    return [sorted(zip(walks, *batch), key=lambda row: row[0]) for walks, batch in zip(taken, batches)]


@pytest.mark.parametrize("together", [False, True])
def test_targets_are_the_teachers_own(together):
    """Each batch's eps is what the teacher says at its x_t, t and y, the same bits, whatever has moved meanwhile."""
    teacher = tiny_unet()
    for x, t, y, eps in list(train.Carousel(teacher, 3, TIMES, 0, together).batches(3 if together else 2, 5, 0)):
        assert torch.equal(teacher(x, t, y), eps) and not eps.requires_grad and set(t.tolist()) <= set(TIMES)


def test_a_walk_is_the_samplers():
    """Fresh walks followed to their ends: x_t and eps are those of unet.ddim from their noise and label, step by step.

    Then they start again, each from new noise (mean 0, deviation 1), at t = T-1, with new labels, "none" among them.
    """
    teacher, times = Teacher(), tuple(ddim_timesteps(5).tolist())
    paths, arrived, labels = {}, 0, []
    for batch in ride(train.Carousel(teacher, 12, times, seed=0), 4, 120, 0):
        for walk, *row in batch:
            paths.setdefault(walk, []).append(row)
    for path in paths.values():
        fresh = [i for i, (_, t, _, _) in enumerate(path) if t == 999]
        for i in (i for i in fresh if i + 5 < len(path)):
            x, _, y, _ = path[i]
            for (x_t, t, y_t, eps), oracle in zip(path[i:], ddim(teacher, x[None], y[None], 5)):
                assert t == oracle[0] and y_t == y
                assert_close((x_t, eps), (oracle[1][0], oracle[2][0]), rtol=1e-4, atol=1e-4)
            assert i + 5 in fresh and abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
            arrived, labels = arrived + 1, labels + [int(y)]
    assert len(paths) == 12 and arrived > 60 and len(set(labels)) == 11


@pytest.mark.parametrize("together", [False, True])
def test_the_student_walks_beside_the_teacher(together):
    """Own walks: x_t are unet.ddim's of the student, from the noise of the teacher's walk; each target leads to
    the teacher's x_0 of that step. Walks that were under way when it joined begin where the teacher was.
    """
    teacher, student, times = Teacher(), Teacher(), tuple(ddim_timesteps(5).tolist())
    student.forward = lambda x, t, y: 1.1 * Teacher.forward(student, x, t, y) - 0.05
    made = train.Carousel(teacher, 8, times, 0, together, own=True)
    assert torch.equal(made.own, made.x)
    paths, followed = {}, 0
    for batch in ride(made, 8 if together else 4, 60, 0, student=student):
        for walk, *row in batch:
            paths.setdefault(walk, []).append(row)
    for path in paths.values():
        for i in (i for i, (_, t, _, _) in enumerate(path[:-5]) if t == 999):
            x, _, y, _ = path[i]
            both = zip(ddim(student, x[None], y[None], 5), ddim(teacher, x[None], y[None], 5))
            for (x_t, t, y_t, target), (mine, oracle) in zip(path[i:], both):
                assert t == mine[0] and y_t == y
                assert_close(x_t, mine[1][0], rtol=1e-4, atol=1e-4)
                abar = made.abar[times.index(int(t))]
                assert_close((x_t - (1 - abar).sqrt() * target) / abar.sqrt(), oracle[3][0], rtol=1e-4, atol=1e-4)
            followed += 1
    assert followed > 25
    batches = made.batches(4, 2, 0)
    next(batches)
    with pytest.raises(RuntimeError, match="call advance"):
        next(batches)


def test_steps_are_mixed_from_the_first_batch_on():
    """All steps are in the first batch and in each later one, about equally often; labels are any of eleven."""
    carousel = train.Carousel(Teacher(), 256, TIMES, seed=0)
    for _, _, t, y, _ in (zip(*batch) for batch in ride(carousel, 128, 8, 0)):
        assert all(25 < t.count(step) < 65 for step in TIMES) and sum(map(t.count, TIMES)) == 128
        assert {int(label) for label in y} == set(range(11))


def test_paper_order_is_the_teachers_walk():
    """together, n = batch: all at one t, from T-1 down to 0; x_t and eps of unet.ddim; then new noise and labels."""
    teacher = Teacher()
    carousel = train.Carousel(teacher, 40, TIMES, 0, together=True)
    start, labels = carousel.x.clone(), carousel.y.clone()
    _, x, t, y, eps = zip(*(zip(*batch) for batch in ride(carousel, 40, 6, 0)))
    assert [set(map(int, step)) for step in t] == [{time} for time in TIMES] * 2
    for i, (_, x_t, guess, _) in enumerate(ddim(teacher, start, labels, 3)):
        assert_close((torch.stack(x[i]), torch.stack(eps[i])), (x_t, guess), rtol=1e-4, atol=1e-4)
    assert {int(label) for label in y[0]} == set(range(11)) and torch.stack(y[3]).ne(labels).sum() > 20
    assert (torch.stack(x[3]) - start).abs().mean() > 0.5


@pytest.mark.parametrize("student", [None, Teacher()])
@pytest.mark.parametrize("together", [False, True])
def test_a_resumed_carousel_goes_on(together, student):
    """From its state_dict and the next update: the batches of an unbroken one, bit for bit. Another seed has others."""
    def made(seed=1):
        return train.Carousel(Teacher(), 6, TIMES, seed, together, bool(student))
    whole, first, second = list(told(made(), 3, 8, 0, student=student)), made(), made(seed=2)
    other = list(told(made(), 3, 8, 1, student=student))
    list(told(first, 3, 5, 0, student=student))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.rand(7)                                                # all randomness comes from (seed, update)
    rest = list(told(second, 3, 8, 0, first=5, student=student))
    assert len(whole) == 8 and len(rest) == 3
    assert all(torch.equal(p, q) for a, b in zip(whole[5:], rest) for p, q in zip(a, b))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(whole, other))


@pytest.mark.parametrize("together", [False, True])
def test_nothing_repeats(together):
    """No x_t is ever seen twice, in a batch or later; and every walk is taken."""
    batches = ride(train.Carousel(Teacher(), 16, TIMES, 0, together), 16 if together else 4, 40, 0)
    walks, x, *_ = zip(*(row for batch in batches for row in batch))
    assert len(torch.stack(x).flatten(1).unique(dim=0)) == len(x) and set(walks) == set(range(16))


def test_trajectories():
    """The sampler's own walk from the noise of a seed: (x_t, t, y, eps) a step; every eleventh label is "none"."""
    teacher = tiny_unet()
    walks = train.trajectories(teacher, 12, len(TIMES), 1)
    noise, labels = sample.noise_and_labels(12, seed=1)
    labels[10] = 10
    assert len(walks) == 3 and not torch.equal(train.trajectories(Teacher(), 12, len(TIMES), 2)[0][0], noise)
    for (x, t, y, eps), (time, x_t, guess, _) in zip(walks, ddim(teacher, walks[0][0], labels, 3)):
        assert torch.equal(x, x_t) and t.tolist() == [time] * 12 and torch.equal(y, labels) and torch.equal(eps, guess)
    assert torch.equal(walks[0][0], noise)


def test_eps_errors_are_mean_squared_differences():
    """One for each step: 0 for the teacher, 0.25 where its noise is 0.5 away, 0.5 where half of it is 1 away."""
    teacher = Teacher()
    walks = train.trajectories(teacher, 2, len(TIMES), 0)
    away = 0, 0.5, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    walks = [(x, t, y, eps + d) for (x, t, y, eps), d in zip(walks, away)]
    assert_close(train.eps_errors(teacher, walks), [0.0, 0.25, 0.5], rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- updates and rates

def test_decay():
    """Warm-up to 1, cosine or straight line to 0."""
    assert train.decay(0, 100, warmup=10) == 0.1 and train.decay(10, 100, warmup=10) == 1
    assert math.isclose(train.decay(55, 100, warmup=10), 0.5) and train.decay(50, 100, shape="linear") == 0.5
    assert train.decay(100, 100) < 1e-9 and train.decay(100, 100, shape="linear") == 0


def test_learning_rates():
    """LoRA in units of each layer's mean s_w; d log s = ds / s turns rates of scales into steps of their logarithms.

    A plain torch.optim.AdamW of these groups has those rates, no weight decay, and all that is trained once.
    """
    student = tiny_unet()
    hqdm.quantize_network(student, SCHEME)
    with pytest.raises(RuntimeError, match="scales are missing"):
        train.parameter_groups(student)
    layers, mean = hqdm.layers(student), lambda logs: torch.cat([v.exp().flatten() for v in logs]).mean().item()
    for i, layer in enumerate(layers):
        torch.nn.init.constant_(layer.activations.log_s_x, -1.0 - i / 50)
    lora, s_w, s_x, z_x = (2 * train.RATES[name] for name in ("lora", "s_w", "s_x", "z_x"))
    expected = [*(lora * mean([layer.weights.log_s_w]) for layer in layers),
                s_w / mean([layer.weights.log_s_w for layer in layers]),
                s_x / mean([layer.activations.log_s_x for layer in layers]), z_x]
    groups = torch.optim.AdamW(train.parameter_groups(student, lr=2.0)).param_groups
    assert_close([g["lr"] for g in groups], expected, rtol=1e-5, atol=0)
    assert {g["weight_decay"] for g in groups} == {0.0}
    assert [id(p) for p in groups[-1]["params"]] == [id(m.z_x) for m in student.modules() if hasattr(m, "z_x")]
    trained = [id(p) for g in groups for p in g["params"]]
    assert sorted(trained) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    ours = runs.adamw(train.parameter_groups(student, lr=2.0), torch.device("cpu")).param_groups
    assert all(a["initial_lr"] == a["lr"] == b["lr"] and a["weight_decay"] == 0 for a, b in zip(ours, groups))


def sgd(model, lr, **more):
    return torch.optim.SGD([{"params": list(model.parameters()), "lr": 9.0, "initial_lr": lr, **more}])


def test_update_clips_the_gradient_and_scales_the_rate():
    """A gradient of norm 5 is cut to 1; the step is initial_lr times the factor."""
    model = torch.nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    update = runs.updater(sgd(model, 0.5), lambda g: (model.weight * g).sum(), torch.device("cpu"))
    loss, norm = update(0.5, torch.tensor([3.0, 4.0]))
    assert_close(model.weight.detach(), start - 0.25 * torch.tensor([0.6, 0.8]))
    assert_close(loss, (start * torch.tensor([3.0, 4.0])).sum()) and math.isclose(norm, 5, rel_tol=1e-6)
    plain, start = torch.optim.SGD(model.parameters(), lr=1), model.weight.detach().clone()      # not of runs.adamw
    runs.updater(plain, lambda g: (model.weight * g).sum(), torch.device("cpu"))(0.25, torch.tensor([3.0, 4.0]))
    assert_close(model.weight.detach(), start - 0.25 * torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("device", DEVICES)
def test_recorded_steps_are_the_steps(device):
    """Six updates by runs.updater, recorded on a GPU, leave the parameters where plain PyTorch does; rates change."""
    torch.manual_seed(0)
    a = torch.nn.Linear(6, 3).to(device)
    b, batches = copy.deepcopy(a), torch.randn(6, 5, 6, device=device)
    optimizer = runs.adamw([{"params": list(a.parameters()), "lr": 0.01}], torch.device(device))
    optimizer.param_groups[0].update(capturable=True, lr=torch.tensor(9.0))      # as the state of a GPU's run has them
    ours = runs.updater(optimizer, lambda x: a(x).square().mean(), torch.device(device))
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


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Stream:
    """Of torch.cuda, for the tests without a GPU: it notes who waited for what; bad: like that of a recording that failed."""
    device, bad, waits = torch.device("cpu"), False, []

    def wait_stream(self, other):
        self.waits.append(other.record_event())

    def wait_event(self, event):
        self.waits.append(event)

    def record_event(self):
        if Stream.bad:
            raise RuntimeError("operation failed due to a previous error during capture")
        return "event"


@pytest.fixture
def recording(monkeypatch):
    """As if a CUDA graph were being recorded, in this thread."""
    monkeypatch.setattr(Stream, "waits", [])
    here = threading.get_ident()
    for name, f in dict(is_available=lambda: True, is_current_stream_capturing=lambda: threading.get_ident() == here, current_stream=Stream,
                        Stream=Stream, stream=lambda s: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, f)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def two_layers():
    """A quantized network, with B A != 0, and an input."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32))
    student, x = copy.deepcopy(net), torch.randn(8, 32)
    hqdm.quantize_network(student, hqdm.Scheme(4, 4, block=16, rank=4), eight_bits=())
    hqdm.calibrate(student, net, [(x,)])
    for layer in hqdm.layers(student):
        torch.nn.init.normal_(layer.weights.lora_B, std=0.05)
    return student, x.requires_grad_()


def test_ahead_makes_each_weight_once(recording, monkeypatch):
    """Used twice, or computed again in backward, and in autocast: the gradients without. Another thread makes its own."""
    student, x = two_layers()
    params, made = [p for p in student.parameters() if p.requires_grad], []
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16)
    again = functools.partial(torch.utils.checkpoint.checkpoint, student, use_reentrant=False, preserve_rng_state=False)
    for f in (lambda: student(student(x)), lambda: again(x)):
        with bf16:
            expected = torch.autograd.grad(f().square().mean(), params)
        with monkeypatch.context() as m:
            m.setattr(hqdm.WeightQuantizer, "forward", lambda self, plain=hqdm.WeightQuantizer.forward: made.append(self) or plain(self))
            made.clear()
            with bf16, kept.ahead(student):
                loss = f().square().mean()
                gradients = torch.autograd.grad(loss, params)
                assert len(made) == 2 and len(Stream.waits) > 4
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    pool.submit(student, x).result()
                assert len(made) == 4, "by another thread"
        assert not kept._ahead and max(a.abs().max() for a in expected) > 0
        for mine, oracle in zip(gradients, expected, strict=True):
            assert_close(mine, oracle)


def test_ahead_leaves_nothing_after_an_error(recording, monkeypatch):
    """What a recording that failed had made is not used later; and a network that it knows nothing of passes."""
    student, x = two_layers()
    with pytest.raises(RuntimeError), kept.ahead(student):
        assert len(kept._ahead) == 4
        monkeypatch.setattr(Stream, "bad", True)
        raise ValueError("inside")
    assert not kept._ahead
    monkeypatch.setattr(Stream, "bad", False)
    with kept.ahead(None), kept.ahead(torch.nn.Linear(3, 3)):
        assert not kept._ahead


def test_the_first_error_of_a_recording_is_told():
    """The end of the recording fails as well, and says less; an error that was being handled before is another matter."""
    def told(first, outer=None):
        try:
            try:
                try:
                    raise outer or first
                finally:
                    if outer:
                        raise first
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as e:
            return runs._first(e, outer)
    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert told(memory) is memory and told(memory, ValueError("handled")) is memory
    assert "not permitted when stream is capturing. Does" in str(told(RuntimeError("operation not permitted when stream is capturing")))


@GPU
def test_weights_made_ahead_are_the_weights():
    """A recorded step takes weights and scales of all layers from a second stream: the same gradients, at any weights."""
    teacher = tiny_unet().cuda()
    student = train.quantized_copy(teacher, SCHEME, train.trajectories(teacher, 2, len(TIMES), 0))
    params, taken = [p for p in student.parameters() if p.requires_grad], []
    batch, *_ = train.Carousel(teacher, 8, TIMES, 1).batches(4, 1, 0)

    def gradients(x, t, y, target):
        with kept.ahead(student):
            loss = (student(x, t, y) - target).square().mean()
            taken.append(len(kept._ahead))
            return torch.autograd.grad(loss, params)
    step = runs.recorded(gradients, "cuda")
    for _ in range(4):
        with torch.no_grad():
            for p in params:
                p.add_(0.01 * torch.randn_like(p))
        for mine, eager in zip(step(*batch), gradients(*batch)):
            assert_close(mine, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())
    assert max(taken) == 2 * len(hqdm.layers(student)) and not kept._ahead


@GPU
def test_a_recording_that_fails_says_why():
    """A kept result holds the graph of its gradient, on everybody's stream; a number that is read waits for the GPU."""
    teacher = tiny_unet().cuda()
    student = train.quantized_copy(teacher, SCHEME, train.trajectories(teacher, 2, len(TIMES), 0))
    batches = list(train.Carousel(teacher, 8, TIMES, seed=1).batches(4, 4, 0))
    optimizer, held = runs.adamw(train.parameter_groups(student), torch.device("cuda")), student(*batches[0][:3])
    with pytest.raises(RuntimeError, match="detach"):
        list(train.distil(student, optimizer, batches, 4))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    del held
    hook = student.conv_in.register_forward_hook(lambda layer, args, y: [y.sum().item()].clear())    # None: y stays
    with pytest.raises(RuntimeError, match="stream is capturing.*item"):
        list(train.distil(student, optimizer, batches, 4))
    assert not kept._ahead and torch.cuda.current_stream() == torch.cuda.default_stream()
    hook.remove()
    assert len(list(train.distil(student, optimizer, batches, 4))) == 4


@GPU
def test_python_frees_no_recording_while_another_is_made():
    """An old recorded step is a ring of objects, freed when Python looks for those; that would spoil a new one."""
    x, old = torch.ones(3, device="cuda"), []
    def f(v):
        if torch.cuda.is_current_stream_capturing():
            old.clear()
            gc.set_threshold(1)
            assert [[] for _ in range(1000)]         # new objects: so Python looks
        return v + 1
    before = gc.get_threshold()
    try:
        new = runs.recorded(f, "cuda")
        new(x)
        gc.set_threshold(10**6)
        step = runs.recorded(lambda v: v - 1, "cuda")
        old.append(step)
        assert [step(x).tolist() for _ in range(2)] == [[0, 0, 0]] * 2
        step.itself = step
        del step
        assert [new(x).tolist() for _ in range(2)] == [[2, 2, 2]] * 2 and gc.isenabled()
    finally:
        gc.set_threshold(*before)


def test_rates_of_both_trainings():
    """The teacher warms up for a tenth, at most 500 updates, then follows a cosine; a student has a straight line."""
    model, optimizer = tiny_unet(), sgd(tiny_unet(), 1e-3)
    def updates(steps):
        nets, data = (model, copy.deepcopy(model)), train.load_bundled()
        loss = lambda *_, **__: optimizer.param_groups[0]["params"][0].sum()
        return train.teacher_updates(*nets, optimizer, *data, steps, 2, 0, loss=loss)
    rates = [optimizer.param_groups[0]["lr"] / 1e-3 for _ in updates(20)]
    assert_close(rates, [0.5, 1.0] + [0.5 + 0.5 * math.cos(math.pi * i / 18) for i in range(18)])
    next(updates(80_000))
    assert_close(optimizer.param_groups[0]["lr"], 1e-3 / 500)
    class Student(torch.nn.Linear):
        def forward(self, x, t, y):
            return super().forward(x)
    student, v = Student(4, 4), torch.randn(2, 4, 4, 4)
    optimizer = sgd(student, 1e-3)
    for first, expected in ((0, [1.0, 0.8, 0.6, 0.4, 0.2]), (3, [0.4, 0.2])):
        updates = train.distil(student, optimizer, [(v, v, v, v)] * (5 - first), 5, first)
        assert_close([optimizer.param_groups[0]["lr"] / 1e-3 for _ in updates], expected)


def test_distillation_loss():
    """loss = the mean of (eps_student - target)^2, at the first step; balanced, of what balanced() makes of each sample's."""
    teacher = tiny_unet()
    student = train.quantized_copy(teacher, SCHEME, train.trajectories(teacher, 2, len(TIMES), 0))
    x, t, y, eps = batch = next(train.Carousel(teacher, 8, TIMES, seed=1).batches(4, 1, 0))
    for balance in (0, 0.5, 1):
        mine = copy.deepcopy(student)                # a step changes it
        optimizer = runs.adamw(train.parameter_groups(mine), torch.device("cpu"))
        loss, _ = next(train.distil(mine, optimizer, [batch], 1, 0, balance))
        errors = (student(x, t, y) - eps).square().detach().flatten(1).mean(1)
        assert_close(loss, errors.pow(1 - balance).mean() * 1e-3**balance)


@pytest.mark.parametrize("device", DEVICES)
def test_distillation_tells_what_the_student_said(device):
    """advance gets the student's eps of each batch, of all its rows, from before the update; also of recorded ones."""
    teacher = tiny_unet().to(device)
    student, heard = train.quantized_copy(teacher, SCHEME, train.trajectories(teacher, 2, len(TIMES), 0)), []
    batches = list(train.Carousel(teacher, 8, TIMES, seed=1).batches(4, 4, 0))
    optimizer = runs.adamw(train.parameter_groups(student), torch.device(device))
    expected = [student(*batches[0][:3]).detach()]
    for _ in train.distil(student, optimizer, batches, 4, advance=lambda eps: heard.append(eps.clone())):
        expected += [student(*batch[:3]).detach() for batch in batches[len(expected):len(expected) + 1]]
    assert len(heard) == 4 and all(map(torch.equal, heard, expected)) and not heard[0].requires_grad


def test_balance_of_the_loss():
    """Gradients, by hand: 0 that of the mean, 1 a thousandth of that of the mean logarithm, between them powers.

    That of a batch is the mean of its halves'. A perfect student has nothing to learn.
    """
    errors = torch.tensor([1e-4, 1e-3, 0.1, 0.02], dtype=torch.float64, requires_grad=True)
    for balance, oracle in ((0, errors.mean()), (1, 1e-3 * errors.log().mean()), (0.5, 2 * (1e-3 * errors).sqrt().mean())):
        loss = train.balanced(errors, balance)
        (gradient,), (expected,) = (torch.autograd.grad(v, errors) for v in (loss, oracle))
        halves = sum(torch.autograd.grad(train.balanced(half, balance), errors)[0] for half in errors.split(2)) / 2
        assert_close(gradient, expected), assert_close(halves, expected), assert_close(loss, errors.pow(1 - balance).mean() * 1e-3**balance)
        zeros = torch.zeros(2, requires_grad=True)
        loss = train.balanced(zeros.square(), balance)
        assert loss == 0 and torch.equal(torch.autograd.grad(loss, zeros)[0], torch.zeros(2))


def test_teacher_learns():
    """A few updates on the bundled images lower the loss of a small UNet."""
    model = tiny_unet(3)
    optimizer = runs.adamw([{"params": list(model.parameters()), "lr": 2e-3}], torch.device("cpu"))
    updates = train.teacher_updates(model, copy.deepcopy(model), optimizer, *train.load_bundled(), 20, 8, seed=0)
    losses = [loss.item() for loss, _ in updates]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_average_looks_back_over_a_tenth():
    """The EMA after n steps is sum w_i theta_i with w_i ~ i^8, against float64: mean age n / 10, the start forgotten.

    Later its decay is 0.9999.
    """
    model, n = torch.nn.Linear(1, 1), 500
    ema, age = copy.deepcopy(model), copy.deepcopy(model)
    torch.nn.init.constant_(ema.weight, 1e6)
    values = torch.randn(n, dtype=torch.float64)
    for step in range(n):
        for average, value in ((ema, values[step].item()), (age, float(step))):
            torch.nn.init.constant_(model.weight, value)
            train.update_ema(average, model, step)
    weights = [9 / (10 + i) * math.prod(1 - 9 / (10 + j) for j in range(i + 1, n)) for i in range(n)]
    expected = float(torch.tensor(weights, dtype=torch.float64) @ values)
    assert abs(ema.weight.item() - expected) < 1e-5 and abs(n - age.weight.item() - n / 10) < 2
    train.update_ema(ema, model, 10**6)
    assert abs(ema.weight.item() - expected - 1e-4 * (n - 1)) < 1e-3


def test_teacher_sees_images_and_mirror_images():
    """Half the pictures are flipped left to right, none upside down, all scaled to [-1, 1]; labels stay with them.

    Another batch each step, and with each seed; the model is in training mode.
    """
    (images, labels), seen, model, flipped = train.load_bundled(), [], tiny_unet(), 0
    def look(net, x_0, y, classes, rows):
        seen.append((x_0, y))
        return model.conv_in.weight.sum()
    for seed in (0, 1):
        ema = copy.deepcopy(model)
        list(train.teacher_updates(model, ema, sgd(model, 1e-3), images, labels, 2, 32, seed, loss=look))
    label_of = {x.numpy().tobytes(): label for x, label in zip(images.float() / 127.5 - 1, labels)}
    for x_0, label in ((x_0, label) for batch in seen for x_0, label in zip(*batch)):
        same, mirrored = (label_of.get(x.contiguous().numpy().tobytes()) for x in (x_0, x_0.flip(2)))
        assert label in (same, mirrored)
        flipped += same is None
    assert 40 < flipped < 88 and len({tuple(y.tolist()) for _, y in seen}) == 4 and model.training


# ---------------------------------------------------------------- runs

def arguments(teacher_file, out, *more):
    return ["--wbits", "4", "--abits", "3", "--block", "16", "--rank", "4", "--ddim-steps", "3", "--steps", "8",
            "--batch", "4", "--device", "cpu", "--teacher", str(teacher_file), "--out", str(out), *more]


def refused(argv):
    """train.py's exit code."""
    with pytest.raises(SystemExit) as stop:
        runs.run_cli(lambda: train.main(argv))
    return stop.value.code


def float_checkpoint(path, model):
    runs.save_checkpoint(path, kind="float", unet=model.config, model=model.state_dict())
    return path


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return float_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher.pt", tiny_unet())


@pytest.fixture(scope="module")
def whole(small, teacher_file, tmp_path_factory):
    """One whole quantized run of the command line: its folder, and the rows of its samples.png."""
    out, grids, real = tmp_path_factory.mktemp("runs") / "whole", {}, train.save_grids
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "untrained_pictures", REAL_PICTURES)
        m.setattr(train, "save_grids", lambda path, rows: grids.update(rows) or real(path, rows))
        train.main(arguments(teacher_file, out))
    return out, grids


@pytest.fixture
def finished(whole):
    return whole[0]


def test_training_leaves_its_files_and_helps(finished):
    """Checkpoint, metrics with provenance, pictures; the eps errors on fresh noises along the run: they fell."""
    metrics, curve = (json.loads((finished / name).read_text()) for name in ("metrics.json", "curve.json"))
    assert {p.name for p in finished.iterdir()} == set(runs.FILES)
    assert metrics["settings"]["wbits"] == 4 and metrics["hardware"] and metrics["seconds"] > 0
    assert len(metrics["layers"]) > 36 and len(metrics["losses"]) == 8
    assert [r["step"] for r in curve] == [*range(1, 9)] and curve == metrics["curve"]
    assert_close(curve[-1]["eps_errors"], metrics["eps_errors"], rtol=1e-3, atol=0)      # packing changes nothing
    for name in ("eps_error", "eps_error_untrained"):
        errors = metrics[name.replace("error", "errors")]
        assert math.isclose(metrics[name], sum(errors) / 3, rel_tol=1e-9) and len(errors) == 3
    before, after = (torch.tensor(metrics[name]) for name in ("eps_errors_untrained", "eps_errors"))
    assert (after / before).log().mean() < math.log(0.97)                    # what was trained
    assert metrics["bytes"] == (finished / "model.pt").stat().st_size
    assert sample.load_model(finished / "model.pt").hqdm == SCHEME


def test_rows_of_the_pictures(whole, teacher_file):
    """samples.png: the same noise by the float network, without and with the transform untrained, and trained."""
    (out, grids), teacher = whole, sample.load_model(teacher_file)
    walks = train.trajectories(teacher, 8, len(TIMES), 1_000_000)
    none, single = (train.quantized_copy(teacher, SCHEME._replace(rotation=r), walks) for r in ("none", "single"))
    rows = {"float": teacher, "W4A3 none, not trained": none, "W4A3 single, not trained": single,
            "W4A3 single, trained": sample.load_model(out / "model.pt")}
    assert list(grids) == list(rows)
    assert all(torch.equal(grids[name], sample.draw(model, 2, 3)[0]) for name, model in rows.items())
    assert json.loads((out / "metrics.json").read_text())["psnr"] == {
        name: sample.psnr(grids[name], grids["float"]) for name in rows if name != "float"}


def stop_at(monkeypatch, step, act):
    """Let act() happen in that update: train.decay is asked once in each."""
    real, count = train.decay, iter(range(10**6))
    monkeypatch.setattr(train, "decay", lambda *args, **more: (next(count) == step and act()) or real(*args, **more))


@pytest.mark.parametrize("kind", ["student", "student of the teacher's walks", "teacher"])
def test_resume_is_exact(kind, finished, teacher_file, tmp_path, monkeypatch):
    """Killed after a save and resumed: losses, curve and weights, bit for bit, of the run that was never killed.

    The first part's seconds count. A teacher goes on with no other data than it began with; what draws is its EMA.
    """
    cut, argv = tmp_path / "cut", arguments(teacher_file, "")[:-1]
    if kind == "student of the teacher's walks":
        argv, finished = ["--walks", "teacher", *argv], tmp_path / "whole"
        train.main(argv + [str(finished)])
    if kind == "teacher":
        monkeypatch.setattr(train, "UNet", lambda dropout: tiny_unet(dropout=dropout))
        monkeypatch.setattr(train, "score_pictures", lambda model, n, *_: {
            "n": n, "c_fid": model.conv_in.weight.sum().item(), "c_is": 1.0, "accuracy": 0.5})
        make_archive(tmp_path / "data", monkeypatch)
        argv = ["--steps", "8", "--batch", "4", "--device", "cpu", "--ddim-steps", "2", "--dropout", "0.2",
                "--score-every", "3", "--data", str(tmp_path / "data"), "--out"]
        finished = tmp_path / "whole"
        train.main(argv + [str(finished)])
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)                 # save after every step
    with monkeypatch.context() as m:
        stop_at(m, 5, lambda: fail(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.main(argv + [str(cut)])
    notes, half = cut / "thesis.tmp", cut / "last.pt.01234567.tmp"
    notes.write_text(""), half.write_text("")        # somebody's, and one of a save that was cut off
    state = runs.read_checkpoint(cut / "last.pt")
    assert len(state["losses"]) == 5 and state["seconds"] > 0 and not (cut / "model.pt").exists()
    del state["format"]
    runs.save_checkpoint(cut / "last.pt", **state | {"seconds": 1000.0})
    train.main(argv + [str(cut), "--resume"])
    assert notes.exists() and not half.exists()
    a, b = (json.loads((out / "metrics.json").read_text()) for out in (finished, cut))
    assert a["losses"] == b["losses"] and a["curve"] == b["curve"] and b["seconds"] >= 1000
    assert (finished / "curve.json").read_text() == (cut / "curve.json").read_text()
    a, b = (runs.read_checkpoint(out / "model.pt")["model"] for out in (finished, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    if kind == "teacher":
        state, weight = runs.read_checkpoint(cut / "last.pt"), "mid1.conv1.weight"
        ema, model, start = (v[weight] for v in (state["ema"], state["model"], tiny_unet().state_dict()))
        assert torch.equal(a[weight], ema.half()) and not torch.equal(ema, model) and not torch.equal(ema, start)
        assert [(r["step"], r["images"], r["n"]) for r in state["curve"]] == [(i, 4 * i, 5000) for i in (3, 6, 8)]
        monkeypatch.setattr(train, "find_data", lambda _: [part[:9] for part in train.load_bundled()])
        with pytest.raises(ValueError, match="other settings: --images 9"):
            train.main(argv + [str(cut), "--resume"])


def test_what_stops_politely():
    """Ctrl-C, a kill, the end of an ssh session; afterwards they mean what they meant before."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        before = signal.getsignal(sent := getattr(signal, name, signal.SIGTERM))
        with runs.stop_politely() as stop:
            os.kill(os.getpid(), sent)
            assert stop
        assert signal.getsignal(sent) == before
    if hasattr(signal, "SIGHUP"):                    # what nohup lets pass goes on to pass
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with runs.stop_politely() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert not stop
        finally:
            signal.signal(signal.SIGHUP, before)


def test_a_polite_kill_saves_and_the_run_goes_on(finished, teacher_file, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle: exit code 130, the step done and saved, with the losses of a run that was not killed."""
    stop_at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert refused(arguments(teacher_file, tmp_path)) == 130 and "stopped after step 4" in capsys.readouterr().out
    killed, all_ = (runs.read_checkpoint(out / "last.pt")["losses"] for out in (tmp_path, finished))
    assert len(killed) == 4 and killed == all_[:4]               # the rest: test_resume_is_exact


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(teacher_file, tmp_path, monkeypatch, capsys):
    """A loss that is not finite: exit code 2, the step named, last.pt from before it, no model.pt."""
    real, count = train.updater, iter(range(100))
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "updater", lambda optimizer, loss, *rest: real(
        optimizer, lambda *batch: loss(*batch) * (math.nan if next(count) == 4 else 1), *rest))
    assert refused(arguments(teacher_file, tmp_path)) == 2
    assert "not finite at step 5; the checkpoint of step 4 is kept" in capsys.readouterr().err
    ckpt = runs.read_checkpoint(tmp_path / "last.pt")
    assert len(ckpt["losses"]) == len(ckpt["curve"]) == 4 and not (tmp_path / "model.pt").exists()
    assert all(torch.isfinite(v).all() for v in ckpt["model"].values() if torch.is_tensor(v))


def plain_run(folder, steps=5, **more):
    run = runs.Run(folder, dict(steps=steps, batch=8), **more)
    run.restore()
    return run


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    """Though the loss is: nothing is saved, and the step is named. Afterwards the signals are as they were."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FloatingPointError, match="step 1; nothing was saved yet"):
        plain_run(tmp_path, steps=1).follow(iter([(torch.tensor(1.0), torch.tensor(math.inf))]))
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is before


def test_measurements_along_the_way(tmp_path):
    """A row of curve.json after every N steps and after the last, before the step is saved; none of a step that is NaN.

    A resumed run goes on with the rows that its last.pt has.
    """
    curve, pair = tmp_path / "curve.json", (torch.tensor(0.0), torch.tensor(1.0))
    def measured(run, pairs):
        return run.measure(iter(pairs), 2, lambda step: {"x": 10 * step})
    updates = measured(plain_run(tmp_path), [pair] * 5)
    assert next(updates) is pair and not curve.exists()
    assert next(updates) is pair and json.loads(curve.read_text()) == [{"step": 2, "x": 20}]
    assert len(list(updates)) == 3 and [r["step"] for r in json.loads(curve.read_text())] == [2, 4, 5]
    again = plain_run(tmp_path, losses=[0.0] * 3, curve=[{"step": 2, "x": 20}])
    assert len(list(measured(again, [pair] * 2))) == 2
    assert json.loads(curve.read_text()) == [{"step": s, "x": 10 * s} for s in (2, 4, 5)]
    nan = torch.tensor(math.nan), torch.tensor(1.0)
    run = plain_run(tmp_path, losses=[0.0])
    assert list(measured(run, [nan])) == [nan] and run.curve == []


def test_scores_of_a_teacher(monkeypatch):
    """Of n pictures by the model in eval mode, from the run's seed and steps."""
    def draw(model, n, steps, seed, rows):
        check((steps, seed, model.training, rows) == (3, 7, False, slice(0, None, 1)))
        return torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.arange(n)
    monkeypatch.setattr(train, "draw", draw)
    monkeypatch.setattr(train, "score", lambda images, labels, judge: {"seen": (len(images), labels.tolist(), judge)})
    assert train.score_pictures(tiny_unet().train(), 4, 3, 7, "judge") == {"n": 4, "seen": (4, [0, 1, 2, 3], "judge")}


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    """last.pt of another model, without settings, of another kind: one ValueError each."""
    run = plain_run(tmp_path, losses=[1.0])
    run.restore(model=torch.nn.Linear(2, 2))
    run.save()
    again, model = runs.Run(tmp_path, run.settings, resume=True), torch.nn.Linear(2, 2)
    again.restore(model=model)
    assert again.losses == [1.0] and torch.equal(model.weight, run.parts["model"].weight)
    for part in (dict(model=torch.nn.Linear(3, 3)), dict(model=torch.nn.Linear(2, 2), other=torch.nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="does not fit this run"):
            runs.Run(tmp_path, run.settings, resume=True).restore(**part)
    with pytest.raises(ValueError, match=r"other settings: --batch 9 \(was 8\)"):
        runs.Run(tmp_path, dict(steps=5, batch=9), resume=True)
    for wrong in (dict(losses=[1.0] * 6), dict(losses=[float("nan")])):
        again.losses, again.parts = wrong["losses"], {"model": model}
        again.save()
        with pytest.raises(ValueError, match="losses of 5 steps"):
            runs.Run(tmp_path, run.settings, resume=True).restore(model=model)
    model, again.losses = torch.nn.Linear(2, 2), [1.0]
    for shape in ((2, 2), (7, 7)):                   # a fused step with the second would read past the end
        optimizer = runs.adamw([{"params": [model.weight], "lr": 0.1}], torch.device("cpu"))
        optimizer.state[model.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(2, 2)}
        again.parts = {"optimizer": optimizer}
        again.save()
        fresh = runs.adamw([{"params": [model.weight], "lr": 0.1}], torch.device("cpu"))
        with contextlib.nullcontext() if shape == (2, 2) else pytest.raises(ValueError, match=r"exp_avg is \(7, 7\)"):
            runs.Run(tmp_path, run.settings, resume=True).restore(optimizer=fresh)
    for kind, message in (("training", "not the state of a run"), ("judge", "'judge' checkpoint, not 'training'")):
        runs.save_checkpoint(tmp_path / "last.pt", kind=kind)
        with pytest.raises(ValueError, match=message):
            runs.Run(tmp_path, run.settings, resume=True)


def test_a_long_run_keeps_means_of_its_losses(tmp_path):
    """metrics.json of 20,001 updates has 953 losses, each the mean of 21."""
    (tmp_path / "model.pt").touch()
    plain_run(tmp_path, losses=[float(i % 3) for i in range(20_001)]).finish(torch.device("cpu"), more=5)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["updates_per_loss"] == 21 and metrics["losses"] == [1.0] * 952 + [pytest.approx(1, abs=0.1)] and metrics["more"] == 5


@pytest.mark.parametrize("walks", ["teacher", "student"])
@pytest.mark.parametrize("order", ["mixed", "trajectory"])
def test_options_of_a_quantized_run_arrive(order, walks, teacher_file, tmp_path, monkeypatch):
    """--order, --walks, --balance, --lr, --seed, --steps and the scheme are what the training gets, all scales calibrated by then."""
    got = []
    monkeypatch.setattr(train, "distil", lambda *args: got.extend(args) or fail(InterruptedError()))
    with pytest.raises(InterruptedError):
        train.main(arguments(teacher_file, tmp_path, "--order", order, "--lr", "2", "--seed", "3", "--rank", "2",
                             *["--balance", "0"] * (order == "trajectory"), *["--walks", "teacher"] * (walks == "teacher")))
    student, optimizer, batches, steps, first, balance, advance = got
    assert balance == (0 if order == "trajectory" else 0.75)                 # the paper's; the default
    assert [g["initial_lr"] for g in optimizer.param_groups] == [g["lr"] for g in train.parameter_groups(student, 2.0)]
    assert student.hqdm == SCHEME._replace(rank=2) and (steps, first) == (8, 0)
    asked, together = batches.gi_frame.f_locals, order == "trajectory"
    assert [asked[k] for k in ("batch", "steps", "seed", "first")] == [4, 8, 3, 0]
    assert asked["self"].t.tolist() == list(TIMES)
    assert len(asked["self"].x) == (4 if together else 64) and bool(asked["self"].step.any()) != together
    assert (asked["self"].own is None, advance) == ((False, asked["self"].advance) if walks == "student" else (True, None))


def test_options_of_a_teacher_arrive(tmp_path, monkeypatch):
    """--dropout; the first weights depend on --seed alone; what --score-every draws from is the EMA."""
    weights, seen = [], {}
    def look(model, ema, *args):
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
        weights.append(model.conv_in.weight.detach().clone())
        seen.update(model=model, ema=ema)
        return iter([(torch.tensor(1.0), torch.tensor(1.0))])
    monkeypatch.setattr(train, "teacher_updates", look)
    monkeypatch.setattr(train, "score_pictures", lambda net, *_: fail(
        InterruptedError() if net is seen["ema"] is not seen["model"] else AssertionError()))
    monkeypatch.setattr(train, "find_data", lambda _: train.load_bundled())
    config = dict(channels=32, mults=(1,), blocks=1, attention=())
    monkeypatch.setattr(train, "UNet", lambda dropout: UNet(**config, dropout=dropout))
    for seed in ("0", "0", "1"):
        torch.rand(1)
        with pytest.raises(InterruptedError):
            train.main(["--device", "cpu", "--dropout", "0.25", "--score-every", "9", "--steps", "1", "--seed", seed,
                        "--out", str(tmp_path / "x")])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_noises_of_a_run_are_its_own(teacher_file, tmp_path, monkeypatch):
    """Calibrated, tested, trained, drawn: from four noises that share no sample. All errors are on the tested ones."""
    walks, tested, fitted, trained = [], [], [], []
    trajectories, calibrate, distil = train.trajectories, hqdm.calibrate, train.distil
    def spied(student, optimizer, batches, *more):
        return distil(student, optimizer, (trained.append(b[0][b[1] == 999]) or b for b in batches), *more)
    def calibrated(student, teacher, batches):
        fitted.extend(x for x, _, _ in batches)
        calibrate(student, teacher, batches)
    monkeypatch.setattr(train, "trajectories", lambda *args: walks.append(trajectories(*args)) or walks[-1])
    monkeypatch.setattr(hqdm, "calibrate", calibrated)
    monkeypatch.setattr(train, "eps_errors", lambda net, unseen: tested.append(unseen) or [1.0, 1.0, 1.0])
    monkeypatch.setattr(train, "distil", spied)
    train.main(arguments(teacher_file, tmp_path, "--steps", "3"))
    assert len(walks) == 2 and len(tested) == 5 and all(w is walks[1] for w in tested)   # before, three rows, after
    assert all(x is walk[0] for x, walk in zip(fitted, walks[0])) and len(fitted) == 3
    starts = [walks[0][0][0], walks[1][0][0], *trained, sample.noise_and_labels(16)[0]]
    assert sum(map(len, trained)) and len(torch.cat(starts).flatten(1).unique(dim=0)) == sum(map(len, starts))


def test_a_quantized_checkpoint_is_no_teacher(finished, tmp_path, capsys):
    """--teacher of the wrong kind is said in one line; the new folder is taken away again."""
    assert refused(arguments(finished / "model.pt", tmp_path / "x")) == 2
    assert "'quantized' checkpoint, not 'float'" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_error_of_each_image():
    """experiments/overfit.py: per image, at one time t, against the sum in float64, in batches of unequal size."""
    overfit, model, t = importlib.import_module("overfit"), tiny_unet(1), 300
    x_0, eps, y = torch.randn(5, 3, 32, 32), torch.randn(5, 3, 32, 32), torch.tensor([0, 3, 9, 1, 10])
    abar = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t])
    x_t = (math.sqrt(abar) * x_0.double() + math.sqrt(1 - abar) * eps.double()).float()
    with torch.no_grad():
        expected = ((model(x_t, torch.full((5,), t), y).double() - eps.double()) ** 2).flatten(1).mean(1)
    assert_close(overfit.errors(model, x_0, y, t, eps, batch=2), expected, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- several processes

def share_the_work(rank, port, processes, kind, teacher_file, folder):
    """What each process does: updates of a teacher and of a student, a score, and a whole train.main."""
    if processes > 1:
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    device, threads = runs.start_processes(torch.device(kind)), torch.get_num_threads()
    torch.set_num_threads(1)                         # in one process, too: other sums would round otherwise
    with small_runs(), pytest.MonkeyPatch.context() as m:
        torch.save(updates_of_both(processes, rank, device), folder / f"{processes}-{rank}.pt")
        m.setattr(train, "draw", sample.draw)        # all five pictures
        m.setattr(train, "score", lambda images, labels, judge: {"seen": (images, labels)})
        torch.save(train.score_pictures(tiny_unet().to(device), 5, 3, 7, None), folder / f"{processes}-{rank}-score.pt")
        if processes > 1:
            differ_then_agree(m, rank)
            more = ["--order", "trajectory", "--steps", "2", "--device", kind]
            train.main(arguments(teacher_file, folder / "run", *more))
    torch.set_num_threads(threads)


def updates_of_both(processes, rank, device):
    """[loss, norm] of updates of a teacher and of a student."""
    n = 3 if device.type == "cuda" else 2            # on GPUs the second is recorded and the third replayed
    model, images = tiny_unet(3).train().to(device), [v.to(device) for v in train.load_bundled()]
    model.register_forward_pre_hook(lambda _, args: check(len(args[0]) == 8 // processes))
    ema = copy.deepcopy(model)
    model.conv_in.weight.data += rank
    runs.same_start(model)                           # all begin with what the first one has
    steep = {"eps": 1.0}                             # so large an eps: steps as of SGD
    optimizer = runs.adamw([{"params": list(model.parameters()), "lr": 0.1, **steep}], device)
    steps = [*train.teacher_updates(model, ema, optimizer, *images, n, 8, seed=0)]
    teacher = tiny_unet().to(device)
    torch.manual_seed(0)
    scheme = SCHEME._replace(wbits=8, abits=8)
    student = train.quantized_copy(teacher, scheme, train.trajectories(teacher, 8, len(TIMES), 1))
    student.register_forward_pre_hook(lambda _, args: check(len(args[0]) == 6 // processes))
    optimizer = runs.adamw([{**g, "lr": 0.01, **steep} for g in train.parameter_groups(student)], device)
    carousel = train.Carousel(teacher, 6, TIMES, seed=2, own=True)           # a batch is all: each walk comes again
    steps += train.distil(student, optimizer, carousel.batches(6, n, seed=0), n, 0, 0.5, carousel.advance)
    return [[loss.item(), norm.item()] for loss, norm in steps]


def differ_then_agree(m, rank):
    """Let each process calibrate a little otherwise, and see that all train from the same scales and rates."""
    calibrate, adamw = hqdm.calibrate, train.adamw
    def calibrated(student, *more):
        calibrate(student, *more)
        for p in student.parameters():
            p.data += 0.01 * rank
    def equal(groups, device):
        mine, both = [[g["lr"], *(float(p.detach().double().sum()) for p in g["params"])] for g in groups], [None, None]
        torch.distributed.all_gather_object(both, mine)
        return check(both[0] == both[1]) or adamw(groups, device)
    m.setattr(hqdm, "calibrate", calibrated)
    m.setattr(train, "adamw", equal)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_processes_share_one_batch(kind, teacher_file, tmp_path):
    """Two that share each batch have the losses and gradient norms of one process, one set of files, all pictures."""
    share_the_work(0, None, 1, kind, teacher_file, tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        args = s.getsockname()[1], 2, kind, teacher_file, tmp_path
    torch.multiprocessing.start_processes(share_the_work, args, nprocs=2, start_method="spawn")
    one, two, other = (torch.tensor(torch.load(tmp_path / f"{name}.pt")) for name in ("1-0", "2-0", "2-1"))
    assert_close(two, one, rtol=5e-4 if kind == "cpu" else 0.03, atol=0)                 # on a GPU in bf16
    assert torch.equal(two, other)
    whole = sample.draw(tiny_unet().to(kind), 5, 3, seed=7)
    for name in ("1-0", "2-0", "2-1"):                           # 5 pictures: the second process draws two of them
        score = torch.load(tmp_path / f"{name}-score.pt")
        (pictures, labels), n = score["seen"], score["n"]
        apart = (pictures.int() - whole[0].int()).abs().float()  # a batch of another size rounds a little differently:
        assert apart.max() <= 1 if kind == "cpu" else apart.mean() < 4                   # on a GPU to 11 bits
        assert torch.equal(labels, whole[1]) and n == 5
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["command"].startswith("main(['--wbits', '4'")
    assert len(metrics["losses"]) == 2 and {p.name for p in (tmp_path / "run").iterdir()} == set(runs.FILES)


# ---------------------------------------------------------------- the experiment

def test_the_declared_grid():
    """Every row is a command that train.py takes; names differ; updates are equal; tuned is on a seed of its own."""
    rows = {part: grid.rows_of(part) for part in ("tune", "headline", "balance", "updates", "side", "paper", "cost")}
    names = [grid.name_of(row) for part in rows for row in rows[part] if part != "cost"]
    assert len(set(names)) == len(names) and len(rows["headline"]) == 4 * 2 * 3
    for row in (row for part in rows.values() for row in part):
        args = train.parse([*grid.options_of(row), "--device", "cpu"])
        assert all(getattr(args, k) == v for k, v in row.items() if k not in ("paper", "searched"))
    assert all(grid.EQUAL.items() <= row.items() for row in rows["headline"] + rows["cost"])
    assert all(row["balance"] == 0 for row in rows["paper"] if row.get("paper"))
    assert not {r["seed"] for r in rows["tune"]} & {r["seed"] for part in rows if part != "tune" for r in rows[part]}


def test_the_grid_is_run_scored_and_gone_on_with(small, teacher_file, tmp_path, monkeypatch, capsys):
    """A training a row, drawn in integers and scored against the float model; what results.json has is not run again."""
    row = {"wbits": 4, "abits": 3, "rotation": "single", "grid": "midrise", "block": 16, "rank": 4, "ddim_steps": 3, "steps": 2,
           "batch": 4, "balance": 0.5, "seed": 0}
    rows = [row, {**row, "seed": 1, "paper": True, "searched": False}]
    searched, asked = grid.searched, []
    monkeypatch.setattr(grid, "searched", lambda ends: asked.append(ends) or searched(ends))
    monkeypatch.setattr(grid, "rows_of", lambda part: rows)
    monkeypatch.setattr(grid, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(grid, "PICTURES", 4)
    monkeypatch.setattr(train, "CHECKPOINTS", teacher_file.parent)
    monkeypatch.setattr(grid, "TEACHER", teacher_file)
    lora = []
    monkeypatch.setattr(train, "parameter_groups", lambda *args: lora.append(train.RATES["lora"]) or PARAMETER_GROUPS(*args))
    def run(*more, n="4"):
        monkeypatch.setattr(sys, "argv", ["grid.py", "headline", "-n", n, "--device", "cpu", "--out", str(tmp_path / "r.json"), *more])
        grid.main()
        return {r["name"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    with pytest.raises(ValueError, match="part headline wants a GPU"):
        run()
    monkeypatch.setattr(grid, "TRAININGS", ())       # these rows name batch and steps
    with grid.taken(grid.name_of(row)) as mine:      # another process is at the first row
        assert mine and list(run()) == ["float-ddim-steps3", grid.name_of(rows[1])]
    made = run()
    assert lora == [1 / 2500, train.RATES["lora"]] and run() == made and len(lora) == 2
    float_row, mine = made["float-ddim-steps3"], made[grid.name_of(row)]
    assert float_row["psnr"] == 99 and float_row["brightness"] == 0 and float_row["contrast"] == 1 and len(made) == 3
    folder = tmp_path / "runs" / grid.name_of(row)
    pictures, labels = sample.draw(sample.load_model(folder / "model.pt"), 4, 3)
    scores, reference = sample.score(pictures, labels), sample.draw(sample.load_model(teacher_file), 4, 3)[0]
    assert {k: mine[k] for k in scores} == scores and mine["psnr"] == sample.psnr(pictures, reference)
    assert_close(mine["brightness"], (pictures.double() - reference.double()).mean().item())
    assert mine["command"] == " ".join(["python train.py", *grid.options_of(row)]) and mine["part"] == "headline"
    assert made[grid.name_of(rows[1])]["command"] == "python experiments/grid.py paper"      # train.py has other rates
    assert asked == [False, True]                    # row 0 last: another process had it
    more = run(n="5")                                # other rows, of the same models
    assert {name for name in more if name not in made} == {f"{name}-n5" for name in made} and len(lora) == 2
    assert more["float-ddim-steps3-n5"]["n"] == 5 and {k: more[k] for k in made} == made
    rows[0]["lr"] = 2.0                              # the same row by another command
    monkeypatch.setattr(grid, "name_of", lambda row: grid.train.run_name(4, 3, "single", "midrise"))
    results = json.loads((tmp_path / "r.json").read_text())
    results["rows"].append({**mine, "name": grid.name_of(row)})
    (tmp_path / "r.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="take it out first"):
        run()


def test_a_layer_with_a_mean():
    """means.py: at x = m alone the map remains, a convolution of m by w_hat; elsewhere the layer is the float one, rounded finer."""
    torch.manual_seed(0)
    for plain, quantized, shape in ((torch.nn.Conv2d(32, 8, 3, 2, 1), hqdm.HQConv2d, (2, 32, 5, 7)), (torch.nn.Linear(32, 8), hqdm.HQLinear, (2, 3, 32))):
        layer, m, x = quantized(plain, hqdm.Scheme(8, 8)), torch.randn(32), torch.randn(shape) / 9
        of_m = m.view(1, -1, 1, 1).expand(shape) if len(shape) == 4 else m.expand(shape)
        hqdm.fit_scale(layer.activations, layer.channels_last(x + of_m))
        coarse = (layer(x + of_m) - plain(x + of_m)).norm()
        means.shift(layer, torch.nn.Parameter(m))
        hqdm.fit_scale(layer.activations, layer.channels_last(x + of_m))
        q_w, s_w = layer.weights()
        w_hat = (q_w.flatten(1) * s_w).view(q_w.shape)
        with torch.no_grad():
            plain.weight.copy_(w_hat)
        assert_close(layer(of_m), plain(of_m), rtol=1e-5, atol=1e-5)
        assert (layer(x + of_m) - plain(x + of_m)).norm() < coarse / 3


def test_means_are_learned_or_not_there(teacher_file, tmp_path, monkeypatch):
    """means.py as a whole: a row with and one without, of a seed; m starts at the inputs' mean and is trained."""
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    monkeypatch.setattr(means, "TEACHER", teacher_file)
    monkeypatch.setattr(means.hqdm, "Scheme", lambda *args, **more: SCHEME._replace(grid=more["grid"], timesteps=more["timesteps"]))
    given, give, seen = [], means.give_means, []
    def give_and_look(student, teacher, walks):
        teacher.up[-1].rows[-1].res.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
        made = give(student, teacher, walks)
        layer = student.up[-1].rows[-1].res.conv2
        assert_close(layer.mean.detach(), torch.stack(seen[:3]).mean(0))
        return given.extend((m, m.detach().clone()) for m in made) or made
    monkeypatch.setattr(means, "give_means", give_and_look)
    monkeypatch.setattr(sys, "argv", ["means.py", "--seeds", "7", "--steps", "2", "--batch", "4", "--ddim-steps", "3", "-n", "4", "--device", "cpu",
                                      "--out", str(tmp_path / "m.json")])
    (tmp_path / "m.json").write_text('{"rows": [{"seed": 7, "means": true}]}')           # replaced
    means.main()
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [(r["seed"], r["means"], r["n"]) for r in rows] == [(7, False, 4), (7, True, 4)] and rows[0]["c_fid"] != rows[1]["c_fid"]
    assert given and all(not torch.equal(m.detach(), before) for m, before in given)


def test_fine_detail_lost_moved_and_added():
    """Two waves by hand: the coarse one does not count; the fine one halved is a quarter of its power, shifted twice it."""
    at = torch.arange(32) * 2 * math.pi / 32
    def picture(strength, shift=0.0):
        return (10 * (2 * at).cos() + strength * (12 * at + shift).cos()).expand(1, 3, 32, 32)
    for other, power, error in ((picture(1), 1, 0), (picture(0.5), 0.25, 0.25), (picture(1, math.pi / 2), 1, 2), (picture(2), 4, 1)):
        assert_close(grid.fine(other, picture(1)), (float(power), float(error)), rtol=1e-3, atol=1e-5)


def test_a_clamped_walk_is_another_one(monkeypatch):
    """Part clamp draws with x_0 within [-1, 1], and gives the plain step back."""
    net, plain, seen = tiny_unet(0), grid.unet.ddim_step, []
    score = type("", (), {"n": 2, "__call__": lambda self, pictures, labels, steps: seen.append(pictures) or {"plain": grid.unet.ddim_step is plain}})()
    for clamp in (True, False):
        assert grid.clamp_row(net, 4, score, clamp) == {"ddim_steps": 4, "plain": True} and grid.unet.ddim_step is plain
    *_, (_, _, _, x_0) = ddim(net, *sample.noise_and_labels(2, 0, 10), steps=4)
    clamped, free = seen
    assert x_0.abs().max() > 1 and torch.equal(free, sample.to_uint8(x_0)) and not torch.equal(free, clamped)


def test_who_draws_which_steps_in_spoil(finished, monkeypatch):
    """Part spoil, by name: float or quantized for the first k steps, then the other one."""
    monkeypatch.setattr(grid, "draw_in_turns", lambda first, then, k, n, steps: ((hasattr(first, "hqdm"), hasattr(then, "hqdm"), k), steps))
    score = type("", (), {"n": 2, "teacher": tiny_unet(), "__call__": lambda self, drawn, _, steps: {"drawn": drawn}})()
    rows = {name: make() for name, make, _ in grid.jobs("spoil", finished / "model.pt", torch.device("cpu"), score)}
    assert len(rows) == 12
    for name, row in rows.items():
        who, k = re.fullmatch(r".*-(float|quantized)-for-(\d+)", name).groups()
        assert row["drawn"] == (who == "quantized", who == "float", int(k)) and row["float_first"] == (who == "float")


def test_what_a_training_costs(tmp_path, monkeypatch):
    """Part cost runs the command as a user would, and takes seconds from the clock and memory from metrics.json."""
    def run(argv, **options):
        out = grid.Path(argv[argv.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "metrics.json").write_text('{"peak_gib": 3.5}')
        assert argv[1].endswith("train.py") and options["check"] and argv[argv.index("--batch") + 1] == "32"
    monkeypatch.setattr(grid.subprocess, "run", run)
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    monkeypatch.setattr(grid.time, "time", iter((100.0, 103.25)).__next__)
    row = grid.cost_row(grid.rows_of("cost")[-1], torch.device("cpu"))
    assert row["peak_gib"] == 3.5 and row["seconds"] == 3.2 and row["batch"] == 32


def test_two_networks_draw_in_turns():
    """The first does the first k steps: at k = 0 and at all of them, what one alone draws; between, the steps of both."""
    a, b = tiny_unet(0), tiny_unet(1)
    alone = [sample.draw(net, 2, 4)[0] for net in (a, b)]
    assert torch.equal(grid.draw_in_turns(a, b, 4, 2, 4)[0], alone[0])
    assert torch.equal(grid.draw_in_turns(a, b, 0, 2, 4)[0], alone[1])
    seen = []
    hooks = [net.register_forward_pre_hook(lambda _, args, i=i: seen.append((i, int(args[1][0])))) for i, net in enumerate((a, b))]
    grid.draw_in_turns(a, b, 3, 2, 4)
    assert seen == [(0, 999), (0, 666), (0, 333), (1, 0)]
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("more, message", [
    (["--wbits", "1"], "argument --wbits: invalid choice"), (["--wbits", "32"], "argument --wbits: invalid choice"),
    (["--abits", "9"], "argument --abits: invalid choice"), (["--abits", "32"], "argument --abits: invalid choice"),
    (["--block", "64"], "use a block of 32 or less"), (["--block", "0"], "not a positive number"),
    (["--steps", "0"], "not a positive number"), (["--batch", "-1"], "not a positive number"),
    (["--batch", "9" * 20], "not a positive number"), (["--lr", "nan"], "not a number from 1e-09 to 10000"), (["--lr", "0"], "not a number"), (["--ste", "2"], "unrecognized"),
    (["--ddim-steps", "1001"], "outside 1 .. 1000"), (["--rotation", "triple"], "invalid choice"),
    (["--order", "pool"], "invalid choice"), (["--grid", "odd"], "invalid choice"), (["--balance", "2"], "from 0 to 1"),
    (["--rotation", "none", "--block", "8"], "none has no block"), (["--device", "tpu"], "choose from cpu"),
    (["--score-every", "3"], "is for the teacher"), (["--data", "data"], "is for the teacher"),
    (["--dropout", "0.1"], "is for the teacher"), (["--teacher", "/no/teacher.pt"], "no teacher at"),
    (["--out", "/proc/x"], "cannot write"), (["--out", ""], "--out is empty"), (["--resume"], "nothing to resume")])
def test_bad_input_is_one_line_and_exit_code_2(more, message, teacher_file, tmp_path, capsys):
    """Each mistake is named on stderr, without a traceback; no folder stays."""
    assert refused(arguments(teacher_file, tmp_path / "x", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not (tmp_path / "x").exists()


@pytest.mark.parametrize("argv, message", [
    (["--rotation", "single"], "--rotation is for a quantized model"), (["--order", "mixed"], "--order is for"),
    (["--grid", "midrise"], "--grid is for a quantized model"), (["--balance", "0"], "--balance is for a quantized model"),
    (["--teacher", "t.pt"], "--teacher is for a quantized model"), (["--wbits", "4"], "--abits go together"),
    (["--abits", "4"], "--wbits and --abits go together"), (["--ddim-steps", "1001"], "outside 1 .. 1000"),
    (["--data", "nowhere"], "no data_batch_1.bin"), (["--dropout", "1"], "not a number from 0 to 0.99"),
    (["--dropout", "x"], "invalid number value: 'x'")])
def test_the_teacher_refuses_before_it_trains(argv, message, tmp_path, monkeypatch, capsys):
    """Options of the other training, and what the end could not use. A folder that was there before stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert refused(["--device", "cpu", "--steps", "1", "--out", "mine", *argv]) == 2
    assert message in capsys.readouterr().err and (tmp_path / "mine").is_dir()


def test_a_run_is_never_written_over(finished, teacher_file, tmp_path, capsys):
    """--out of a finished run, or with one file of somebody's; --resume with other settings: refused, files stay."""
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    others = "--seed 1", "--batch 8", "--lr 2", "--block 8", "--rank 2", "--order trajectory", "--rotation double", "--balance 1", "--grid midrise"
    for more, message in (("", "already holds a run"), *((f"--resume {other}", other) for other in others)):
        assert refused(arguments(teacher_file, finished, *more.split())) == 2 and message in capsys.readouterr().err
    other = float_checkpoint(tmp_path / "other.pt", tiny_unet(1))
    assert refused(arguments(other, finished, "--resume")) == 2
    said = capsys.readouterr()
    assert "other settings: --teacher-md5" in said.err and "calibrated" not in said.out          # before the work
    assert before == {p.name: p.read_bytes() for p in finished.iterdir()}
    (tmp_path / "metrics.json").write_text("precious")
    assert refused(arguments(teacher_file, tmp_path)) == 2 and (tmp_path / "metrics.json").read_text() == "precious"


def test_folders_of_runs(tmp_path, monkeypatch):
    """Without --out a second run goes to NAME-2, also while the first one's folder is still empty.

    --resume without --out goes on with the one written last, not with NAME-other. Folders that stay empty go.
    """
    monkeypatch.chdir(tmp_path)
    def folder(resume=False):
        return stack.enter_context(runs.run_folder(None, "w4a3", resume))
    with contextlib.ExitStack() as stack:
        made = [folder() for _ in range(4)]
        assert [f.name for f in made] == ["w4a3", "w4a3-2", "w4a3-3", "w4a3-4"]
        (tmp_path / "runs" / "w4a3-other").mkdir()
        for seconds, f in enumerate([made[0], made[2], made[1], tmp_path / "runs" / "w4a3-other"]):
            (f / "last.pt").touch()
            os.utime(f / "last.pt", (seconds, seconds))
        with pytest.raises(ValueError, match="w4a3-2 is in use by another run"):
            folder(resume=True)
    with runs.run_folder(None, "w4a3", resume=True) as f:
        assert f.name == "w4a3-2"
    (tmp_path / "curve.json").write_text("[]")       # all that a first save leaves where the disk is full
    with runs.run_folder(tmp_path, "w4a3", resume=False) as f:
        assert f == tmp_path
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["w4a3", "w4a3-2", "w4a3-3", "w4a3-other"]


def test_a_shell_left_over_from_a_cluster(monkeypatch):
    """RANK alone is not torchrun: the line says what is missing. And a process without a GPU says how many there are."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="RANK is set.*WORLD_SIZE.*unset RANK"):
        runs.start_processes(torch.device("cpu"))
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 4 of this machine finds 2 GPUs: pass --nproc_per_node=2"):
        runs.start_processes(torch.device("cuda"))


def test_busy_cores_are_noted(capsys):
    """Where threads wait for cores, once; not where they work."""
    for used in (torch.get_num_threads(), 0.1):
        runs.note_busy_cores(used)
    assert capsys.readouterr().out.count("OMP_NUM_THREADS=1") == (torch.get_num_threads() > 1)


def test_paths_without_a_way(monkeypatch):
    """Between two drives of Windows there is no relative path: the whole one is written down, after the training."""
    monkeypatch.setattr(runs.os.path, "relpath", lambda _: fail(ValueError("path is on mount 'D:'")))
    assert runs.provenance({"out": "/x"}, torch.device("cpu"), 1.0)["settings"]["out"] == "/x"


def test_a_report_knows_no_path_of_this_machine():
    """Absolute paths, in lists, too, are written as seen from here."""
    there = str(ROOT / "checkpoints" / "teacher.pt")
    made = runs.provenance({"checkpoints": [there, "x.pt"], "n": 3}, torch.device("cpu"), 1.0, [there, "-n", "3"])
    seen = os.path.relpath(there)
    assert made["settings"] == {"checkpoints": [seen, "x.pt"], "n": 3} and seen in made["command"] and there not in str(made)


def test_ctrl_c_is_one_word(capsys):
    """Exit code 130, no traceback."""
    with pytest.raises(SystemExit) as stop:
        runs.run_cli(lambda: fail(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_lack_of_memory_is_one_line(capsys):
    """On a CPU torch has no type for it, on a GPU it has; a RuntimeError of another kind keeps its traceback."""
    gpu = torch.cuda.OutOfMemoryError("can't: out of memory")
    words = ("MPS backend out of memory (MPS allocated: 9 GB)", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
             "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "The paging file is too small", "std::bad_alloc")
    for work in (lambda: torch.empty(10**15), lambda: fail(MemoryError()), lambda: fail(gpu),
                 *(lambda w=w: fail(RuntimeError(w)) for w in words)):
        with pytest.raises(SystemExit) as stop:
            runs.run_cli(work)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "out of memory, try a smaller --batch" in err and len(err.splitlines()) == 1
    for fault in (RuntimeError("a fault"), NotImplementedError("a fault")):      # one of many RuntimeErrors by descent
        with pytest.raises(type(fault), match="a fault"):
            runs.run_cli(lambda: fail(fault))
