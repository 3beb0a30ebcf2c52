"""Train the float teacher, or quantize it with HQ-DM and distil it. Without a GPU both take a short form.

    python train.py                                       # the float teacher on CIFAR-10
    python train.py --wbits 4 --abits 3                   # HQ-DM: 4-bit weights, 3-bit activations; needs no data
    python train.py --wbits 4 --abits 3 --rotation none   # the same quantizers without the Hadamard transform
    python train.py --wbits 4 --abits 3 --resume          # go on after a kill; on a CPU with the same losses, bit for bit
    torchrun --nproc_per_node=4 train.py                  # the same on four GPUs: they share each batch

Each run leaves in runs/NAME/: model.pt (what sample.py draws from), last.pt (what --resume reads), metrics.json,
loss.png and samples.png (the float model's row on top, from the same noise). Times and scores: README.md.

Teacher: noise prediction on 50,000 images with random flips, AdamW, an exponential moving average of the weights (EMA).
HQ-DM (arXiv 2512.05746): no images. The teacher draws from noise; the quantized student must predict the teacher's
noise at each of its steps: loss = mean (eps_student - eps_teacher)^2. Trained are LoRA factors, the weights' scales and
one activation scale per layer and DDIM step (see hqdm.py).
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import hqdm
from sample import (HERE, draw, load_judge, load_model, natural, noise_and_labels, pick_device, positive, provenance,
                    read_checkpoint, recorded, run_cli, save_checkpoint, save_grids, score, write_json)
from unet import UNet, ddim, ddim_timesteps, ddpm_loss

# ---------------------------------------------------------------- the data: CIFAR-10's own binary files, no pickle

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = {         # of the extracted files, so that any mirror's archive can be checked
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25", "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421", "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d", "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    "cifar10-1k.bin": "6672568c6f9da0ae2d58cd800deb0f83"}       # the bundled first thousand images of data_batch_1
RECORD = 1 + 3 * 32 * 32                                        # one label byte, then 1024 R, 1024 G, 1024 B


def read_batch(path):
    """One binary file -> uint8 images (N, 3, 32, 32), labels (N,) int64. ValueError where the file is not the original."""
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % RECORD:
        raise ValueError(f"{path} has {raw.size} bytes, not a multiple of {RECORD}: the file is cut short; fetch it again")
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
    """The bundled first thousand training images, in the same format."""
    return read_batch(HERE / "checkpoints" / "cifar10-1k.bin")


def download_cifar10(dir="data", url=CIFAR10_URL):
    """Fetch, check and unpack the archive; dir/cifar-10-batches-bin appears whole or not at all."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dir) as tmp:           # on the same disk, so that the rename below is atomic
        tmp, old = Path(tmp), socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)                            # a dead host must not hang the run
        try:
            torch.hub.download_url_to_file(url, str(tmp / "archive.tar.gz"))
        except Exception as e:          # urllib, http and socket raise unrelated types
            raise OSError(f"could not fetch {url}: {e}") from None
        finally:
            socket.setdefaulttimeout(old)
        try:
            with tarfile.open(tmp / "archive.tar.gz") as tar:   # only the six files, by base name: no path can escape
                for member in tar:
                    if member.isfile() and os.path.basename(member.name) in CIFAR10_MD5:
                        (tmp / os.path.basename(member.name)).write_bytes(tar.extractfile(member).read())
        except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
            raise ValueError(f"{url} is not a whole tar archive: {e}") from None
        (tmp / "archive.tar.gz").unlink()
        try:
            load_cifar10(tmp), load_cifar10(tmp, test=True)     # md5 of every file
        except (OSError, ValueError) as e:                      # not an OSError, which find_data takes for a lack of network
            raise ValueError(f"{url} is not CIFAR-10 as it should be: {str(e).replace(str(tmp), 'it')}") from None
        keep = tmp / "cifar-10-batches-bin"
        keep.mkdir()
        for name in list(CIFAR10_MD5)[:6]:
            os.replace(tmp / name, keep / name)
        os.replace(keep, dir / "cifar-10-batches-bin")


def find_data(data=None):
    """--data: a folder, an address to fetch, or None: data/, else the home site, else the bundled images, loudly."""
    if data and data.startswith(("http://", "https://", "file://")):
        if not Path("data/cifar-10-batches-bin").is_dir():
            download_cifar10("data", data)
        return load_cifar10("data")
    if data or Path("data/cifar-10-batches-bin").is_dir():
        return load_cifar10(data or "data")
    try:
        download_cifar10("data")
        return load_cifar10("data")
    except OSError as e:
        print(f"*** {e}\n*** TRAINING ON THE 1,000 BUNDLED IMAGES INSTEAD OF 50,000: good for a try, not for results. ***\n"
              f"*** For the full data pass --data FOLDER, or the address of a mirror of cifar-10-binary.tar.gz. ***", flush=True)
        return load_bundled()


# ---------------------------------------------------------------- several processes, one batch: torchrun

def start_processes(device):
    """Under torchrun: join the other processes, and return this one's device; rank 0 alone prints. Else just the device."""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def world():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_alone(work):
    """work() in process 0, and when it is done in the others: what it fetches or makes is then there for them."""
    rank, processes = world()
    for turn in (0, 1):
        if turn == min(rank, 1):
            result = work()
        if processes > 1:
            dist.barrier()
    return result


def my_rows():
    """The rows of every batch that this process computes: all draw the whole batch from the same seed, none sends any."""
    rank, processes = world()
    return slice(rank, None, processes)


def rows_of_all(mine):
    """This process's rows of a tensor on the CPU -> the rows of all processes, in their order."""
    parts = [mine] * world()[1]
    if world()[1] > 1:
        dist.all_gather_object(parts, mine)
    whole = mine.new_empty(sum(map(len, parts)), *mine.shape[1:])
    for rank, part in enumerate(parts):
        whole[rank::len(parts)] = part
    return whole


def same_start(model):
    """Process 0's weights for all: what each GPU computes alone, as in calibration, can differ in the last bit."""
    for v in model.state_dict().values() if world()[1] > 1 else ():
        dist.broadcast(whole := v.contiguous(), 0)
        v.copy_(whole)


def compiled(net, device, steps):
    """net, compiled where that pays back its minute: in a long run, on a GPU, where torch's compiler serves it."""
    if steps < 2000 or not hqdm.fast_gpu(torch.empty(0, device=device)):
        return net
    print("compiling: the first step takes a minute or two", flush=True)
    return torch.compile(net)


def mean_over_processes(value):
    """A tensor on the model's device -> its mean over all processes, detached."""
    value = value.detach()
    if world()[1] > 1:
        dist.all_reduce(value := value / world()[1])
    return value


# ---------------------------------------------------------------- one loop for both trainings

def seed_step(seed, step):
    """Make all randomness of a step (batch, times, noise, dropout) a function of (seed, step): resuming needs no more.

    Several processes draw alike, so dropout drops the same features from row k of each one's share.
    """
    torch.manual_seed(1_000_003 * seed + step)


def autocast(device):
    """bf16 where the GPU computes in it; float32 elsewhere (fp16 would need loss scaling)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def decay(step, steps, warmup=0, shape="cosine"):
    """Factor of the learning rate: linear warm-up, then cosine or linear decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


def adamw(groups, device):
    """AdamW without weight decay, every group of parameters in one kernel; each has its learning rate at full as base_lr."""
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type in ("cuda", "cpu"))


def updater(optimizer, compute_loss, device):
    """A function of (factor, *tensors): one optimiser step on compute_loss(*tensors), at `factor` times each group's base_lr.

    It returns the loss and the norm of the gradient, which is clipped to 1. On a GPU the whole step is recorded; with several
    processes in two halves, between which they average their gradients: each half as a plain function, for batches of one
    shape. (DistributedDataParallel averages from hooks inside the backward pass, which is harder to record.)
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    cuda = device.type == "cuda"
    for group in groups:                             # a recorded step reads its rates from the GPU: a number would be recorded with it
        group["lr"] = torch.tensor(group["base_lr"], device=device) if cuda else group["base_lr"]
        group["capturable"] = cuda                   # here, and not in adamw, because the state of a run on another device may be loaded

    def backward(*tensors):
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(*tensors)
        loss.backward()
        return loss.detach()

    def descend():
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return norm.detach()

    def pack(*tensors):                              # the loss and all gradients, so that one message averages them
        loss = backward(*tensors)
        return torch.cat([loss.view(1), *(p.grad.flatten() for p in params)])

    def unpack(means):
        for p, mean in zip(params, means[1:].split([p.numel() for p in params])):
            p.grad.copy_(mean.view_as(p))
        return means[0].clone(), descend()           # a view would keep all gradients alive

    whole = recorded(lambda *tensors: (backward(*tensors), descend()), device)
    before, after = recorded(pack, device), recorded(unpack, device)

    def update(factor, *tensors):
        for group in groups:
            if cuda:
                group["lr"].fill_(group["base_lr"] * factor)
            else:
                group["lr"] = group["base_lr"] * factor
        return whole(*tensors) if world()[1] == 1 else after(mean_over_processes(before(*tensors)))

    return update


SAVE_SECONDS, LOG_STEPS = 60, 50


def run_updates(updates, losses, steps, batch, save):
    """Consume a generator of (loss, gradient norm), one a step: print, save every minute, stop at the first NaN.

    `losses` holds the losses of the steps already done and grows in place. Values stay on the device between prints,
    because reading one makes the host wait for the GPU. Raises FloatingPointError naming the step; what was saved
    before stays, and nothing is saved after. Ctrl-C and a polite kill finish the step, save, and exit with code 130.
    """
    pending, logged, saved, saved_step = [], time.time(), time.time(), len(losses)

    def settle():
        values = torch.stack([torch.stack(pair) for pair in pending]).float().tolist() if pending else []
        for loss, norm in values:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
                raise FloatingPointError(f"loss or gradient is not finite at step {len(losses) + 1}; {kept}; try a lower --lr")
            losses.append(loss)
        pending.clear()

    with stop_politely() as stop:
        for i, (loss, norm) in enumerate(updates, start=len(losses) + 1):
            pending.append((loss, norm))
            due, stopping = time.time() - saved > SAVE_SECONDS, bool(stop)
            if world()[1] > 1:                       # clocks and signals differ: all must decide alike, so they ask, now and then
                asked = mean_over_processes(torch.tensor([due, stopping], dtype=torch.float32, device=loss.device)) if i % LOG_STEPS == 0 else [0, 0]
                due, stopping = (bool(v) for v in asked)
            due = due or stopping or i == steps
            if i % LOG_STEPS == 0 or due:
                count = len(pending)
                settle()
                rate, logged = count / (time.time() - logged), time.time()   # since the last line: no compile time in it
                print(f"step {i}/{steps}  loss {np.mean(losses[-LOG_STEPS:]):.5f}  {rate * batch:.1f} images/s  "
                      f"{(steps - i) / rate:.0f} s left", flush=True)
            if due:
                if world()[0] == 0:
                    save()
                saved, saved_step = time.time(), i
            if stopping and i < steps:
                print(f"stopped after step {i}; go on with --resume", flush=True)
                sys.exit(130)


@contextlib.contextmanager
def stop_politely():
    """A list that Ctrl-C or a polite kill fills: looked at between steps, so that a step is never half done."""
    stop = []
    main_thread = threading.current_thread() is threading.main_thread()      # elsewhere Python refuses to set handlers
    old = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)} if main_thread else {}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------- the float teacher

@torch.no_grad()
def update_ema(ema, model, step):
    """Move the average of the weights towards the model's, after step 0, 1, ..: it looks back over a tenth of the run so far.

    Its decay grows like this to 0.9999. At 0.9999 from the start, a third of it would still be untrained weights after
    10,000 steps, and what it draws noise. The decay is a function of the step: resuming needs no counter, and the host
    need not wait for the GPU (torch's AveragedModel asks at each step whether it is the first).
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(1e-4, 9 / (10 + step)))


def teacher_updates(model, ema, optimizer, images, labels, steps, batch, seed, first=0, shape="cosine", loss=ddpm_loss):
    """Train `model` and its average `ema` in place: a generator of (loss, gradient norm) after each of the steps first .. steps-1.

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
        result = update(decay(step, steps, min(500, steps // 10), shape), x_0.contiguous(memory_format=torch.channels_last), labels[pick])
        update_ema(ema, model, step)
        yield result


def scored(updates, model, judge, first, args, out, n=5000):
    """The same updates; every --score-every steps the model (the EMA) draws n pictures, and curve.json gets their scores.

    All processes draw their share of the pictures; the first one scores them.
    """
    path = out / "curve.json"
    try:
        rows = [r for r in json.loads(path.read_text()) if r["step"] <= first] if path.is_file() else []
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged; move it away to begin a new curve") from None
    for step, result in enumerate(updates, start=first + 1):
        if (step % args.score_every == 0 or step == args.steps) and torch.stack(result).isfinite().all():     # NaN: run_updates stops
            pictures, labels = (rows_of_all(v) for v in draw(model.eval(), n, args.ddim_steps, seed=args.seed, rows=my_rows()))
            if world()[0] == 0:
                rows.append({"step": step, "images": step * args.batch, "n": n, **score(pictures, labels, judge)})
                write_json(path, rows)
                print(f"after {step * args.batch / 1e6:.1f} M images: C-FID {rows[-1]['c_fid']:.2f}, C-IS {rows[-1]['c_is']:.3f}, "
                      f"class accuracy {rows[-1]['accuracy']:.3f}", flush=True)
                plot_curve(rows, out / "curve.png")
        yield result                                 # after its score: what is saved now has its row


def plot_curve(rows, path):
    """C-FID, C-IS and class accuracy against the images seen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for ax, (key, title) in zip(axes, {"c_fid": "C-FID", "c_is": "C-IS", "accuracy": "class accuracy"}.items()):
        ax.plot([r["images"] / 1e6 for r in rows], [r[key] for r in rows], "o-")
        ax.set(xlabel="million images", title=title)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def train_teacher(args, device, out):
    """`python train.py`: the float model, its EMA weights saved in half precision."""
    images, labels = (t.to(device) for t in first_alone(lambda: find_data(args.data)))
    args.images = len(images)                       # a setting: a resumed run must not go on with other data
    if abs(mean_over_processes(torch.tensor(float(len(images)), device=device)) - len(images)) > 0.5:
        raise ValueError("the processes found different data; pass --data FOLDER")
    judge = load_judge(device) if args.score_every else None
    state = read_state(args, out)
    torch.manual_seed(args.seed)
    model = UNet(dropout=args.dropout).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw([{"params": list(model.parameters()), "base_lr": args.lr}], device)
    print(f"float teacher: {sum(p.numel() for p in model.parameters()):,} parameters, {len(images):,} images", flush=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    losses, spent = restore(state, out, parts)
    began = time.time() - spent
    updates = teacher_updates(model, ema, optimizer, images, labels, args.steps, args.batch, args.seed, len(losses))
    if args.score_every:
        updates = scored(updates, ema, judge, len(losses), args, out)
    run_updates(updates, losses, args.steps, args.batch, lambda: store(args, out, parts, losses, time.time() - began))
    seconds = time.time() - began
    if world()[0] > 0:
        return

    final = ema.eval()
    save_checkpoint(out / "model.pt", kind="float", unet=final.config,
                    model={k: v.half().cpu() if v.is_floating_point() else v.cpu() for k, v in final.state_dict().items()})
    finish(args, device, out, losses, seconds, {"float": load_model(out / "model.pt", device)},
           {"bytes": os.path.getsize(out / "model.pt"), "parameters": sum(p.numel() for p in final.parameters())})


# ---------------------------------------------------------------- quantize and distil

def make_pool(teacher, n, ddim_steps, seed, batch=250):
    """The teacher's trajectories from n noises: dict of x, eps (S, n, 3, 32, 32), t (S,), y (n,), on its device.

    Every eleventh label is "none", about as in the teacher's own training, so that guidance works on the student too.
    """
    device = next(teacher.parameters()).device
    net = recorded(teacher, device)
    noise, y = noise_and_labels(n, seed, teacher.classes)
    y = torch.where(torch.arange(n) % (teacher.classes + 1) == teacher.classes, teacher.classes, y).to(device)
    parts = []
    for x, labels in zip(noise.split(batch), y.split(batch)):
        x = x.to(device, memory_format=torch.channels_last)
        t, xs, epss = zip(*((t, x_t, eps) for t, x_t, eps, _ in ddim(net, x, labels, ddim_steps)))
        parts.append((torch.stack(xs), torch.stack(epss)))
    x, eps = (torch.cat(p, dim=1) for p in zip(*parts))
    return {"x": x, "eps": eps, "t": torch.tensor(t, device=device), "y": y}


def pool_batches(pool, batch, steps, seed, first=0):
    """Random batches (x_t, t, y, eps) that mix all DDIM steps and images of the pool: our default order."""
    S, n = pool["x"].shape[:2]
    for step in range(first, steps):
        seed_step(seed, step)
        s, i = (torch.randint(high, (batch,), device=pool["x"].device)[my_rows()] for high in (S, n))
        yield pool["x"][s, i], pool["t"][s], pool["y"][i], pool["eps"][s, i]


def trajectory_batches(teacher, batch, steps, ddim_steps, seed, first=0):
    """Batches in the paper's order: new noise, then the teacher's walk from t = T-1 to 0, all samples at one t."""
    device = next(teacher.parameters()).device
    net = recorded(teacher, device)
    for walk in range(first // ddim_steps, math.ceil(steps / ddim_steps)):
        seed_step(seed, walk)
        x = torch.randn(batch, 3, 32, 32)[my_rows()].to(device, memory_format=torch.channels_last)
        y = torch.randint(teacher.classes + 1, (batch,))[my_rows()].to(device)
        for i, (t, x_t, eps, _) in enumerate(ddim(net, x, y, ddim_steps), start=walk * ddim_steps):
            if first <= i < steps:                  # after a resume the walk is repeated up to where the kill came
                yield x_t, torch.full_like(y, t), y, eps


def distil_updates(student, optimizer, batches, steps, first=0):
    """Train the quantized student in place: yields (loss, gradient norm) a step. loss = mean (eps_s - eps_t)^2."""
    device = next(student.parameters()).device
    update = updater(optimizer, lambda x, t, y, eps: F.mse_loss(student(x, t, y), eps), device)
    for step, (x, t, y, eps) in enumerate(batches, start=first):
        yield update(decay(step, steps, shape="linear"), x.contiguous(memory_format=torch.channels_last), t, y, eps)


@torch.no_grad()
def eps_error(student, pool, batch=250):
    """Mean (eps_student - eps_teacher)^2 over a pool: the printed measure of a student, on noises it never saw."""
    total, net = 0.0, recorded(student, pool["x"].device)
    for s in range(len(pool["t"])):
        for x, y, eps in zip(pool["x"][s].split(batch), pool["y"].split(batch), pool["eps"][s].split(batch)):
            x = x.contiguous(memory_format=torch.channels_last)
            total += F.mse_loss(net(x, pool["t"][s].expand(len(x)), y), eps, reduction="sum").item()
    return total / pool["eps"].numel()


def train_quantized(args, device, out):
    """`python train.py --wbits W --abits A`: quantize the teacher, calibrate, distil, fold, pack."""
    if not Path(args.teacher).is_file():
        raise FileNotFoundError(f"no teacher at {args.teacher}; train one with: python train.py")
    args.teacher_md5 = hashlib.md5(Path(args.teacher).read_bytes()).hexdigest()      # the same teacher, wherever it lies
    state = read_state(args, out)
    teacher = load_model(args.teacher, device, kind=("float",)).requires_grad_(False)
    short = device.type == "cpu"
    student = copy.deepcopy(teacher)
    began = time.time()
    torch.manual_seed(args.seed)                    # LoRA's A is drawn at random
    quant = dict(wbits=args.wbits, abits=args.abits, rotation=args.rotation, block=args.block,
                 timesteps=ddim_timesteps(args.ddim_steps).tolist(), rank=args.rank)
    rows = hqdm.quantize_unet(student, **quant)
    print(hqdm.format_report(rows), flush=True)

    print(f"drawing the teacher's trajectories ({time.time() - began:.0f} s)", flush=True)
    test = make_pool(teacher, 8 if short else 64, args.ddim_steps, seed=args.seed + 2_000_000)
    calib = make_pool(teacher, 8 if short else 32, args.ddim_steps, seed=args.seed + 1_000_000)
    hqdm.calibrate(student, teacher, ((calib["x"][s], calib["t"][s].expand(len(calib["y"])), calib["y"])
                                      for s in range(args.ddim_steps)))
    same_start(student)                             # before its learning rates are made from its scales
    before = eps_error(student, test)
    print(f"calibrated ({time.time() - began:.0f} s); eps error without training {before:.5f}", flush=True)

    optimizer = adamw(hqdm.parameter_groups(student, args.lr), device)
    parts = {"model": student, "optimizer": optimizer}
    losses, spent = restore(state, out, parts)
    began -= spent
    if args.order == "pool":
        pool = make_pool(teacher, 16 if short else 1024, args.ddim_steps, seed=args.seed + 3_000_000)
        batches = pool_batches(pool, args.batch, args.steps, args.seed, first=len(losses))
    else:
        batches = trajectory_batches(teacher, args.batch, args.steps, args.ddim_steps, args.seed, first=len(losses))
    print(f"training ({time.time() - began:.0f} s)", flush=True)
    updates = distil_updates(student, optimizer, batches, args.steps, first=len(losses))
    run_updates(updates, losses, args.steps, args.batch, lambda: store(args, out, parts, losses, time.time() - began))
    if world()[0] > 0:
        return

    hqdm.freeze(student)                            # fold LoRA in, round for good, pack two 4-bit weights a byte
    after = eps_error(student, test)
    print(f"eps error without training {before:.5f}, trained {after:.5f} ({before / after:.1f} times smaller)", flush=True)
    state = {k: v.cpu() for k, v in student.state_dict().items()}
    save_checkpoint(out / "model.pt", kind="quantized", unet=student.config, quant=quant, model=state)
    finish(args, device, out, losses, time.time() - began,
           {"float": teacher, f"W{args.wbits}A{args.abits} {args.rotation}": load_model(out / "model.pt", device)},
           {"eps_error_untrained": before, "eps_error": after, "layers": rows,
            "bytes": os.path.getsize(out / "model.pt")})


# ---------------------------------------------------------------- what a run leaves behind

def settings(args):
    """What must be equal for a run to be resumed."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "out", "device", "data", "teacher", "score_every")}


def store(args, out, parts, losses, seconds):
    """runs/NAME/last.pt: everything that --resume needs."""
    save_checkpoint(out / "last.pt", kind="training", settings=settings(args), losses=list(losses), seconds=seconds,
                    **{name: part.state_dict() for name, part in parts.items()})


def read_state(args, out):
    """last.pt where --resume was given, else None. ValueError where it was made with other settings: before any work."""
    if not args.resume:
        return None
    state = read_checkpoint(out / "last.pt", kind=("training",))
    if not isinstance(state.get("settings"), dict) or not isinstance(state.get("losses"), list):
        raise ValueError(f"{out / 'last.pt'} is not the state of a run")
    wrong = [f"--{k.replace('_', '-')} {v} (was {state['settings'].get(k)})"
             for k, v in settings(args).items() if state["settings"].get(k) != v]
    if wrong:
        raise ValueError(f"{out / 'last.pt'} was made with other settings: {', '.join(wrong)}")
    return state


def restore(state, out, parts):
    """Fill the parts from the state. Returns the losses so far and the seconds they took: [], 0 for a new run."""
    if state is None:
        return [], 0.0
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        print(f"resumed {out / 'last.pt'} at step {len(state['losses'])}", flush=True)
        return state["losses"], float(state["seconds"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{out / 'last.pt'} does not fit this run: {str(e).splitlines()[0]}") from None


def finish(args, device, out, losses, seconds, models, more):
    """metrics.json, loss.png, samples.png."""
    save_grids(out / "samples.png", {name: draw(model, 16, args.ddim_steps, seed=args.seed)[0] for name, model in models.items()})
    each = math.ceil(len(losses) / 10_000)          # a long run's losses are kept as means of so many updates: 80,000 would be 2 MB
    kept = losses if each == 1 else [round(float(np.mean(losses[i:i + each])), 6) for i in range(0, len(losses), each)]
    metrics = {**provenance(args, device, seconds), "processes": world()[1], **more, "updates_per_loss": each, "losses": kept}
    write_json(out / "metrics.json", metrics)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    window = max(1, len(losses) // 10)
    ax.semilogy(losses, color="0.8", linewidth=0.8, label="each step")
    ax.semilogy(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"),
                label=f"mean of {window} steps")
    ax.set(xlabel="step", ylabel="mean squared error of the noise")
    ax.set_title(out.name, parse_math=False)
    ax.legend()
    fig.savefig(out / "loss.png", dpi=100)
    plt.close(fig)
    print(f"wrote {out}/model.pt ({os.path.getsize(out / 'model.pt') / 1e6:.2f} MB), metrics.json, loss.png, samples.png; "
          f"{seconds:.0f} s", flush=True)


def open_out(args, name):
    """The run's folder. A folder that holds a run is never written over: without --out a new name, with --out an error."""
    out = Path(args.out or Path("runs") / name)
    if args.resume:
        if not args.out:                            # NAME, NAME-2, ..: the one that was written last
            runs = [p.parent for p in out.parent.glob(f"{out.name}*/last.pt") if re.fullmatch(rf"{out.name}(-\d+)?", p.parent.name)]
            out = max(runs, key=lambda p: (p / "last.pt").stat().st_mtime, default=out)
        if not (out / "last.pt").is_file():
            raise FileNotFoundError(f"nothing to resume in {out}: it has no last.pt")
        return out
    if args.out and any((out / f).exists() for f in ("last.pt", "model.pt", "metrics.json", "curve.json", "loss.png", "samples.png")):
        raise ValueError(f"{out} already holds a run: go on with --resume, or choose another --out")
    try:
        if args.out:
            out.mkdir(parents=True, exist_ok=True)
        while not args.out:                         # two runs that start together take two names: only one can make a folder
            try:
                out.mkdir(parents=True)
                break
            except FileExistsError:
                out = next(p for i in range(2, 10_000) if not (p := out.with_name(f"{name}-{i}")).exists())
        (out / ".write").touch()
        (out / ".write").unlink()
    except OSError as e:
        raise ValueError(f"cannot write to {out}: {e.strerror}") from None
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    method = parser.add_argument_group("method (both bits 32: train the float teacher)")
    method.add_argument("--wbits", type=int, default=32, help="bits of the weights, 2..8 or 32 (32)")
    method.add_argument("--abits", type=int, default=32, help="bits of the activations, 2..8 or 32 (32)")
    method.add_argument("--rotation", choices=hqdm.ROTATIONS, help="the Hadamard transform (single)")
    method.add_argument("--block", type=positive, help="channels that one transform mixes, a power of two (32)")
    method.add_argument("--rank", type=positive, help="of the LoRA factors (32)")
    method.add_argument("--order", choices=("pool", "trajectory"), help="of the training steps (pool)")
    method.add_argument("--ddim-steps", type=positive, help="steps of the sampler, one activation scale each (50; cpu 10)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, help="updates (defaults depend on the device and are printed)")
    training.add_argument("--batch", type=positive, help="images an update, of all processes together")
    training.add_argument("--lr", type=float, help="teacher: the learning rate; HQ-DM: a factor of its four rates (1)")
    training.add_argument("--seed", type=natural, default=0)
    training.add_argument("--dropout", type=float, help="teacher: share of features that each block drops, 0 to below 1 (0)")
    training.add_argument("--score-every", type=positive, help="teacher: score 5,000 pictures every so many steps (never)")
    files = parser.add_argument_group("files and device")
    files.add_argument("--teacher", help="float checkpoint to quantize (the bundled one)")
    files.add_argument("--data", help="folder with CIFAR-10's .bin files, or the address of their archive (data)")
    files.add_argument("--out", help="folder of the run (runs/NAME)")
    files.add_argument("--resume", action="store_true", help="go on with the run in --out, or with the latest of its name")
    files.add_argument("--device", help="cpu, cuda or mps (the fastest one here)")
    args = parser.parse_args(argv)

    for name, bits in (("wbits", args.wbits), ("abits", args.abits)):
        if bits != 32 and not 2 <= bits <= 8:
            raise ValueError(f"--{name} {bits} is not possible; choose 2 to 8, or 32 for float")
    quantized = (args.wbits, args.abits) != (32, 32)
    if quantized and args.score_every:
        raise ValueError("--score-every is for the teacher; a quantized model is scored by sample.py --score")
    if quantized and args.data is not None:
        raise ValueError("--data is for the teacher; a quantized model learns from the teacher alone")
    if quantized and args.dropout is not None:
        raise ValueError("--dropout is for the teacher; a quantized model has none")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout} is not a share from 0 to below 1")
    for key, value in dict(rotation="single", block=32, rank=32, order="pool", teacher=str(HERE / "checkpoints" / "teacher.pt")).items():
        if not quantized and getattr(args, key) is not None:
            raise ValueError(f"--{key} is for a quantized model; give --wbits and --abits with it")
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.out == "":
        raise ValueError("--out is empty; give it a folder")
    if args.lr is not None and not 0 < args.lr <= 1e4:
        raise ValueError(f"--lr {args.lr} is not a positive number up to 10,000")
    device = start_processes(pick_device(args.device))
    full = device.type != "cpu"
    defaults = (dict(ddim_steps=50 if full else 10, steps=1000 if full else 300, batch=128 if full else 4, lr=1.0) if quantized
                else dict(ddim_steps=50, steps=11_000 if full else 100, batch=512 if full else 8, lr=8e-4, dropout=0.0))
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    ddim_timesteps(args.ddim_steps)                 # refuses now what the pictures could not use after the training
    if args.batch % world()[1]:
        raise ValueError(f"--batch {args.batch} cannot be shared by {world()[1]} processes; choose a multiple")
    existed, outs = args.out is not None and Path(args.out).is_dir(), [None]
    if world()[0] == 0:
        try:
            outs = [open_out(args, f"w{args.wbits}a{args.abits}-{args.rotation}" if quantized else "teacher")]
        except (ValueError, OSError) as e:
            outs = [e]
    if world()[1] > 1:                              # process 0 chose the folder, or found none
        dist.broadcast_object_list(outs)
    out = outs[0]
    if isinstance(out, Exception):
        raise out
    print(f"device {device}; {'full' if full else 'short (no GPU)'} run: --steps {args.steps} --batch {args.batch} "
          f"--lr {args.lr:g} --ddim-steps {args.ddim_steps}; into {out}", flush=True)
    try:
        (train_quantized if quantized else train_teacher)(args, device, out)
    finally:
        if world()[0] == 0 and not existed and not any(out.iterdir()):       # refused before anything was written
            out.rmdir()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
