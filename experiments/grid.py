"""The experiment: a declared grid of quantized models, a training each, all scored alike -> experiments/results.json.

    python experiments/grid.py tune headline                      # parts; rows that results.json has are left out
    CUDA_VISIBLE_DEVICES=1 python experiments/grid.py headline    # beside it on a second GPU: each takes what is left

tune      three kinds at W4A3: balance of the loss, rates, whose walks; on a seed that no other part has
headline  none, double, single, single midrise at W4A3 and W4A4, three seeds, equal updates
updates   none and single, both grids, at W4A3, one seed, after 1 to 4,000 updates instead
balance   none and single at W4A3 and W4A4, three seeds, at a balance of 0.5, where tune found none best
side      one seed each: blocks, rank, batch 32, bits, double on a midrise grid; models of 10, 20 (both walks) and 100 DDIM steps
paper     the paper's own recipe, whose baseline has zero points that are not searched; each recipe with the other's
spoil     no training: the float model draws the first k of 50 steps, W4A3 the others; and the other way round
clamp     no training: the float model and W4A3 with x_0 clamped to [-1, 1] at every step, as many samplers do, and not
cost      no scores: seconds and memory of train.py by batch; wants the GPU alone

Each training is the command that its row names, in runs/grid/NAME; a killed one goes on where it was. Scored are the
pictures (integer arithmetic in trainings, guidance 1, seed 0) of as many noises for all, against the float model's.
"""
import contextlib
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
import train  # noqa: E402
from plumbing.runs import (lock, new_parser, pick_device, positive, provenance, recorded, run_cli,  # noqa: E402
                           whole_file, write_json)
from rates import searched  # noqa: E402
from sample import (CHECKPOINTS, draw, load_judge, load_model, noise_and_labels, psnr, score,  # noqa: E402
                    to_uint8)
from sample import name_of as sample_name  # noqa: E402
import unet  # noqa: E402
from unet import ddim, ddim_timesteps  # noqa: E402

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs" / "grid"
TEACHER = CHECKPOINTS / "teacher.pt"

# ---------------------------------------------------------------- what is run

KINDS = {"none": dict(rotation="none"), "double": dict(rotation="double"), "single": dict(rotation="single"),
         "midrise": dict(rotation="single", grid="midrise")}
BITS = {"w4a3": dict(wbits=4, abits=3), "w4a4": dict(wbits=4, abits=4)}
EQUAL = dict(steps=1000, balance=0.75, walks="student")          # unless a row says otherwise: by walks.json
TUNED = 100                                          # the seed of tune
PICTURES = 10_000                                    # scored; of another number, -n, is said in a row's name
PARTS = ("tune", "headline", "balance", "updates", "side", "paper", "spoil", "clamp", "cost")
TRAININGS = ("tune", "headline", "balance", "updates", "side", "paper", "cost")
SAID = ("c_fid", "c_is", "psnr", "brightness", "contrast", "seconds", "peak_gib")         # of a row, when it is made
PAPER_RATES = {"lora": 1 / 2500, "s_w": 1e-6, "s_x": 5e-4, "z_x": 5e-4}


def rows_of(part):
    """The rows of a part: options of train.py; and "paper": with the paper's rates; "searched": False: with EfficientDM's
    zero points, for which both ends of a range shrink together.
    """
    w4a3, one = BITS["w4a3"], {**BITS["w4a3"], **EQUAL, "seed": 0}
    if part == "tune":
        tried = [*(dict(walks="student", balance=balance) for balance in (0.5, 0.75, 1.0)),
                 *(dict(walks="student", balance=0.75, lr=lr) for lr in (0.5, 2.0)), dict(walks="teacher", balance=0.5)]
        return [{**w4a3, **KINDS[kind], "steps": 1000, "seed": TUNED, **change}
                for change in tried for kind in ("none", "single", "midrise")]
    if part == "headline":
        return [{**bits, **kind, **EQUAL, "seed": seed}
                for seed in range(3) for bits in BITS.values() for kind in KINDS.values()]
    if part == "balance":
        return [{**bits, **KINDS[kind], **EQUAL, "balance": 0.5, "seed": seed}
                for seed in range(3) for bits in BITS.values() for kind in ("none", "single")]
    if part == "updates":
        return [{**one, **KINDS[kind], "steps": steps} for steps in (1, 100, 300, 4000) for kind in ("none", "single", "midrise")]
    if part == "cost":
        return [{**one, **KINDS["single"], "batch": batch} for batch in (128, 64, 32)]
    if part == "side":
        shapes = [{**one, **KINDS["single"], **{key: value}}
                  for key, value in (("block", 8), ("block", 16), ("block", 64), ("rank", 4), ("batch", 32))]
        bits = [{**one, **KINDS[kind], **change} for change in (dict(abits=2), dict(wbits=3))
                for kind in ("none", "single", "midrise")]
        times = [{**one, **KINDS[kind], "ddim_steps": n, "walks": walks} for n, walks in (
                     (10, "student"), (20, "student"), (100, "student"), (10, "teacher"), (20, "teacher"))
                 for kind in ("none", "single")]
        return [{**one, **KINDS["double"], "grid": "midrise"}, *shapes, *bits, *times]
    recipe = {**w4a3, "seed": 0, "order": "trajectory", "walks": "teacher", "batch": 2, "steps": 16_000, "balance": 0.0,
              "ddim_steps": 100, "paper": True, "searched": False}
    return [*({**recipe, **KINDS[kind]} for kind in ("none", "double", "single")),
            {**recipe, **KINDS["none"], "searched": True}, {**one, **KINDS["none"], "searched": False}]


def options_of(row):
    """A row as options of train.py."""
    options = {k: v for k, v in row.items() if k not in ("paper", "searched")}
    return [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def command_of(row):
    """What makes a row's model: train.py, which has neither the paper's rates nor its zero points, or this program."""
    return "python experiments/grid.py paper" if {"paper", "searched"} & row.keys() else " ".join(["python train.py", *options_of(row)])


def name_of(row):
    """What a row is called: w4a3-single-midrise-seed0, and what else it has that others do not."""
    if row.get("paper"):
        return f"paper-{row['rotation']}" + "-searched" * row.get("searched", False)
    main = train.run_name(row["wbits"], row["abits"], row["rotation"], row.get("grid"))
    plain = {"wbits", "abits", "rotation", "grid", *(EQUAL if EQUAL.items() <= row.items() and row["seed"] != TUNED else ())}
    return "-".join([main, *(f"{k}{v}" for k, v in row.items() if k not in plain)]).replace("_", "-")


# ---------------------------------------------------------------- running and scoring

def fine(mine, theirs, periods=8):
    """(power, error) of pictures at the scales of `periods` waves a side and more, as shares of the power of `theirs`.

    Power under 1 is blur, over 1 grain; error is what lies elsewhere or is missing.
    """
    waves = torch.fft.fftfreq(mine.shape[-1]) * mine.shape[-1]
    small = (waves[:, None].square() + waves.square()).sqrt() >= periods
    mine, theirs = (torch.fft.fft2(v.float())[..., small] for v in (mine, theirs))
    power, error = (float(v.abs().square().sum() / theirs.abs().square().sum()) for v in (mine, mine - theirs))
    return power, error


def md5(path):
    """The first digits of a file's MD5: which model was it?"""
    return hashlib.md5(Path(path).read_bytes()).hexdigest()[:8]


class Scorer:
    """Scores of n pictures of a model; the float model's, from the same noise, are drawn once and kept in runs/grid."""

    def __init__(self, teacher, n):
        device = next(teacher.parameters()).device
        self.teacher, self.n, self.judge = teacher, n, load_judge(device)

    def reference(self, steps):
        path = RUNS / f"float-{md5(TEACHER)}-{steps}-{self.n}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures, _ = draw(self.teacher, self.n, steps)
            with whole_file(path) as part, open(part, "wb") as f:
                np.save(f, pictures.numpy())
        return torch.from_numpy(np.load(path))

    def __call__(self, pictures, labels, steps):
        """The dict of sample.score, and: psnr; brightness, grey levels above the float model's; contrast, times its; fine."""
        reference = self.reference(steps)
        power, error = fine(pictures, reference)
        mine, theirs = pictures.double(), reference.double()
        return {"n": self.n, **score(pictures, labels, self.judge), "psnr": psnr(pictures, reference),
                "fine_power": power, "fine_error": error,
                "brightness": float(mine.mean() - theirs.mean()),
                "contrast": float(mine.std(dim=(1, 2, 3)).mean() / theirs.std(dim=(1, 2, 3)).mean())}

    def float_row(self, steps):
        pictures, (_, labels) = self.reference(steps), noise_and_labels(self.n, 0, self.teacher.classes)
        return {"wbits": 32, "abits": 32, "rotation": "none", "ddim_steps": steps,
                **self(pictures, labels, steps)}


def float_pictures(teacher, student, walks, n, seed):
    """train.untrained_pictures without untrained models: each would be calibrated once more."""
    return {"float": train.draw(teacher, n, len(student.hqdm.timesteps), seed=seed)[0]}


def run_row(row, device, score_of):
    """Train as the row says, unless that was done; draw, score: the row of results.json."""
    name = name_of(row)
    out, rates, untrained = RUNS / name, dict(train.RATES), train.untrained_pictures
    if not (out / "metrics.json").is_file():
        if not (out / "last.pt").is_file():          # killed before anything was kept
            shutil.rmtree(out, ignore_errors=True)
        argv = [*options_of(row), "--out", str(out), "--device", device.type]
        try:
            train.RATES.update(PAPER_RATES if row.get("paper") else {})
            train.untrained_pictures = float_pictures
            with searched(row.get("searched", True)):
                train.main([*argv, *["--resume"] * (out / "last.pt").is_file()])
        finally:
            train.RATES.update(rates)
            train.untrained_pictures = untrained
    run, model = json.loads((out / "metrics.json").read_text()), load_model(out / "model.pt", device)
    if device.type in ("cpu", "cuda"):
        hqdm.set_integer(model)                      # the same bytes, and faster
    steps = len(model.hqdm.timesteps)
    scores = score_of(*draw(model, score_of.n, steps), steps)
    settings = {k: run["settings"][k] for k in ("grid", "block", "rank", "order", "balance", "batch", "ddim_steps")}
    if row["rotation"] == "none":
        settings.update(grid="asymmetric", block=1)
    return {**settings, **row, **scores, "eps_error_untrained": run["eps_error_untrained"],
            "eps_error": run["eps_error"], "megabytes": sum(r["bytes"] for r in run["layers"]) / 1e6}


def cost_row(row, device):
    """Row of part cost: wall time of the command, from the bundled teacher to pictures, and the memory that it says."""
    out, began = RUNS / name_of(row) / "cost", time.time()
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, str(HERE.parent / "train.py"), *options_of(row), "--out", str(out), "--device",
                    str(device)], check=True, stdout=subprocess.DEVNULL)
    return {**row, "seconds": round(time.time() - began, 1),
            "peak_gib": json.loads((out / "metrics.json").read_text())["peak_gib"]}


def clamp_row(model, steps, score_of, clamp):
    """Row of part clamp: the scores of a model whose x_0 is kept within [-1, 1] at every step, or is not."""
    def clamped(x, eps, a_t, a_s, sigma=0.0):
        x_0 = ((x - (1 - a_t) ** 0.5 * eps) / a_t**0.5).clamp(-1, 1)
        return a_s**0.5 * x_0 + (1 - a_s - sigma**2) ** 0.5 * eps, x_0
    plain = unet.ddim_step
    try:
        unet.ddim_step = clamped if clamp else plain
        drawn = draw(model, score_of.n, steps)
    finally:
        unet.ddim_step = plain
    return {"ddim_steps": steps, **score_of(*drawn, steps)}      # by then the float model draws as always


@torch.no_grad()
def draw_in_turns(first, then, k, n, steps, batch=500):
    """draw(), but of two networks: `first` does the first k steps."""
    device = next(first.parameters()).device
    noise, labels = noise_and_labels(n, 0, first.classes)
    nets, pictures, early = [recorded(then, device), recorded(first, device)], [], ddim_timesteps(steps)[:k].tolist()

    def net(x, t, y):
        return nets[int(t[0]) in early](x, t, y)
    net.classes = first.classes
    for x, y in zip(noise.split(batch), labels.split(batch)):
        *_, (_, _, _, x_0) = ddim(net, x.to(device, memory_format=torch.channels_last), y.to(device), steps)
        pictures.append(to_uint8(x_0).cpu().contiguous())
    return torch.cat(pictures), labels


def spoil_row(model, k, float_first, score_of):
    """Row of part spoil: one network for the first k steps of the quantized model, the other one for the rest."""
    pair, steps = (score_of.teacher, model) if float_first else (model, score_of.teacher), len(model.hqdm.timesteps)
    return {"float_first": float_first, "k": k, "ddim_steps": steps,
            **score_of(*draw_in_turns(*pair, k, score_of.n, steps), steps)}


def jobs(part, checkpoint, device, score_of):
    """(name, function that makes it, what it is of) of each row of a part; call one before the next is asked for.

    What it is of: the training's command, or file and MD5 of a model that is there.
    """
    def of(path):
        return f"{sample_name(path)}.pt, md5 {md5(path)}"
    if part == "spoil":
        model, who = load_model(checkpoint, device, kind=("quantized",)), sample_name(checkpoint)
        for k, float_first in itertools.product((5, 10, 20, 30, 40, 45), (True, False)):
            name = f"{who}-{'float' if float_first else 'quantized'}-for-{k}"
            yield name, lambda: spoil_row(model, k, float_first, score_of), of(checkpoint)
    elif part == "clamp":
        for path, (clamp, word) in itertools.product((TEACHER, checkpoint), ((True, "clamped"), (False, "plain"))):
            yield f"{sample_name(path)}-{word}", lambda: clamp_row(load_model(path, device), 50, score_of, clamp), of(path)
    elif part == "cost":
        for row in rows_of(part):
            yield f"cost-batch{row['batch']}", lambda: cost_row(row, device), command_of(row)
    else:
        for steps in sorted({row.get("ddim_steps", 50) for row in rows_of(part)}):
            yield f"float-ddim-steps{steps}", lambda: score_of.float_row(steps), of(TEACHER)
        for row in rows_of(part):
            yield name_of(row), lambda: run_row(row, device, score_of), command_of(row)


# ---------------------------------------------------------------- the file

@contextlib.contextmanager
def taken(name):
    """Whether this process is to make the row: no other one is at it, until the end of the block, however that ends."""
    folder = RUNS / "taken" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder)
    except ValueError:
        yield False
        return
    with held:
        yield True


def keep(path, row):
    """Add a row to results.json."""
    write_json(RUNS / row["name"] / "row.json", row)
    write_json(path, {"rows": read(path)})


def read(path):
    """The rows of results.json, and those that other processes have put beside their runs meanwhile, by name."""
    rows = [json.loads(other.read_text()) for other in RUNS.glob("*/row.json")]
    rows += json.loads(Path(path).read_text())["rows"] if Path(path).is_file() else []
    rows = {row["name"]: row for row in rows}
    return [rows[name] for name in sorted(rows)]


def main():
    parser = new_parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("-n", type=positive, default=PICTURES, help="pictures a model (10,000)")
    parser.add_argument("--seconds", type=positive, default=10**9, help="begin no row later than this")
    parser.add_argument("--checkpoint", default=str(CHECKPOINTS / "w4a3-single-midrise.pt"), help="of parts spoil and clamp")
    parser.add_argument("--out", default=str(HERE / "results.json"))
    parser.add_argument("--device")
    args = parser.parse_args()
    device, began, there = pick_device(args.device), time.time(), 0
    score_of = Scorer(load_model(TEACHER, device), args.n)
    for part in args.parts:
        for name, make, command in jobs(part, args.checkpoint, device, score_of):
            with taken(name) as mine:                # else another process is at it
                name = name if args.n == PICTURES else f"{name}-n{args.n}"
                old = {r["name"]: r for r in read(args.out)}.get(name)
                if old and old.get("command") != command:
                    raise ValueError(f"{args.out} has {name} of `{old.get('command')}`; take it out first, in {RUNS}, too")
                there += bool(old)
                if old or not mine or time.time() - began > args.seconds:
                    continue
                if part in TRAININGS and device.type != "cuda":
                    raise ValueError(f"{name}: on {device.type} train.py has other batches and DDIM steps; part {part} wants a GPU")
                row, made = make(), provenance({}, device, 0)
                row = {"name": name, "part": part, "command": command, **row, **{k: made[k] for k in ("hardware", "torch", "date")}}
                keep(args.out, row)
            print(f"{time.time() - began:.0f} s: {name}: {({k: round(row[k], 3) for k in SAID if row.get(k)})}", flush=True)
    write_json(args.out, {"rows": read(args.out)})   # with what others made meanwhile
    print(f"{there} rows were in {args.out} or {RUNS} already, and were left as they are")


if __name__ == "__main__":
    run_cli(main)
