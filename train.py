"""Train the float teacher, or quantize it with HQ-DM and distil it. Without CUDA both take a short form.

    python train.py                                       # the float teacher on CIFAR-10
    python train.py --wbits 4 --abits 3                   # HQ-DM: 4-bit weights, 3-bit activations; needs no data
    python train.py --wbits 4 --abits 3 --rotation none   # the same quantizers without the Hadamard transform
    python train.py --wbits 4 --abits 3 --resume          # go on after a kill; on a CPU bit for bit
    torchrun --nproc_per_node=4 train.py                  # the same on four GPUs: they share each batch

Each run leaves in runs/NAME/: model.pt (what sample.py draws from), last.pt (what --resume reads), metrics.json,
loss.png and samples.png (the same noise by float, untrained and trained networks). Times and scores: README.md.

Teacher: noise prediction on 50,000 images with random flips, AdamW, an exponential moving average of the weights (EMA).
HQ-DM (arXiv 2512.05746): no images. Teacher and quantized student draw from the same noise; at each of its steps the
student must predict the eps that leads to the teacher's picture: loss = mean (eps_student - target)^2, where large
errors weigh less. Trained are LoRA factors, weights' scales and one activation scale per layer and DDIM step (hqdm.py).
The paper's own way: --walks teacher --order trajectory --balance 0.
"""
import copy
import gzip
import hashlib
import http.client
import math
import os
import tarfile
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import hqdm
from plumbing.runs import (Run, adamw, autocast, compiled, first_alone, mean_over_processes, my_rows, natural,
                           new_parser, number, pick_device, plot_lines, positive, recorded, report_table, rows_of_all,
                           run_cli, run_folder, same_start, save_checkpoint, seed_step, start_processes, updater, world)
from sample import CHECKPOINTS, draw, load_judge, load_model, noise_and_labels, psnr, save_grids, score
from unet import UNet, alpha_bars, ddim, ddim_step, ddim_timesteps, ddpm_loss

# ---------------------------------------------------------------- the data: CIFAR-10's own binary files, no pickle

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = {         # of the extracted files, so that any mirror's archive can be checked
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25", "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421", "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d", "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    "cifar10-300.bin": "c5d240bc9b23967e8a6b2dd01e9da1ec"}      # the bundled first three hundred images of data_batch_1
RECORD = 1 + 3 * 32 * 32                                        # one label byte, then 1024 R, 1024 G, 1024 B


def read_batch(path):
    """One binary file -> uint8 images (N, 3, 32, 32), labels (N,) int64. ValueError where it is not the original."""
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % RECORD:
        raise ValueError(f"{path} has {raw.size} bytes, not a multiple of {RECORD}: it is cut short; fetch it again")
    if hashlib.md5(raw.tobytes()).hexdigest() != CIFAR10_MD5[Path(path).name]:
        raise ValueError(f"{path} is damaged: its md5 is not {CIFAR10_MD5[Path(path).name]}; fetch it again")
    raw = torch.from_numpy(raw.reshape(-1, RECORD))
    return raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].long()


def load_cifar10(dir="data", test=False):
    """The 50,000 training (or 10,000 test) images: uint8 (N, 3, 32, 32), labels (N,).

    dir holds the official .bin files, or a folder cifar-10-batches-bin with them. Raises FileNotFoundError where one
    is missing, ValueError where one is damaged.
    """
    folder = Path(dir) / "cifar-10-batches-bin"
    folder = folder if folder.is_dir() else Path(dir)
    names = [n for n in CIFAR10_MD5 if n.startswith("test_batch" if test else "data_batch")]
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(f"no {missing[0]} in {folder}; --data takes the folder of {CIFAR10_URL}, or an address")
    images, labels = zip(*(read_batch(folder / n) for n in names))
    return torch.cat(images), torch.cat(labels)


def load_bundled():
    """The bundled first 300 training images, in the same format."""
    return read_batch(CHECKPOINTS / "cifar10-300.bin")


def download_cifar10(dir="data", url=CIFAR10_URL):
    """Fetch, check and unpack the archive; dir/cifar-10-batches-bin appears whole or not at all.

    ConnectionError where it cannot be fetched, ValueError where it is not whole, OSError where it cannot be written.
    Of two runs that fetch at once the later one takes what the other one made.
    """
    Path(dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dir) as tmp:           # on the same disk, so that the rename below is atomic
        archive, folder = Path(tmp) / "archive.tar.gz", Path(tmp) / "cifar-10-batches-bin"
        fetch(url, archive)
        folder.mkdir()
        try:
            with tarfile.open(archive) as tar:                  # only the six files, by base name: no path can escape
                for member in tar:
                    name = os.path.basename(member.name)
                    if member.isfile() and name in list(CIFAR10_MD5)[:6]:
                        (folder / name).write_bytes(tar.extractfile(member).read())
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as e:
            raise ValueError(f"{url} is not a whole tar archive: {e}") from None
        try:
            load_cifar10(folder), load_cifar10(folder, test=True)            # md5 of every file
        except (OSError, ValueError) as e:
            wrong = str(e).replace(str(folder), "it")
            raise ValueError(f"{url} is not CIFAR-10 as it should be: {wrong}") from None
        try:
            os.replace(folder, Path(dir) / folder.name)
        except OSError:
            if not (Path(dir) / folder.name).is_dir():
                raise


def fetch(url, path, slowest=60_000):
    """url -> a file at path. ConnectionError for what the network does wrong, under `slowest` bytes a second included.

    What a slow host sends drop by drop never times out: so the speed since the start is watched, from half a minute on.
    At the slowest the archive takes 47 minutes; the other processes of a torchrun wait for an hour (start_processes).
    """
    began = said = time.time()
    try:
        with urllib.request.urlopen(url, timeout=20) as reply, open(path, "wb") as f:
            while chunk := reply.read1(2**20):
                f.write(chunk)
                took, done = time.time() - began, f.tell()
                if took > 30 and done < slowest * took:
                    raise ConnectionError(f"{done:,} bytes in {took:.0f} s")
                if time.time() - said > 10:
                    said = time.time()
                    print(f"{done / 1e6:.0f} MB of {url}", flush=True)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        raise ConnectionError(f"could not fetch {url}: {e}") from None


def find_data(data=None):
    """--data: a folder, an address to fetch, or None: data/, else the home site, else the bundled images, loudly."""
    address = data and data.startswith(("http://", "https://", "file://"))
    here = Path("data/cifar-10-batches-bin").is_dir() or Path("data/data_batch_1.bin").is_file()
    if here or data and not address:
        return load_cifar10("data" if address else data or "data")
    try:
        download_cifar10("data", data or CIFAR10_URL)
        return load_cifar10("data")
    except ConnectionError as e:                     # nothing else: a broken archive, or a full disk, is an error
        if address:
            raise
        print(f"*** {e}\n*** TRAINING ON THE 300 BUNDLED IMAGES INSTEAD OF 50,000: for a try, not for results. ***\n"
              "*** For all pass --data FOLDER, or the address of a mirror of cifar-10-binary.tar.gz. ***", flush=True)
        return load_bundled()


# ---------------------------------------------------------------- the float teacher

def decay(step, steps, warmup=0, shape="cosine"):
    """Factor of the learning rate: linear warm-up, then cosine or linear decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the average of the weights towards the model's, after step 0, 1, ..: it looks back over a tenth of the run.

    Its decay grows like this to 0.9999. At 0.9999 from the start, a third of it would still be untrained weights after
    10,000 steps, and what it draws noise. The decay is a function of the step: resuming needs no counter.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(1e-4, 9 / (10 + step)))


def teacher_updates(model, ema, optimizer, images, labels, steps, batch, seed, first=0, shape="cosine", loss=ddpm_loss):
    """Train `model` and its average `ema` in place: yields (loss, gradient norm) of the steps first .. steps-1.

    images uint8 (N, 3, 32, 32), labels (N,), both on the model's device. shape: of the decay. loss: as ddpm_loss.
    """
    device, net = images.device, compiled(model, images.device, steps)
    model.train()

    def compute_loss(x_0, y):
        with autocast(device):
            return loss(net, x_0, y, model.classes, rows=my_rows())

    update = updater(optimizer, compute_loss, device)
    for step in range(first, steps):
        seed_step(seed, step)
        pick = torch.randint(len(images), (batch,), device=device)
        x_0 = images[pick].float() / 127.5 - 1
        x_0 = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x_0, x_0.flip(3))      # mirror half of them
        factor = decay(step, steps, min(500, steps // 10), shape)
        result = update(factor, x_0.contiguous(memory_format=torch.channels_last), labels[pick])
        update_ema(ema, model, step)
        yield result


def score_pictures(model, n, ddim_steps, seed, judge):
    """Scores of n pictures, of which each process draws its share. (Only what process 0 returns is written down.)"""
    device, drawn = next(model.parameters()).device, draw(model.eval(), n, ddim_steps, seed=seed, rows=my_rows())
    return {"n": n, **score(*(rows_of_all(v.to(device), n).cpu() for v in drawn), judge)}


def train_teacher(run, images, labels, dropout, score_every):
    """`python train.py`: the float model, its EMA weights saved in half precision."""
    device, s = images.device, run.settings
    torch.manual_seed(s["seed"])
    model = UNet(dropout=dropout).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw([{"params": list(model.parameters()), "lr": s["lr"]}], device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"float teacher: {parameters:,} parameters, {len(images):,} images", flush=True)
    run.restore(model=model, ema=ema, optimizer=optimizer)
    first = len(run.losses)
    updates = teacher_updates(model, ema, optimizer, images, labels, s["steps"], s["batch"], s["seed"], first)
    if score_every:
        judge = load_judge(device)
        updates = run.measure(updates, score_every, lambda step: {
            "images": step * s["batch"], **score_pictures(ema, 5000, s["ddim_steps"], s["seed"], judge)})
    run.follow(updates)
    if world()[0] > 0:
        return
    state = {k: v.half().cpu() if v.is_floating_point() else v.cpu() for k, v in ema.state_dict().items()}
    save_checkpoint(run.out / "model.pt", kind="float", unet=ema.config, model=state)
    pictures, _ = draw(load_model(run.out / "model.pt", device), 16, s["ddim_steps"], seed=s["seed"])
    save_grids(run.out / "samples.png", {"float": pictures})
    plot_scores(run)
    run.finish(device, bytes=os.path.getsize(run.out / "model.pt"), parameters=parameters)


def plot_scores(run):
    """loss.png: the loss, as means that one can read, and the scores on the way, where there are any."""
    chunks = np.array_split(np.asarray(run.losses), min(20, len(run.losses)))
    means = list(zip(np.cumsum([len(c) for c in chunks]).tolist(), [float(c.mean()) for c in chunks]))
    panels = {"loss, mean of a twentieth of the run": ("update", {"": means})}
    for key, title in {"c_fid": "C-FID", "c_is": "C-IS", "accuracy": "class accuracy"}.items() if run.curve else ():
        panels[f"{title} of the average"] = "million images", {"": [(r["images"] / 1e6, r[key]) for r in run.curve]}
    plot_lines(run.out / "loss.png", panels)


# ---------------------------------------------------------------- the student: distillation without images

def trajectories(teacher, n, steps, seed):
    """The teacher's walks from n noises to n pictures: a list of (x_t, t, y, eps), one for each DDIM step, for all n.

    Every eleventh label is "none", about as in the teacher's own training, so that guidance works on the student too.
    """
    device = next(teacher.parameters()).device
    x, y = noise_and_labels(n, seed, teacher.classes)
    y = torch.where(torch.arange(n) % (teacher.classes + 1) == teacher.classes, teacher.classes, y).to(device)
    walk = ddim(recorded(teacher, device), x.to(device, memory_format=torch.channels_last), y, steps)
    return [(x_t, torch.full_like(y, t), y, eps) for t, x_t, eps, _ in walk]


WALKS = 16              # for each image of a batch


class Carousel:
    """Where the student's batches come from: n walks from noise to picture at once, at all DDIM steps.

    Each update takes a random batch of them, asks the teacher for the noise at their x_t, the student's target, and
    moves those walks by one DDIM step with it. A walk that arrives starts again from new noise. Nothing is seen
    twice, so nothing can be learned by heart. together: all walks start at t = T-1; with n = batch they stay together,
    and that is the paper's order.

    own: the student walks beside the teacher from the same noise, by its own eps, and the batches are of its x_t: there
    the sampler will bring it, and its rounding errors have added up to grain that the teacher's x_t do not have. Its
    target is the eps that leads from there to the teacher's x_0, a large one where little noise is left. It joins walks
    under way where the teacher is, and a whole walk of S steps takes some WALKS S updates: so what it sees drifts from
    the teacher's little by little. After each batch advance() must hear what it said. (DAgger, Ross et al. 2011,
    https://arxiv.org/abs/1011.0686, learns from where the learner goes; with diffusion one speaks of exposure bias.)
    """

    def __init__(self, teacher, n, timesteps, seed, together=False, own=False):
        device = next(teacher.parameters()).device
        self.eps, self.classes, self.own, self.waiting = recorded(teacher, device), teacher.classes, None, None
        self.t = torch.tensor(timesteps, device=device)                      # (S,), from T-1 down to 0
        abar = alpha_bars(device)[self.t]
        self.abar = torch.cat([abar, torch.ones(1, device=device)])          # (S + 1,): 1 has no noise
        torch.manual_seed(seed)
        self.x, self.y = self.fresh(n)
        self.step = torch.zeros(n, dtype=torch.long, device=device)          # which of the S each walk is at
        start = torch.zeros(n) if together else torch.randint(len(timesteps), (n,))
        for step in range(int(start.max())):                                 # walk each to a step of its own
            for walks in (start > step).nonzero()[:, 0].to(device).split(256):
                self.move(walks)
        if own:
            self.own = self.x.clone()                                        # the student's x_t

    def fresh(self, n):
        """Noise (n, 3, 32, 32) and labels (n,), "none" among them."""
        device = self.t.device
        return torch.randn(n, 3, 32, 32, device=device), torch.randint(self.classes + 1, (n,), device=device)

    @torch.no_grad()
    def move(self, walks):
        """Take these walks one step; return what they were: x_t, t, y and the target."""
        if self.waiting:
            raise RuntimeError("the student's walks wait: call advance(eps of the last batch) before the next")
        x, y, step = self.x[walks].contiguous(memory_format=torch.channels_last), self.y[walks], self.step[walks]
        t = self.t[step]
        eps = self.eps(x, t, y)
        a_t, a_s = (rearrange(self.abar[i], "B -> B 1 1 1") for i in (step, step + 1))
        x_s, x_0 = ddim_step(x, eps, a_t, a_s)
        noise, label = self.fresh(len(x))
        arrived = step + 1 == len(self.t)
        end = rearrange(arrived, "B -> B 1 1 1")
        self.x[walks] = torch.where(end, noise, x_s)
        self.y[walks], self.step[walks] = torch.where(arrived, label, y), torch.where(arrived, 0, step + 1)
        if self.own is not None:
            x = self.own[walks].contiguous(memory_format=torch.channels_last)
            eps = (x - a_t**0.5 * x_0) / (1 - a_t) ** 0.5                    # ddim_step(x, eps, ..) finds the same x_0
            self.waiting = walks, x, a_t, a_s, end, noise
        return x, t, y, eps

    @torch.no_grad()
    def advance(self, eps):
        """Own walks: x_t of the last batch go one DDIM step on by eps (B, 3, 32, 32), what the student said there."""
        (walks, x, a_t, a_s, end, noise), self.waiting = self.waiting, None
        self.own[walks] = torch.where(end, noise, ddim_step(x, eps, a_t, a_s)[0])

    def batches(self, batch, steps, seed, first=0):
        """The batches (x_t, t, y, target) of the updates first .. steps - 1."""
        for update in range(first, steps):
            seed_step(seed, update)
            yield self.move(torch.randperm(len(self.x), device=self.t.device)[:batch])

    def state_dict(self):
        own = {} if self.own is None else {"own": self.own}
        return {"x": self.x, "y": self.y, "step": self.step, **own}

    def load_state_dict(self, state):
        for name, v in self.state_dict().items():
            v.copy_(state[name])


def distil(student, optimizer, batches, steps, first=0, balance=0.0, advance=None):
    """Train the quantized student in place: yields (loss, gradient norm) a step.

    batches: (x_t, t, y, target) each, as of Carousel.batches. loss = mean of (eps_student - target)^2, balanced.
    Several processes walk alike, and each trains on its rows.
    advance: a function that is told eps_student of each batch, Carousel.advance for own walks. As these drift from the
    teacher's, the loss may rise while the pictures get better.
    """
    said = None

    def loss(x, t, y, target):
        eps = student(x, t, y)
        said.copy_(eps.detach())                     # out of a step that may be recorded
        return balanced((eps - target).square().mean(dim=(1, 2, 3)), balance)

    update = updater(optimizer, loss, next(student.parameters()).device, student)
    for step, batch in enumerate(batches, start=first):
        x, *rest = (v[my_rows()] for v in batch)
        said = torch.empty_like(x) if said is None else said
        result = update(decay(step, steps, shape="linear"), x.contiguous(memory_format=torch.channels_last), *rest)
        if advance:
            advance(rows_of_all(said, len(batch[0])))
        yield result


def balanced(errors, balance):
    """The mean of positive errors (B,), each weighed by (its size / 0.001)^-balance, a constant to the gradient.

    The error at t = 0 is a hundred times that at most other steps. In a plain mean, balance 0, which is the paper's, it
    drowns them; at balance 1 each counts by how far it has come, as in the mean of logarithms. 0.001: many errors are
    about as large, so that the gradient keeps its size, which updater clips.
    """
    return (errors * (errors.detach() / 1e-3).clamp(min=1e-9) ** -balance).mean()


@torch.no_grad()
def eps_errors(net, walks):
    """[mean (eps_student - eps_teacher)^2 at each DDIM step of `trajectories`], on noises that no update saw.

    Their mean is the eps error. Most of it is the last step's: at t = 0 there is hardly any noise left to predict, and
    the picture hardly notices (x_0 is off by 1 % of it). There a student of own walks learns another target, and does
    not get better here: look at the median of the steps, and at PSNR.
    """
    return torch.stack([F.mse_loss(net(x, t, y), eps) for x, t, y, eps in walks]).tolist()


# Learning rates: of LoRA in units of the layer's mean s_w, of s_w, of s_x, of z_x (in levels of the grid). The paper
# trains 160 walks of 100 updates at batch 2 with 1/2500, 1e-6 and 5e-4; EfficientDM has 5e-4 for z_x too. Our runs have
# a sixteenth of the updates and larger batches, and want larger steps: experiments/rates.py compares.
RATES = {"lora": 1 / 25, "s_w": 1e-4, "s_x": 8e-3, "z_x": 8e-3}


def parameter_groups(student, lr=1.0):
    """What is trained, as groups for torch.optim.AdamW: `lr` times RATES, no weight decay.

    The scales are trained as logarithms, and d log s = ds / s: their rates are divided by the network's mean scale.
    """
    layers, groups = hqdm.layers(student), []
    for layer in layers:
        hqdm.check_calibrated(layer.activations)
        unit = layer.weights.log_s_w.exp().mean().item()
        groups.append({"params": [layer.weights.lora_A, layer.weights.lora_B], "lr": RATES["lora"] * unit})
    learned = {"s_w": [layer.weights.log_s_w for layer in layers],
               "s_x": [layer.activations.log_s_x for layer in layers],
               "z_x": [layer.activations.z_x for layer in layers if not layer.activations.symmetric]}
    for name, params in learned.items():
        if params:
            unit = 1 if name == "z_x" else torch.cat([p.detach().exp().flatten() for p in params]).mean().item()
            groups.append({"params": params, "lr": RATES[name] / unit})
    return [{"params": group["params"], "lr": lr * group["lr"], "weight_decay": 0.0} for group in groups]


def quantized_copy(teacher, scheme, walks):
    """A quantized student of the teacher, calibrated on `trajectories`."""
    student = copy.deepcopy(teacher)
    hqdm.quantize_network(student, scheme)
    hqdm.calibrate(student, teacher, [(x, t, y) for x, t, y, _ in walks])
    return student


def train_student(run, teacher, scheme, order):
    """`python train.py --wbits W --abits A`: quantize the teacher, calibrate, distil; finish_student does the rest."""
    device, s, S = next(teacher.parameters()).device, run.settings, len(scheme.timesteps)
    short, together = device.type != "cuda", order == "trajectory"
    torch.manual_seed(s["seed"])                     # LoRA's A is drawn at random
    student = copy.deepcopy(teacher)
    rows = hqdm.quantize_network(student, scheme)
    walks = trajectories(teacher, 8 if short else 32, S, s["seed"] + 1_000_000)
    unseen = trajectories(teacher, 8 if short else 64, S, s["seed"] + 2_000_000)
    hqdm.calibrate(student, teacher, [(x, t, y) for x, t, y, _ in walks])
    same_start(student)                              # before its learning rates are made from its scales
    net = recorded(student, device)
    before, calibrated = eps_errors(net, unseen), f"calibrated ({run.seconds():.0f} s)"
    print(f"{report_table(rows)}\n{calibrated}; eps error without training {np.mean(before):.5f}", flush=True)
    pictures = untrained_pictures(teacher, student, walks, 8 if short else 16, s["seed"])

    optimizer = adamw(parameter_groups(student, s["lr"]), device)
    n, own = s["batch"] * (1 if together else WALKS), s["walks"] == "student"
    carousel = Carousel(teacher, n, scheme.timesteps, s["seed"] + 3_000_000, together, own)
    run.restore(model=student, optimizer=optimizer, carousel=carousel)
    print(f"training ({run.seconds():.0f} s)", flush=True)
    batches = carousel.batches(s["batch"], s["steps"], s["seed"], len(run.losses))
    advance = carousel.advance if own else None
    updates = distil(student, optimizer, batches, s["steps"], len(run.losses), s["balance"], advance)
    run.follow(run.measure(updates, max(1, s["steps"] // 10), lambda step: {"eps_errors": eps_errors(net, unseen)}))
    if world()[0] == 0:
        finish_student(run, student, unseen, before, pictures, rows)


def finish_student(run, student, unseen, before, pictures, rows):
    """Fold LoRA in, round for good, pack two 4-bit weights a byte; say what the training was good for; write it all."""
    device, scheme = next(student.parameters()).device, student.hqdm
    hqdm.freeze(student)
    after = eps_errors(recorded(student, device), unseen)
    mean, trained, median = np.mean(before), np.mean(after), np.median(np.divide(before, after))
    print(f"eps error: {median:.1f} times smaller than without training at the median of the {len(after)} steps; mean, "
          f"which is mostly the last step's, {mean:.5f} -> {trained:.5f}", flush=True)
    state = {k: v.cpu() for k, v in student.state_dict().items()}
    path, n = run.out / "model.pt", len(pictures["float"])
    save_checkpoint(path, kind="quantized", unet=student.config, scheme=scheme._asdict(), model=state)
    drawn, _ = draw(load_model(path, device), n, len(after), seed=run.settings["seed"])
    pictures = {**pictures, f"{scheme_name(scheme)}, trained": drawn}
    faithful = {title: psnr(mine, pictures["float"]) for title, mine in pictures.items() if title != "float"}
    said = ", ".join(f"{title}: {v:.1f}" for title, v in faithful.items())
    print(f"PSNR to float of {n} pictures, dB: {said}", flush=True)
    save_grids(run.out / "samples.png", pictures)
    plot_errors(run, scheme, before, after)
    run.finish(device, eps_error_untrained=mean, eps_error=trained, eps_errors_untrained=before, eps_errors=after,
               psnr=faithful, layers=rows, bytes=os.path.getsize(path))


def scheme_name(scheme):
    """W4A3 single, say, or W4A3 single midrise."""
    return f"W{scheme.wbits}A{scheme.abits} {scheme.rotation}{' midrise' * (scheme.grid == 'midrise')}"


def run_name(wbits, abits, rotation, grid="midtread"):
    """w4a3-single, say, or w4a3-single-midrise."""
    return scheme_name(hqdm.Scheme(wbits, abits, rotation, grid=grid)).lower().replace(" ", "-")


def untrained_pictures(teacher, student, walks, n, seed):
    """{title: pictures} of the float model, and of none and single when they are only calibrated: what H alone does."""
    scheme, models = student.hqdm, {"float": teacher}
    for rotation in ("none", "single"):
        other = scheme._replace(rotation=rotation, grid=scheme.grid if rotation == "single" else "midtread")
        model = student if other == scheme else quantized_copy(teacher, other, walks)
        models[f"{scheme_name(other)}, not trained"] = model
    return {title: draw(model, n, len(scheme.timesteps), seed=seed)[0] for title, model in models.items()}


def plot_errors(run, scheme, before, after):
    """loss.png: the eps error on unseen walks along the run, and at each t before and after it."""
    along, times = [(0, before)] + [(r["step"], r["eps_errors"]) for r in run.curve], scheme.timesteps
    plot_lines(run.out / "loss.png", {
        f"{scheme_name(scheme)}: eps error on unseen walks": ("update", {
            "mean of all steps": [(step, np.mean(e)) for step, e in along],
            "median of all steps": [(step, np.median(e)) for step, e in along]}),
        "the same at each DDIM step": ("t", {
            "untrained": list(zip(times, before)), "trained": list(zip(times, after))})})


# ---------------------------------------------------------------- the command line

def parse(argv):
    """The command line -> its options, all of them filled in. ValueError for those that do not go together."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("method (without bits: train the float teacher)").add_argument
    add("--wbits", type=int, choices=range(2, 9), metavar="2..8", help="bits of the weights")
    add("--abits", type=int, choices=range(2, 9), metavar="2..8", help="bits of the activations")
    add("--rotation", choices=hqdm.ROTATIONS, help="the Hadamard transform (single)")
    add("--block", type=positive, help="channels that one transform mixes, a power of two (32)")
    add("--grid", choices=hqdm.GRIDS, help="of rotated activations: with 0 (the paper's), or all 2^b codes (midtread)")
    add("--rank", type=positive, help="of the LoRA factors (32)")
    add("--order", choices=("mixed", "trajectory"), help="of training steps; trajectory is the paper's (mixed)")
    add("--walks", choices=("teacher", "student"), help="whose x_t to learn from; the paper: teacher (student)")
    add("--balance", type=number(0, 1), help="of errors in the loss: 0 alike (paper) to 1 by their size (0.75)")
    add("--ddim-steps", type=positive, help="of the sampler, an activation scale each (50; HQ-DM without CUDA 10)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, help="updates (defaults depend on the device and are printed)")
    add("--batch", type=positive, help="images an update, of all processes together")
    add("--lr", type=number(1e-9, 1e4), help="teacher: the learning rate; HQ-DM: a factor of its four rates (1)")
    add("--seed", type=natural, default=0)
    add("--dropout", type=number(0, 0.99), help="teacher: share of features that a block drops (0)")
    add("--score-every", type=positive, help="teacher: score 5,000 pictures every so many steps (never)")
    add = parser.add_argument_group("files and device").add_argument
    add("--teacher", help="float checkpoint to quantize (the bundled one)")
    add("--data", help="folder with CIFAR-10's .bin files, or the address of their archive (data)")
    add("--out", help="folder of the run (runs/NAME)")
    add("--resume", action="store_true", help="go on with the run in --out, or with the latest of its name")
    add("--device", help="cpu, cuda or mps (the fastest one here)")
    args = parser.parse_args(argv)
    check(args)
    args.device = start_processes(pick_device(args.device))
    for name, value in defaults(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    ddim_timesteps(args.ddim_steps)                  # refuses now what the pictures could not use after the training
    if args.batch % world()[1]:
        raise ValueError(f"--batch {args.batch} cannot be shared by {world()[1]} processes; choose a multiple")
    return args


def check(args):
    """ValueError for what argparse lets pass: options of the other training, and values out of range."""
    quantized = args.wbits is not None
    if quantized != (args.abits is not None):
        raise ValueError("--wbits and --abits go together; without both the float teacher is trained")
    whose = "the teacher" if quantized else "a quantized model; give --wbits and --abits with it"
    for name in ("score_every", "data", "dropout") if quantized else ("rotation", "block", "grid", "rank", "order",
                                                                               "walks", "balance", "teacher"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for {whose}")
    for name in ("block", "grid"):
        if args.rotation == "none" and getattr(args, name) is not None:
            raise ValueError(f"--{name} is for the rotations single and double; none has no {name} to choose")
    if args.out == "":
        raise ValueError("--out is empty; give it a folder")


def defaults(args):
    """{option: value} of the training asked for, short ones without an NVIDIA GPU."""
    full = args.device.type == "cuda"
    if args.wbits is None:
        return dict(ddim_steps=50, steps=11_000 if full else 100, batch=512 if full else 8, lr=8e-4, dropout=0.0)
    sizes = dict(ddim_steps=50, steps=1000, batch=128) if full else dict(ddim_steps=10, steps=150, batch=8)
    teacher = str(CHECKPOINTS / "teacher.pt")
    return dict(**sizes, lr=1.0, rotation="single", block=32, grid="midtread", rank=32, order="mixed",
                walks="student", balance=0.75, teacher=teacher)


def main(argv=None):
    args = parse(argv)
    name = run_name(args.wbits, args.abits, args.rotation, args.grid) if args.wbits else "teacher"
    others = "resume", "out", "device", "data", "teacher", "score_every"     # these may differ where a run goes on
    settings = {k: v for k, v in vars(args).items() if k not in others}
    form = "full" if args.device.type == "cuda" else "short"
    with run_folder(args.out, name, args.resume) as out:
        print(f"device {args.device}; {form} run: --steps {args.steps} --batch {args.batch} --lr {args.lr:g} "
              f"--ddim-steps {args.ddim_steps}; into {out}", flush=True)
        if args.wbits:
            if not Path(args.teacher).is_file():
                raise FileNotFoundError(f"no teacher at {args.teacher}; train one with: python train.py")
            settings["teacher_md5"] = hashlib.md5(Path(args.teacher).read_bytes()).hexdigest()   # wherever it lies
            run = Run(out, settings, args.resume, argv)
            teacher = load_model(args.teacher, args.device, kind=("float",)).requires_grad_(False)
            times = tuple(ddim_timesteps(args.ddim_steps).tolist())
            scheme = hqdm.Scheme(args.wbits, args.abits, args.rotation, args.block, args.rank, times, args.grid)
            train_student(run, teacher, scheme, args.order)
        else:
            images, labels = (v.to(args.device) for v in first_alone(lambda: find_data(args.data)))
            settings["images"] = n = len(images)     # a resumed run must not go on with other data
            if abs(mean_over_processes(torch.tensor(float(n), device=args.device)) - n) > 0.5:
                raise ValueError("the processes found different data; pass --data FOLDER")
            train_teacher(Run(out, settings, args.resume, argv), images, labels, args.dropout, args.score_every)


if __name__ == "__main__":
    run_cli(main)
