"""Not the method, skip it at first reading: what any training and any program needs, whatever it computes."""
import argparse
import contextlib
import dataclasses
import datetime
import gc
import io
import json
import math
import os
import re
import signal
import stat
import sys
import threading
import time
import uuid
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from plumbing import kernels
from plumbing.kept import ahead

# What each kind of checkpoint looks like; a reader refuses other numbers.
FORMATS = {"float": 1, "judge": 1, "quantized": 3, "training": 4}


# ---------------------------------------------------------------- files: whole or not there, tensors and plain values

@contextlib.contextmanager
def whole_file(path):
    """A temporary path of one's own to write to, renamed to `path` at the end (atomic on POSIX).

    A one-line OSError where that fails; ValueError where `path` is there and no plain file (a link, a device).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_out(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield part
        for wait in (0.1, 0.3, 1, 3, None):
            try:
                os.replace(part, path)
                break
            except PermissionError:                  # Windows, while a viewer or a scanner holds the file
                if wait is None:
                    raise
                time.sleep(wait)
    except RuntimeError as e:                        # torch's words
        raise OSError(f"could not write {path}; is the disk full? ({str(e).splitlines()[0]})") from None
    except OSError as e:
        raise OSError(f"could not write {path}: {str(e).splitlines()[0]}") from None
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path, **content):
    """Write a checkpoint, which torch.load(path, weights_only=True) opens anywhere. Equal content: equal bytes."""
    with whole_file(path) as part, open(part, "wb") as f:
        torch.save({"format": FORMATS[content["kind"]], **content}, f)


def read_checkpoint(path, kind=None):
    """The dictionary that save_checkpoint wrote, on the CPU.

    FileNotFoundError without the file; ValueError where it is damaged, hides code (weights_only=True refuses to run
    it), is not ours, has another format than this code, or is of another kind than those asked for.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    whole = Path(path).read_bytes()                  # a file that may not be read is not damaged: its OSError passes
    try:
        if bad := zipfile.ZipFile(io.BytesIO(whole)).testzip():                  # torch reads past a flipped bit
            raise ValueError(f"{bad} has another checksum")
        ckpt = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as e:               # torch raises half a dozen types (zip, pickle, key errors), all for one thing
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values; nothing of it was run "
                         f"({type(e).__name__})") from None
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("format"), int) or ckpt.get("kind") not in list(FORMATS):
        raise ValueError(f"{path} is not a checkpoint of this project")
    if (mine := FORMATS[ckpt["kind"]]) != ckpt["format"]:
        remedy = "update the code" if ckpt["format"] > mine else "make it anew with this code"
        raise ValueError(f"{path} has format {ckpt['format']}; this code reads format {mine}: {remedy}")
    if kind is not None and ckpt["kind"] not in kind:
        raise ValueError(f"{path} is a {ckpt['kind']!r} checkpoint, not {' or '.join(map(repr, kind))}")
    return ckpt


def write_json(path, report):
    """A report as indented JSON, whole or not there."""
    with whole_file(path) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")


def one_line(error):
    """The first two lines of an error: torch's lists begin with a heading."""
    return " ".join(map(str.strip, str(error).splitlines()[:2]))


def check_out(path, suffix=""):
    """ValueError where a file could not be written, or is not called as its kind is; before the work. None: no file."""
    if path is None:
        return
    if not str(path).endswith(suffix) or not str(path):
        raise ValueError(f"cannot write {path}: its name must end in {suffix or 'something'}")
    if os.path.lexists(path) and not (stat.S_ISREG(os.lstat(path).st_mode) and os.access(path, os.W_OK)):
        raise ValueError(f"cannot write {path}: it is there, and no plain file that may be written")
    if not (folder := Path(path).absolute().parent).is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: {folder} is no folder that may be written to")


def plot_lines(path, panels):
    """A panel for each {title: (x label, {name: [(x, y), ..]})}, as a PNG; logarithmic where the y are far apart."""
    from matplotlib.figure import Figure             # not pyplot, whose backend is everybody's
    fig = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained", dpi=110)
    for ax, (title, (label, lines)) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, points in lines.items():
            ax.plot(*zip(*points), "o-", markersize=4, label=name)
        values = [y for points in lines.values() for _, y in points]
        ax.set(xlabel=label, yscale="log" if max(values) > 3 * min(values) > 0 else "linear")
        ax.set_title(title, parse_math=False, fontsize=10)
        ax.grid(alpha=0.3)
        if len(lines) > 1:
            ax.legend(frameon=False)
    with whole_file(path) as part:
        fig.savefig(part, format="png")


# ---------------------------------------------------------------- a GPU's time

def recorded(f, device):
    """f(*tensors) -> tensor or tuple of tensors; on CUDA its many kernels become one launch, a CUDA graph.

    A host that starts our thousands of kernels one by one leaves a fast GPU waiting: of the 168 ms of a quantized
    update it worked 43. The first call with each shape of the inputs runs as written, the second is recorded, later
    ones are replayed. So f must do the same each time, on the GPU alone.
    """
    if torch.device(device).type != "cuda":
        return f
    graphs, stream = {}, torch.cuda.Stream(device)

    def call(*inputs):
        key = tuple(v.shape for v in inputs)
        if key not in graphs:                        # libraries choose their kernels now; not on everybody's stream
            graphs[key] = None
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = f(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if graphs[key] is None:
            graph, held, collecting = torch.cuda.CUDAGraph(), [v.clone() for v in inputs], gc.isenabled()
            gc.disable()                             # an older graph that Python frees meanwhile spoils this one
            outer = sys.exc_info()[1]                # what is being handled already
            try:                                     # the first `with` leaves the graph's stream after errors, too
                with torch.cuda.stream(torch.cuda.current_stream()):
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):   # torch.distributed has a thread
                        result = f(*held)
            except RuntimeError as e:
                raise _first(e, outer) from None
            finally:
                if collecting:
                    gc.enable()
            graphs[key] = graph, held, result
        graph, held, result = graphs[key]
        for mine, v in zip(held, inputs):
            mine.copy_(v)
        graph.replay()
        return tuple(v.clone() for v in result) if isinstance(result, tuple) else result.clone()

    call.classes = getattr(f, "classes", None)       # ddim asks a network for it
    return call


def _first(error, outer):
    """What went wrong first while a graph was recorded: the end of the recording then fails as well, and says less."""
    while error.__context__ not in (None, outer):
        error = error.__context__
    if "captur" not in str(error):
        return error
    return RuntimeError(f"no CUDA graph could be recorded: {one_line(error)}. Does something in it wait for the GPU, as"
                        " .item() does? Or is a result of the network kept with its gradient's graph? Then detach() it")


def compiled(net, device, steps):
    """net, compiled where that pays back its minute: in a long run, on a GPU, where torch's compiler serves it."""
    if steps < 2000 or not kernels.on_triton(torch.empty(0, device=device)):
        return net
    print("compiling: the first step takes a minute or two", flush=True)
    return torch.compile(net)


def autocast(device):
    """bf16 where the GPU computes in it; float32 elsewhere (fp16 would need loss scaling)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def adamw(groups, device):
    """AdamW in one kernel a group. Each group's rate is kept as initial_lr: `lr` is what updater makes of it."""
    groups = [{"weight_decay": 0.0, **group, "initial_lr": group["lr"]} for group in groups]
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"))


def updater(optimizer, compute_loss, device, network=None):
    """A function of (factor, *tensors): one optimiser step on compute_loss(*tensors), at `factor` times initial_lr.

    It returns the loss and the norm of the gradient, which is clipped to 1. On a GPU the whole step is recorded, and
    the weights of `network`, if it is quantized, are made beside the rest.
    """
    groups, cuda = optimizer.param_groups, device.type == "cuda"
    params = [p for group in groups for p in group["params"]]
    for group in groups:
        group.setdefault("initial_lr", group["lr"])  # of an optimizer that adamw did not make
        group["capturable"] = cuda                   # here, because the state of a run on another device may be loaded
    initial = torch.tensor([group["initial_lr"] for group in groups], dtype=torch.float32, device=device)
    rates = initial.clone()                          # a recorded step reads its rates from the GPU: a number would stay
    for group, rate in zip(groups, rates):
        group["lr"] = rate if cuda else group["initial_lr"]

    def backward(*tensors):
        optimizer.zero_grad(set_to_none=True)
        with ahead(network):
            loss = compute_loss(*tensors)
            loss.backward()
        return loss.detach()

    def descend():
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return norm.detach()

    if world()[1] == 1:
        step = recorded(lambda *tensors: (backward(*tensors), descend()), device)
    else:
        step = _shared_step(backward, descend, params, device)

    def update(factor, *tensors):
        if cuda:
            torch.mul(initial, factor, out=rates)
        else:
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
        return step(*tensors)

    return update


def _shared_step(backward, descend, params, device):
    """The step of several processes, for batches of one shape: two recorded halves, between which they average."""
    # DistributedDataParallel averages from hooks inside the backward pass, which are harder to record.
    def pack(*tensors):                              # the loss and all gradients, so that one message averages them
        loss = backward(*tensors)
        return torch.cat([loss.view(1), *(p.grad.flatten() for p in params)])

    def unpack(means):
        for p, mean in zip(params, means[1:].split([p.numel() for p in params])):
            p.grad.copy_(mean.view_as(p))
        return means[0].clone(), descend()           # a view would keep all gradients alive

    before, after = recorded(pack, device), recorded(unpack, device)
    return lambda *tensors: after(mean_over_processes(before(*tensors)))


# ---------------------------------------------------------------- several processes, one batch: torchrun

def start_processes(device):
    """The device; under torchrun this process's, which joins the others. Rank 0 alone prints."""
    if "RANK" not in os.environ:
        return device
    if missing := [v for v in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]:
        raise ValueError(f"RANK is set, as torchrun does, but not {', '.join(missing)}: use torchrun, or unset RANK")
    cuda = device.type == "cuda"
    if device.type == "mps":
        raise ValueError("torchrun works on cuda and cpu, not on mps: pass --device cpu")
    if cuda:
        mine, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if mine >= there:
            raise ValueError(f"process {mine + 1} of this machine finds {there} GPUs: pass --nproc_per_node={there}")
        device = torch.device("cuda", mine)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=datetime.timedelta(hours=1))         # one downloads, the others wait
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


def from_first(work):
    """work() in process 0 alone; its result, or its error, in all."""
    box = [None]
    if world()[0] == 0:
        try:
            box = [work()]
        except (ValueError, OSError) as e:
            box = [e]
    if world()[1] > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def my_rows():
    """The rows of every batch that this process computes: all draw the whole batch from one seed."""
    rank, processes = world()
    return slice(rank, None, processes)


def rows_of_all(mine, n):
    """This process's rows of a tensor of n, on its device -> the rows of all processes, in their order."""
    whole = mine.new_zeros(n, *mine.shape[1:])
    whole[my_rows()] = mine
    if world()[1] > 1:
        dist.all_reduce(whole)                       # each row is 0 in all processes but one
    return whole


def same_start(model):
    """Process 0's tensors for all: what each GPU computes alone, as in calibration, can differ in the last bit."""
    for v in [*model.parameters(), *model.buffers()] if world()[1] > 1 else ():
        dist.broadcast(whole := v.detach().contiguous(), 0)
        v.data.copy_(whole)


def mean_over_processes(value):
    """A tensor on the model's device -> its mean over all processes, detached."""
    value = value.detach()
    if world()[1] > 1:
        dist.all_reduce(value := value / world()[1])
    return value


# ---------------------------------------------------------------- a run: its folder, its state, its loop

SAVE_SECONDS, LOG_STEPS = 60, 50
FILES = ("last.pt", "model.pt", "metrics.json", "curve.json", "loss.png", "samples.png")


def seed_step(seed, step):
    """Make all randomness of a step (batch, times, noise, dropout) depend on (seed, step): resuming needs no more."""
    torch.manual_seed(1_000_003 * seed + step)       # processes draw alike: dropout is the same in row k of each share


@contextlib.contextmanager
def run_folder(out, name, resume):
    """The folder of a run: `out`, or a new one called after `name`. One made here and still empty at the end goes.

    A run is never written over: ValueError where `out` holds one; FileNotFoundError without one to resume.
    """
    existed, locks = out is not None and Path(out).is_dir(), contextlib.ExitStack()
    with locks:
        folder = from_first(lambda: _open_folder(out, name, resume, locks))
        try:
            yield folder
        finally:
            if world()[0] == 0:
                locks.close()                        # Windows removes no open file
                (folder / ".lock").unlink(missing_ok=True)
                if not existed and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def lock(folder):
    """A file that stays open and locked while a run works in a folder, and is free again however it ends."""
    lock = open(folder / ".lock", "w")
    try:
        import fcntl                                 # not on Windows
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"{folder} is in use by another run; choose another --out") from None
    except (ImportError, OSError):                   # a file system without locks
        pass
    return lock


def _open_folder(out, name, resume, locks):
    folder = Path(out or Path("runs") / name)
    if resume:
        folder = folder if out else _latest(folder)
        if not (folder / "last.pt").is_file():
            raise FileNotFoundError(f"nothing to resume in {folder}: it has no last.pt")
        locks.enter_context(lock(folder))
        for part in [p for name in FILES for p in folder.glob(f"{name}.????????.tmp")]:    # a save cut off
            part.unlink()
        return folder
    if out and any((folder / f).exists() for f in FILES if f != "curve.json"):   # that alone: a first save that failed
        raise ValueError(f"{folder} already holds a run: go on with --resume, or choose another --out")
    try:
        if out:
            folder.mkdir(parents=True, exist_ok=True)
        while not out:                               # of two runs that start together only one can make the folder
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                others = (folder.with_name(f"{name}-{i}") for i in range(2, 10_000))
                folder = next(p for p in others if not p.exists())
        locks.enter_context(lock(folder))
    except OSError as e:
        raise ValueError(f"cannot write to {folder}: {e.strerror}") from None
    return folder


def _latest(folder):
    """Of NAME, NAME-2, .. the one that was written last."""
    states = [p for p in folder.parent.glob(f"{folder.name}*/last.pt")
              if re.fullmatch(rf"{folder.name}(-\d+)?", p.parent.name)]
    return max(states, key=lambda p: p.stat().st_mtime, default=folder / "last.pt").parent


@dataclasses.dataclass
class Run:
    """What a training must remember. `settings` must be equal for it to go on; `curve` are measurements on the way."""
    out: Path
    settings: dict
    resume: bool = False
    argv: list = None                                # of main(), where it was called from Python
    losses: list = dataclasses.field(default_factory=list)
    curve: list = dataclasses.field(default_factory=list)
    began: float = dataclasses.field(default_factory=time.time)

    def __post_init__(self):
        self.state = read_checkpoint(self.out / "last.pt", kind=("training",)) if self.resume else None
        if self.state is None:
            return
        old = self.state.get("settings")
        if not isinstance(old, dict):
            raise ValueError(f"{self.out / 'last.pt'} is not the state of a run")
        wrong = [f"--{k.replace('_', '-')} {v} (was {old.get(k)})" for k, v in self.settings.items() if old.get(k) != v]
        if wrong:
            raise ValueError(f"{self.out / 'last.pt'} was made with other settings: {', '.join(wrong)}")

    def restore(self, **parts):
        """Fill the parts (all that have a state_dict) from last.pt, where this run goes on."""
        self.parts = parts
        if self.state is None:
            return
        try:
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
                if isinstance(part, torch.optim.Optimizer):
                    check_optimizer(part)
            self.losses, self.curve = list(self.state["losses"]), list(self.state["curve"])
            if not np.isfinite(self.losses).all() or len(self.losses) > self.settings["steps"]:
                raise ValueError(f"{len(self.losses)} losses of {self.settings['steps']} steps, or some not finite")
            self.began -= float(self.state["seconds"])
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"{self.out / 'last.pt'} does not fit this run: {one_line(e)}") from None
        self.state = None
        print(f"resumed {self.out / 'last.pt'} at step {len(self.losses)}", flush=True)

    def save(self):
        if world()[0] == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            save_checkpoint(self.out / "last.pt", kind="training", settings=self.settings, losses=list(self.losses),
                            curve=list(self.curve), seconds=self.seconds(), **states)

    def seconds(self):
        return time.time() - self.began

    def follow(self, updates):
        """Consume a generator of (loss, gradient norm), one a step: print, save every minute, stop at the first NaN.

        Values stay on the device between prints: to read one makes the host wait for the GPU. FloatingPointError names
        the step; the last save stays. Ctrl-C and a polite kill finish the step, save, and exit with code 130.
        """
        steps, batch, pending = self.settings["steps"], self.settings["batch"], []
        logged, worked, saved_step = time.time(), time.process_time(), len(self.losses)
        saved = logged
        with stop_politely() as stop:
            for i, pair in enumerate(updates, start=saved_step + 1):
                pending.append(pair)
                if i == saved_step + 3 and pair[0].device.type == "cpu":
                    note_busy_cores((time.process_time() - worked) / (time.time() - logged))
                due, stopping = agree(time.time() - saved > SAVE_SECONDS, bool(stop), i, pair[0].device)
                due = due or stopping or i == steps
                if due or i % LOG_STEPS == 0:
                    rate = len(pending) / (time.time() - logged)             # since the last line: no compile time
                    self.take(pending, saved_step)
                    logged, loss = time.time(), np.mean(self.losses[-LOG_STEPS:])
                    print(f"step {i}/{steps}  loss {loss:.5f}  {rate * batch:.1f} images/s  "
                          f"{(steps - i) / rate:.0f} s left", flush=True)
                if due:
                    self.save()
                    saved, saved_step = time.time(), i
                if stopping and i < steps:
                    print(f"stopped after step {i}; go on with --resume", flush=True)
                    sys.exit(130)

    def take(self, pending, saved_step):
        """Move (loss, norm) pairs from the device to self.losses; FloatingPointError at one that is not finite."""
        for loss, norm in torch.stack([torch.stack(pair) for pair in pending]).float().tolist():
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
                raise FloatingPointError(f"loss or gradient is not finite at step {len(self.losses) + 1}; {kept}; "
                                         "try a lower --lr")
            self.losses.append(loss)
        pending.clear()

    def measure(self, updates, every, measured):
        """The same updates; measured(step) -> a row of `curve` after each `every` and the last, before it is saved."""
        for step, pair in enumerate(updates, start=len(self.losses) + 1):
            last = step == self.settings["steps"]
            if (step % every == 0 or last) and torch.stack(pair).isfinite().all():           # NaN: follow stops there
                self.curve.append({"step": step, **measured(step)})
                if world()[0] == 0:
                    write_json(self.out / "curve.json", self.curve)
            yield pair

    def finish(self, device, **more):
        """metrics.json. A long run's losses are kept as at most 1,000 means, each of so many updates."""
        each = math.ceil(len(self.losses) / 1000)
        kept = [round(float(np.mean(self.losses[i:i + each])), 6) for i in range(0, len(self.losses), each)]
        peak = round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if device.type == "cuda" else None
        write_json(self.out / "metrics.json", {
            **provenance(self.settings, device, self.seconds(), self.argv), "processes": world()[1], "peak_gib": peak,
            **more, "curve": self.curve, "updates_per_loss": each, "losses": kept if each > 1 else self.losses})
        size = os.path.getsize(self.out / "model.pt") / 1e6
        print(f"wrote {self.out}/model.pt ({size:.2f} MB), metrics.json, loss.png, samples.png; {self.seconds():.0f} s"
              f"{f', at most {peak:.1f} GiB' if peak else ''}", flush=True)


def check_optimizer(optimizer):
    """ValueError where a loaded state has tensors of another shape than its parameters: a fused step would crash."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, v in optimizer.state[p].items():
                if name != "step" and (v.shape != p.shape or v.dtype != p.dtype):
                    raise ValueError(f"the optimizer's {name} is {(*v.shape,)} where the parameter is {(*p.shape,)}")


def agree(due, stopping, step, device):
    """Clocks and signals differ between processes, and all must decide alike: they ask, now and then."""
    if world()[1] == 1:
        return due, stopping
    if step % LOG_STEPS:
        return False, False
    wishes = torch.tensor([due, stopping], dtype=torch.float32, device=device)
    return tuple(bool(v) for v in mean_over_processes(wishes))


def note_busy_cores(used):
    """Say once where other programs hold the cores: threads that wait for each other can be slower than one alone."""
    if (threads := torch.get_num_threads()) > 1 and used < 0.6 * threads:
        print(f"note: {used:.1f} of {threads} threads get to work; on busy cores try OMP_NUM_THREADS=1", flush=True)


@contextlib.contextmanager
def stop_politely():
    """A list that Ctrl-C, a polite kill or a hang-up fills: looked at between steps, so that none is half done."""
    stop = []
    main_thread = threading.current_thread() is threading.main_thread()      # elsewhere Python refuses to set handlers
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)           # a closed ssh session; Windows has none
    signals = (signal.SIGINT, signal.SIGTERM, hangup) if main_thread else ()
    signals = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]      # nohup ignores hang-ups
    old = {s: signal.signal(s, lambda *_: stop.append(True)) for s in signals}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------- command lines

def pick_device(name=None):
    """A torch.device: the one named, else cuda, mps or cpu, the first that exists. ValueError names the choices."""
    have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name is None:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if kind in have))
    if name.split(":")[0] not in have:
        raise ValueError(f"--device {name} is not here; choose from {', '.join(have)}")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)            # Triton and CUDA graphs work on the current device
        return device
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; choose from {', '.join(have)}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists all options)\n")


def new_parser(doc):
    """An ArgumentParser for a program with this docstring: errors of one line, and no option that is cut short."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def number(low=-math.inf, high=math.inf):
    """An argparse type: a finite number from low to high."""
    def number(text):
        if not (math.isfinite(value := float(text)) and low <= value <= high):
            which = f"from {low:g} to {high:g}" if high < math.inf else f"from {low:g} on, and finite"
            raise argparse.ArgumentTypeError(f"{text} is not a number {which}")
        return value
    return number


def positive(text):
    """argparse type: an integer from 1 up to 2^31 - 1."""
    if not text.lstrip("+-").isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number below {2**31}")
    return int(text)


def natural(text):
    """argparse type: an integer from 0 up to 2^31 - 1."""
    if not text.isdigit() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to {2**31 - 1}")
    return int(text)


# CUDA, mps, cuBLAS and cuDNN, Linux, Windows. (A GPU's has a type of its own, one of several, all RuntimeErrors.)
NO_MEMORY = re.compile("out of memory|allocate memory|ALLOC_FAILED|not enough memory|bad_alloc|paging file", re.I)


def run_cli(main):
    """Run a program: what the user can mend is one line on stderr and exit code 2; Ctrl-C is code 130."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        line = next(filter(str.strip, str(e).splitlines()), type(e).__name__)
        if isinstance(e, MemoryError) or NO_MEMORY.search(str(e)):
            line = f"out of memory, try a smaller --batch ({line})"
        elif isinstance(e, RuntimeError):
            raise                                    # a fault of ours: with its traceback, please
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def relative(path):
    """A path as seen from here; as it is where there is no way, as between drives of Windows."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def provenance(settings, device, seconds, argv=None):
    """What a number needs beside it to be believed: command, settings, versions, hardware, date, seconds.

    argv: what main() was called with from Python, None on the command line.
    """
    threads, processes = f"{device.type}, {torch.get_num_threads()} threads", os.environ.get("LOCAL_WORLD_SIZE")
    launcher = "python" if processes is None else f"torchrun --nproc_per_node={processes}"

    def from_here(v):
        if isinstance(v, (list, tuple)):
            return [from_here(w) for w in v]
        return relative(v) if isinstance(v, (str, Path)) and os.path.isabs(v) else v
    plain, words = {k: from_here(v) for k, v in settings.items()}, from_here(sys.argv[1:] if argv is None else argv)
    command = f"main({words})" if argv is not None else " ".join([launcher, relative(sys.argv[0]), *words])
    return {"command": command, "settings": plain,
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
            "torch": torch.__version__, "python": sys.version.split()[0],
            "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds, 1)}


def report_table(rows):
    """The rows of hqdm.quantize_network as text with totals; float modules, which are many, as one line a kind."""
    lines = [f"{'layer':26s} {'kind':8s} {'W':>2s} {'A':>2s} {'rotation':8s} {'grid':10s} "
             f"{'block':>5s} {'|sum| <':>11s} {'bytes':>9s}  note"]
    alike = {}
    for r in rows:
        if r["wbits"] == 32:
            alike.setdefault((r["kind"], r["note"]), []).append(r["bytes"])
            continue
        lines.append(f"{r['layer']:26s} {r['kind']:8s} {r['wbits']:2d} {r['abits']:2d} {r['rotation']:8s} "
                     f"{r['grid']:10s} {r['block']:5d} {r['accumulator_bound']:11,d} {r['bytes']:9,d}  "
                     f"{r['note']}".rstrip())
    lines += [f"{len(sizes)} x {kind}: {sum(sizes):,d} bytes, {note}" for (kind, note), sizes in alike.items()]
    old, new = (sum(r[key] for r in rows) for key in ("float_bytes", "bytes"))
    lines.append("products of two activations, as in attention (q k^T), are no layers: they stay in float")
    lines.append(f"total {old:,d} bytes in float32, {new:,d} packed: {old / new:.1f} times smaller")
    return "\n".join(lines)
