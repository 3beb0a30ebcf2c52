"""How fast each part is, against what it competes with, on the device at hand.

    python experiments/bench.py                    # everything but the commands: bench.json, a table
    python experiments/bench.py hadamard sampling  # these parts only; of the others bench.json keeps what it has
    python experiments/bench.py commands           # a CPU: seconds of `make test`, the notebook and the short training

hadamard   the transform: recursion, ours, dense C x C (what the authors' training code does), a copy as the limit
growth     its cost against n = 2 .. 4096
update     one quantized training update against one of the float model: same batch, device and code; its targets, which
           the teacher computes for each update, are there beforehand, and what they take is the row `carousel`
sampling   pictures a second: float, fake-quantized, integer in both views
training   images a second of the float training; other libraries where they are installed
scaling    the same by torchrun on 1, 2 and 4 GPUs
commands   what a user waits for

Competitors take turns within one loop, so that a slow moment hits all of them; reported is the median and the middle
half. Times are of warm code: compiling and the first rounds are left out.
"""
import contextlib
import copy
import functools
import gc
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
import train  # noqa: E402
from plumbing.kernels import on_triton  # noqa: E402
from plumbing.runs import adamw, autocast, new_parser, pick_device, provenance, run_cli, write_json  # noqa: E402
from sample import CHECKPOINTS, draw, load_model  # noqa: E402
from unet import UNet, add_noise, ddim_timesteps  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMESTEPS = tuple(ddim_timesteps(10).tolist())


# ---------------------------------------------------------------- measuring

def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def compare(runs, device, seconds=2.0, warm=2, least=5):
    """{name: function} -> {name: {"ms", "low", "high", "n"}}: the functions take turns; median and quartiles of each.

    On CUDA its events measure; a gigabyte of zeros goes before each run, so that no cache helps and no launch is waited
    for.
    """
    times = {name: [] for name in runs}
    cuda = device.type == "cuda"
    scratch = torch.empty(2**30, dtype=torch.uint8, device=device) if cuda else None
    for run in list(runs.values()) * warm:
        run()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds * len(runs) or len(next(iter(times.values()))) < least:
        for name, run in runs.items():
            synchronize(device)
            if cuda:
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                scratch.zero_()
                events[0].record()
                run()
                events[1].record()
                synchronize(device)
                times[name].append(events[0].elapsed_time(events[1]))
            else:
                start = time.perf_counter()
                run()
                synchronize(device)
                times[name].append(1e3 * (time.perf_counter() - start))
    quartiles = {name: np.percentile(t, (25, 50, 75)).round(4).tolist() for name, t in times.items()}
    return {name: dict(zip(("low", "ms", "high"), q), n=len(times[name])) for name, q in quartiles.items()}


# ---------------------------------------------------------------- the transform

def recursion(x, block=32):
    """The definition, block by block along the channels."""
    return hqdm.fwht(x.movedim(1, -1).unflatten(-1, (-1, block))).flatten(-2).movedim(-1, 1)


def there_and_back(x, s):
    """H x on a 3-bit grid and H back, as a layer would in values. On Triton with int8 in between, as in view A."""
    if on_triton(x):
        last = x.movedim(1, -1)                      # of NCHW the kernel makes a copy with its channels last
        q = hqdm.rotate_and_quantize(last, s, None, hqdm.make_grid(3, "midtread"), 32, torch.int8)
        return hqdm.walsh(q, -1, 32, 32**-0.5, x.dtype).movedim(-1, 1)
    s = s.to(x.dtype).view(-1, 1, 1, 1)
    return hqdm.hadamard(hqdm.quantize(hqdm.hadamard(x), s, None, hqdm.make_grid(3, "midtread")))


def hadamard(device, quick):
    """Rows of part `hadamard`: milliseconds and the share of a copy's bandwidth, for two shapes, dtypes and layouts."""
    rows = []
    for shape in ((128, 128, 32, 32), (128, 256, 16, 16)):
        shape = (4, *shape[1:]) if quick else shape
        dense = torch.block_diag(*[hqdm.hadamard_matrix(32)] * (shape[1] // 32)).to(device) / 32**0.5
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("channels_last", "NCHW"):
                x = torch.randn(shape, device=device).to(dtype)
                x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
                out, matrix, s = torch.empty_like(x), dense.to(dtype), torch.full((shape[0],), 0.5, device=device)
                runs = {"copy": lambda: out.copy_(x), "ours": lambda: hqdm.hadamard(x),
                        "recursion": lambda: recursion(x),
                        "dense C x C": lambda: torch.einsum("oc,bchw->bohw", matrix, x),
                        "ours, quantize, ours": lambda: there_and_back(x, s)}
                where, missing = {"shape": shape, "dtype": str(dtype)[6:], "layout": layout}, []
                try:
                    if device.type != "cuda":
                        raise ImportError("a CUDA extension")
                    from fast_hadamard_transform import hadamard_transform
                    last = x.movedim(1, -1).contiguous().unflatten(-1, (-1, 32))
                    runs["fast-hadamard-transform (channels last)"] = lambda: hadamard_transform(last, 32**-0.5)
                except ImportError:
                    missing = ["fast-hadamard-transform"]
                with torch.no_grad(), hqdm.full_float32(device):         # no TF32 for any of them: see the error column
                    times = compare(runs, device, seconds=0.3 if quick else 0.1)
                    exact = recursion(x.double().cpu())
                    for name, t in times.items():
                        error = None
                        if name in ("ours", "recursion", "dense C x C"):
                            error = float(((runs[name]().double().cpu() - exact).norm() / exact.norm()))
                        rows.append({"what": name, **where, **t, "of_copy": round(times["copy"]["ms"] / t["ms"], 3),
                                     "error": error})
                rows += [{"what": name, **where, "ms": None, "note": "not installed"} for name in missing]
    ours, there = (next(r for r in rows if r["what"] == what) for what in ("ours", "ours, quantize, ours"))
    return rows, {"hadamard_fraction_of_copy": ours["of_copy"], "hadamard_error": ours["error"],
                  "there_and_back_in_copies": round(1 / there["of_copy"], 2)}


def growth(device, quick):
    """Rows of part `growth`: milliseconds for 2^20 (2^23 on a GPU) numbers in vectors of n, n = 2 .. 4096."""
    rows = []
    for n in (2**i for i in range(1, 13)):
        x = torch.randn((2**20 if quick else 2**23) // n, n, device=device)
        matrix = hqdm.hadamard_matrix(n, device)

        def fast():
            if n <= 64:
                return hqdm.hadamard(x, 1, n)
            return hqdm.hadamard(hqdm.fwht(x.unflatten(1, (-1, 64)).mT).mT.flatten(1), 1, 64)

        runs = {"naive, n^2": lambda: x @ matrix / n**0.5, "recursive, n log n": lambda: hqdm.fwht(x),
                "matrix blocks up to 64": fast}
        with torch.no_grad(), hqdm.full_float32(device):
            torch.testing.assert_close(fast(), hqdm.fwht(x), rtol=1e-4, atol=1e-4)
            times = compare(runs, device, 0.1 if quick else 0.03)
        rows += [{"what": name, "length": n, **t} for name, t in times.items()]        # n of t: how often it was timed
    return rows, {}


# ---------------------------------------------------------------- training

@contextlib.contextmanager
def authors_way():
    """The layer as the authors' training code computes it, from its description: dense matrices, values on the grid."""
    def forward(self, x):                            # x (B, .., C_in): HQConv2d's forward is around this one
        if self.scheme.rotation != "single":
            return plain(self, x)
        k = self.scheme.block
        if not hasattr(self, "dense"):
            self.dense = torch.block_diag(*[hqdm.hadamard_matrix(k, x.device)] * (x.shape[-1] // k)) / k**0.5

        def rotate(v):
            return torch.einsum("oc,bhwc->bhwo", self.dense, v) if v.ndim == 4 else v @ self.dense

        s = hqdm.at_step(self.activations.log_s_x.exp(), len(x)).view(-1, *[1] * (x.ndim - 1))
        x_hat = rotate(s * hqdm.quantize(rotate(x), s, None, self.activations.grid))
        q_w, s_w = self.weights()
        w_hat = (s_w * q_w.flatten(1)).view(self.weights.shape)
        return self.multiply(x_hat, w_hat) + self.bias

    plain, hqdm.HQLayer.forward = hqdm.HQLayer.forward, forward
    try:
        yield
    finally:
        hqdm.HQLayer.forward = plain


def distillation(teacher, walks, batches, rotation=None):
    """A function that does one distillation update: of a float copy (rotation None), or of a quantized student."""
    if rotation is None:
        student = copy.deepcopy(teacher).requires_grad_(True)
        groups = [{"params": list(student.parameters()), "lr": 1e-6}]
    else:
        student = train.quantized_copy(teacher, hqdm.Scheme(4, 3, rotation, timesteps=TIMESTEPS), walks)
        groups = train.parameter_groups(student)
    optimizer = adamw(groups, next(teacher.parameters()).device)
    updates = train.distil(student, optimizer, itertools.cycle(batches), 10**9)
    return lambda: next(updates)


def prepare(make, device, calls=5):
    """(make(), GiB of GPU memory that it and its first calls took at most; None without a GPU)."""
    if device.type != "cuda":
        return make(), None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = make()
    for _ in range(calls):                           # recording happens in the second
        run()
    torch.cuda.synchronize()
    return run, round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def update(device, quick):
    """Rows of part `update`: milliseconds of an update, its ratio to the float32 update of the same batch, peak memory.

    All updates take their batches in turn from the same few, made beforehand; row `carousel` is the making of one.
    """
    teacher = load_model(CHECKPOINTS / "teacher.pt", device).requires_grad_(False)
    walks, rows, figures = train.trajectories(teacher, 8, len(TIMESTEPS), seed=1), [], {}

    def inside(context, run):
        def wrapped():
            with context():
                run()
        return wrapped

    for batch in ((4, 16) if quick else (128, 512)):
        carousel = train.Carousel(teacher, (2 if quick else 16) * batch, TIMESTEPS, seed=1)
        batches = list(carousel.batches(batch, 8 if quick else 64, seed=0))
        one = functools.partial(distillation, teacher, walks, batches)       # of a float copy, or of the rotation given
        plain, plain_memory = prepare(one, device)
        made = {rotation: functools.partial(one, rotation) for rotation in hqdm.ROTATIONS}
        made["single, the authors' way"] = lambda: inside(authors_way, one("single"))
        if device.type == "cuda":
            made["float, bf16"] = lambda: inside(lambda: autocast(device), one())
        made["carousel"] = lambda: functools.partial(next, carousel.batches(batch, 10**9, seed=1))
        # A GPU has memory for two: float against one other at a time. A CPU drifts more than they differ: all in turn.
        sets = [[name] for name in made] if device.type == "cuda" else [list(made)]
        for names in sets:
            prepared = {name: prepare(made[name], device) for name in names}
            runs = {"float": plain, **{name: run for name, (run, _) in prepared.items()}}
            memory = {"float": plain_memory, **{name: gib for name, (_, gib) in prepared.items()}}
            times = compare(runs, device, seconds=10 if quick else 1.5)
            for what in times if names[0] == "none" else names:
                ratio = round(times[what]["ms"] / times["float"]["ms"], 3)
                rows.append({"what": what, "batch": batch, **times[what], "of_float": ratio, "peak_gib": memory[what]})
            del prepared, runs
        ratios = [r["of_float"] for r in rows if r["batch"] == batch and r["what"] in hqdm.ROTATIONS]
        figures[f"qat_update_ratio_b{batch}"] = max(ratios)
        del plain, one, made, carousel, batches
    return rows, figures


def libraries(size=32):
    """{name: (model, call)} of other libraries' UNets with about our 9 M parameters; missing ones map to None."""
    found = {}
    try:
        from denoising_diffusion_pytorch import Unet
        found["denoising-diffusion-pytorch"] = (Unet(dim=72, dim_mults=(1, 2, 2, 2)), lambda m, x, t: m(x, t))
    except ImportError:
        found["denoising-diffusion-pytorch"] = None
    try:
        from diffusers import UNet2DModel
        model = UNet2DModel(
            size, block_out_channels=(64, 128, 128, 128), layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
        found["diffusers UNet2DModel"] = (model, lambda m, x, t: m(x, t).sample)
    except ImportError:
        found["diffusers UNet2DModel"] = None
    return found


def training(device, quick):
    """Rows of part `training`: images a second of the float teacher's training; the others get a plain loop, in bf16.

    Ours is compiled and recorded, as train.py runs it on a GPU. The others are measured as they come, and compiled.
    """
    images, labels = (v.to(device) for v in train.load_bundled())
    batch, runs, parameters = (8 if quick else 512), {}, {}

    def ours(batch):
        torch.compiler.reset()
        model = UNet().to(device, memory_format=torch.channels_last)
        parameters["ours"] = parameters[f"ours, batch {2 * batch}"] = sum(p.numel() for p in model.parameters())
        optimizer = adamw([{"params": list(model.parameters()), "lr": 1e-6}], device)
        steps = train.teacher_updates(model, copy.deepcopy(model), optimizer, images, labels, 10**9, batch, seed=0)
        return lambda: next(steps)

    def other(net, call):
        adam = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=device.type in ("cuda", "cpu"))

        def step():
            x = images[torch.randint(len(images), (batch,), device=device)].float() / 127.5 - 1
            t, eps = torch.randint(1000, (batch,), device=device), torch.randn_like(x)
            with autocast(device):
                loss = F.mse_loss(call(net, add_noise(x, t, eps), t).float(), eps)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
        return step

    runs["ours"], missing = ours(batch), []
    for name, entry in libraries().items():
        if entry is None:
            missing.append({"what": name, "batch": batch, "images_per_s": None, "note": "not installed"})
            continue
        net, call = entry[0].to(device), entry[1]
        runs[name] = other(net, call)
        if device.type == "cuda":
            runs[f"{name}, compiled"] = other(torch.compile(net), call)
        parameters[name] = parameters[f"{name}, compiled"] = sum(p.numel() for p in net.parameters())
    times = compare(runs, device, seconds=3, warm=5)
    if device.type == "cuda":                        # a larger batch, after the others: only to see whether it pays
        times.update(compare({f"ours, batch {2 * batch}": ours(2 * batch)}, device, seconds=3, warm=5))
    sizes = {name: 2 * batch if "batch" in name else batch for name in times}
    rows = [{"what": name, "batch": sizes[name], "parameters": parameters[name], **t,
             "images_per_s": round(1e3 * sizes[name] / t["ms"], 1)} for name, t in times.items()]
    rate = {r["what"]: r["images_per_s"] for r in rows}
    figures = {"float_images_per_s": rate["ours"]}
    for key, name in (("float_vs_ddpm_pytorch", "denoising-diffusion-pytorch"),
                      ("float_vs_diffusers", "diffusers UNet2DModel")):
        figures[key] = round(rate["ours"] / rate[name], 2) if name in rate else None
    return rows + missing, figures


def scaling(device, quick):
    """Rows of part `scaling`: images a second of `torchrun train.py` on 1, 2 and 4 GPUs, 512 images each."""
    have, rows = torch.cuda.device_count() if device.type == "cuda" else 0, []
    for n in (1, 2, 4):
        row = {"what": f"{n} GPUs", "batch": 512 * n, "images_per_s": None}
        if n <= have:
            out = str(ROOT / "runs" / f"bench-{n}-{int(time.time())}")
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "train.py",
                       "--steps", "2000", "--batch", str(512 * n), "--out", out]
            text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            rates = [float(v) for v in re.findall(r"([\d.]+) images/s", text)]
            row["images_per_s"] = float(np.median(rates[2:]))                # after the start
        else:
            row["note"] = f"not measured: {have} GPUs here"
        rows.append(row)
    one, two, four = (r["images_per_s"] for r in rows)
    return rows, {f"ddp_speedup_{n}": round(rate / one, 2) if rate else None for n, rate in ((2, two), (4, four))}


# ---------------------------------------------------------------- drawing

class Compiled(torch.nn.Module):
    """What one would take instead of integers: a float network, compiled, in bf16; draw records it, as all others."""

    def __init__(self, model):
        super().__init__()
        self.model, self.net, self.classes, self.config = model, torch.compile(model), model.classes, model.config

    def forward(self, x, t, y):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.net(x, t, y).float()


def sampling(device, quick):
    """Rows of part `sampling`: pictures a second at 50 DDIM steps, of the bundled float, none and single models.

    A GPU draws four batches; "alone": one, with the same start, of a step as written and one that is recorded.
    """
    n, batch, steps = (16, 16, 5) if quick else (2000, 500, 50)      # a step costs the same at each t: a CPU times 5
    runs, memory, counts = {}, {}, {}
    if device.type == "cuda":                        # what is reserved, without what earlier parts left
        few = load_model(CHECKPOINTS / "w4a3-single-midrise.pt", device)
        hqdm.set_integer(few)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        draw(few, 64, steps)
        memory = {"integer_64_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)}
    for name, file in (("teacher", "teacher"), ("w4a3-none", "w4a3-none"), ("w4a3-single", "w4a3-single-midrise")):
        for view in (None,) if name == "teacher" else (None, "A", "B"):
            model = load_model(CHECKPOINTS / f"{file}.pt", device)
            if view:
                hqdm.set_integer(model, True, view)
            kind = "float" if name == "teacher" else f"{name}, {'integer ' + view if view else 'fake'}"
            runs[kind] = lambda model=model: draw(model, n, steps)
            if device.type == "cuda" and kind in ("float", "w4a3-single, integer B"):
                runs[f"{kind}, alone"] = lambda model=model: draw(model, batch, steps)
                counts[f"{kind}, alone"] = batch
    if device.type == "cuda":
        half = Compiled(load_model(CHECKPOINTS / "teacher.pt", device))
        runs["float, bf16, compiled"] = lambda: draw(half, n, steps)
    times = compare(runs, device, seconds=6 if quick else 1, warm=1, least=3)
    rate = {name: 1e3 * counts.get(name, n) / t["ms"] * steps / 50 for name, t in times.items()}
    rows = [{"what": name, "batch": batch, "pictures": counts.get(name, n), **t, "images_per_s_50": round(rate[name], 3)}
            for name, t in times.items()]
    best = max(rate["w4a3-single, integer A"], rate["w4a3-single, integer B"])
    figures = {"integer_vs_float_sampling": best / rate["float"], **memory,
               "integer_vs_fake_sampling": best / rate["w4a3-single, fake"]}
    if device.type == "cuda":
        figures["integer_vs_float_alone"] = rate["w4a3-single, integer B, alone"] / rate["float, alone"]
        figures["integer_vs_bf16_sampling"] = best / rate["float, bf16, compiled"]
    return rows, {name: round(v, 3) for name, v in figures.items()}


# ---------------------------------------------------------------- what a user waits for

def commands(device, quick):
    """Rows of part `commands`: seconds of the README's commands, each run once in this environment."""
    notebook = [str(Path(sys.executable).with_name("jupyter")), "nbconvert", "--to", "notebook", "--execute",
                "--stdout", "notebooks/outliers.ipynb"]
    short, out = ["train.py", "--wbits", "4", "--abits", "3"], str(ROOT / "runs" / f"bench-{int(time.time())}")
    rows = []
    for name, command in (("tests", ["make", "test"]), ("notebook", notebook),
                          (" ".join(short), [sys.executable, *short, "--out", out])):
        start = time.perf_counter()
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            raise ValueError(f"{name} failed, so its seconds mean nothing: {' '.join(command)}")
        rows.append({"what": name, "seconds": round(time.perf_counter() - start, 1)})
    return rows, {f"seconds_{r['what'].split('.')[0]}": r["seconds"] for r in rows}


PARTS = {"hadamard": hadamard, "growth": growth, "update": update, "sampling": sampling, "training": training,
         "scaling": scaling, "commands": commands}


def short_name(device):
    """h200, h100, cpu2, mps: the key of this device in bench.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace("nvidia", "").split()[0]
    return f"cpu{torch.get_num_threads()}" if device.type == "cpu" else device.type


def table(rows):
    """The rows of one part as text: every column that any row has."""
    def text(v):
        return "" if v is None else f"{v:.3g}" if isinstance(v, float) and v < 100 else str(v)

    columns = list(dict.fromkeys(key for r in rows for key in r))
    cells = [columns] + [[text(r.get(c)) for c in columns] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all but commands)")
    parser.add_argument("--device")
    args = parser.parse_args()
    unknown = [p for p in args.parts if p not in PARTS]
    if unknown:
        raise ValueError(f"there is no part {unknown[0]}; choose from {', '.join(PARTS)}")
    device = pick_device(args.device)
    path, key = HERE / "bench.json", short_name(device)
    report = json.loads(path.read_text()) if path.exists() else {}
    entry = report.setdefault(key, {"figures": {}, "parts": {}, "provenance": {}})
    for part in args.parts or [p for p in PARTS if p != "commands"]:
        start = time.time()
        rows, figures = PARTS[part](device, quick=device.type == "cpu")
        print(f"\n{part} on {key}\n{table(rows)}\n{figures}", flush=True)
        entry["parts"][part] = rows
        entry["figures"].update(figures)
        entry["provenance"][part] = provenance(vars(args), device, time.time() - start)
        write_json(path, report)                                             # after each part: a kill loses one


if __name__ == "__main__":
    run_cli(main)
