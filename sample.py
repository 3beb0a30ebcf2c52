"""Draw pictures from checkpoints, compare them from the same noise, and score them.

    python sample.py                                     # the bundled teacher beside the bundled W4A3 model: samples.png
    python sample.py runs/w4a3-single/model.pt -n 64     # one checkpoint of your own; it carries its own configuration
    python sample.py CKPT CKPT --class cat --guidance 2  # one class, classifier-free guidance
    python sample.py CKPT --integer                      # every quantized layer in integers: the same pictures, as bytes
    python sample.py CKPT CKPT --score -n 5000           # C-FID, C-IS, class accuracy, PSNR to the first checkpoint
    python sample.py CKPT --npz FILE -n 50000            # what the public FID tools read: uint8 (N, 32, 32, 3) in arr_0

The scores come from a small CIFAR-10 classifier of our own (experiments/judge.py), not from Inception: compare them
with each other, never with FID or IS of a paper. All noise is drawn on the CPU from --seed, image by image, so
picture i starts from the same noise on every device, at every batch size and for every checkpoint.
"""
import argparse
import gzip
import io
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange

import hqdm
from unet import UNet, ddim, ddim_timesteps

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
HERE = Path(__file__).resolve().parent
FORMAT = 1              # of our checkpoints; a file with a larger number comes from a newer version of this code


# ---------------------------------------------------------------- checkpoints: tensors and plain values, never code

def save_checkpoint(path, **content):
    """Write a checkpoint that is either whole or not there: to a temporary name first, then renamed (atomic on POSIX)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    # What gets bundled is compressed, a tenth smaller; a run's own state is not: it is written every minute.
    try:
        with (open if content["kind"] == "training" else gzip.open)(part, "wb") as f:
            torch.save({"format": FORMAT, **content}, f)
    except (RuntimeError, OSError) as e:            # a full disk, in torch's words or in the system's
        part.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {str(e).splitlines()[0]}") from None
    os.replace(part, path)


def read_checkpoint(path, kind=None):
    """The dictionary that save_checkpoint wrote, on the CPU.

    Raises FileNotFoundError without the file; ValueError where it is damaged, not ours, hides code (weights_only=True
    refuses to run it), comes from a newer format, or is of another kind than the one asked for.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    whole = Path(path).read_bytes()     # a file that may not be read is not damaged: its OSError passes
    try:
        whole = gzip.decompress(whole) if whole[:2] == b"\x1f\x8b" else whole
        if bad := zipfile.ZipFile(io.BytesIO(whole)).testzip():                  # torch reads past a flipped bit
            raise ValueError(f"{bad} has another checksum")
        ckpt = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as e:              # torch raises half a dozen types here (zip, pickle, key errors); all mean the same
        raise ValueError(f"{path} is damaged or holds more than tensors and plain values; nothing of it was run "
                         f"({type(e).__name__})") from None
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("format"), int) or "kind" not in ckpt:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if ckpt["format"] > FORMAT:
        raise ValueError(f"{path} has format {ckpt['format']}; this code reads up to {FORMAT}: update the code")
    if kind is not None and ckpt["kind"] not in kind:
        raise ValueError(f"{path} is a {ckpt['kind']!r} checkpoint, not {' or '.join(map(repr, kind))}")
    return ckpt


def load_model(path, device="cpu", kind=("float", "quantized")):
    """A checkpoint -> the network, in eval mode and float32, ready to draw; a quantized one comes packed (no LoRA).

    Raises ValueError where the tensors do not fit the configuration beside them, and as read_checkpoint does.
    """
    ckpt = read_checkpoint(path, kind)
    try:
        model = UNet(**ckpt["unet"])
        if ckpt["kind"] == "quantized":
            hqdm.quantize_unet(model, **ckpt["quant"], packed=True)
        model.load_state_dict(ckpt["model"])
        bad = next((name for name, v in model.state_dict().items() if v.is_floating_point() and not v.isfinite().all()), None)
        if bad:
            raise ValueError(f"{bad} holds values that are not finite")
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError, ArithmeticError, IndexError) as e:
        raise ValueError(f"{path} does not fit its own configuration: {str(e).splitlines()[0]}") from None
    return model.float().eval().to(device, memory_format=torch.channels_last)


# ---------------------------------------------------------------- drawing

def noise_and_labels(n, seed=0, classes=10, label=None):
    """(n, 3, 32, 32) normal noise and (n,) labels on the CPU; labels go 0 1 .. 9 0 1 .. unless one is given.

    The noise of picture i does not depend on n: the generator is read picture by picture.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(3, 32, 32, generator=generator) for _ in range(n)])
    labels = torch.arange(n) % classes if label is None else torch.full((n,), label)
    return noise, labels


def to_uint8(x):
    """Images in [-1, 1] -> uint8 0 .. 255, rounded to the nearest."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def recorded(f, device):
    """f(*tensors) -> tensor or tuple of tensors; on CUDA its many kernels become one launch, a CUDA graph.

    Our networks are launches by the thousand, and a host that starts them one by one leaves a fast GPU waiting: one
    quantized update took 168 ms, of which the GPU worked 43. The first three calls with each shape of the inputs run as
    written, the fourth is recorded, later ones are replayed. So f must do the same each time, on the GPU alone.
    """
    if torch.device(device).type != "cuda":
        return f
    calls, graphs, stream = {}, {}, torch.cuda.Stream(device)

    def call(*inputs):
        key = tuple(v.shape for v in inputs)
        calls[key] = calls.get(key, 0) + 1
        if calls[key] <= 3:                          # libraries choose their kernels now; not on the stream that everybody uses
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = f(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if key not in graphs:
            graph, held = torch.cuda.CUDAGraph(), [v.clone() for v in inputs]
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):        # a thread of torch.distributed may query its events meanwhile
                result = f(*held)
            graphs[key] = graph, held, result
        graph, held, result = graphs[key]
        for mine, v in zip(held, inputs):
            mine.copy_(v)
        graph.replay()
        return tuple(v.clone() for v in result) if isinstance(result, tuple) else result.clone()

    call.classes = getattr(f, "classes", None)       # ddim asks a network for it
    return call


def draw(model, n, steps=50, label=None, guidance=1.0, seed=0, batch=500, progress=None, rows=slice(None)):
    """n pictures: uint8 (n, 3, 32, 32) and their labels (n,), both on the CPU. Deterministic DDIM (eta = 0).

    rows: those of the n to draw, so that several processes can share them.
    progress: called after every step with how many pictures' worth of work is done. Raises FloatingPointError where a
    picture is not finite (an extreme guidance; a quantized model's integers can hide a NaN, which load_model and training refuse).
    """
    device = next(model.parameters()).device
    noise, labels = (v[rows] for v in noise_and_labels(n, seed, model.classes, label))
    pictures, net = [], recorded(model, device)
    for x, y in zip(noise.split(batch), labels.split(batch)):
        x = x.to(device, memory_format=torch.channels_last)
        for i, (_, _, _, x_0) in enumerate(ddim(net, x, y.to(device), steps, guidance), start=1):
            if progress:
                progress(sum(map(len, pictures)) + len(x) * i / steps)
        if not x_0.isfinite().all():
            raise FloatingPointError(f"the pictures are not finite at --steps {steps} --guidance {guidance:g}")
        pictures.append(to_uint8(x_0).cpu().contiguous())
    return torch.cat(pictures), labels


# ---------------------------------------------------------------- the judge and its scores

class Judge(nn.Module):
    """A CIFAR-10 classifier of 2.4 M parameters, trained by experiments/judge.py: nine layers, two residual blocks.

    forward: uint8 images (B, 3, 32, 32) -> logits (B, 10), features (B, 256).
    """

    def __init__(self):
        super().__init__()
        def conv(c_in, c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())
        self.stem = nn.Sequential(conv(3, 64), conv(64, 128), nn.MaxPool2d(2))           # (B, 128, 16, 16)
        self.res1 = nn.Sequential(conv(128, 128), conv(128, 128))
        self.mid = nn.Sequential(conv(128, 256), nn.MaxPool2d(2), conv(256, 256), nn.MaxPool2d(2))   # (B, 256, 4, 4)
        self.res2 = nn.Sequential(conv(256, 256), conv(256, 256))
        self.head = nn.Linear(256, 10)
        # Mean and covariance of the features of all 50,000 training images: what generated pictures are compared with.
        self.register_buffer("mean", torch.zeros(256))
        self.register_buffer("cov", torch.zeros(256, 256))

    def forward(self, images):
        x = images.float() / 127.5 - 1
        x = self.stem(x)
        x = x + self.res1(x)
        x = self.mid(x)
        x = x + self.res2(x)
        features = x.amax(dim=(2, 3))                                                    # (B, 256)
        return self.head(features), features


def load_judge(device="cpu", path=HERE / "checkpoints" / "judge.pt"):
    """The bundled judge, in eval mode. ValueError where the tensors do not fit, and as read_checkpoint raises it."""
    judge, ckpt = Judge(), read_checkpoint(path, kind=("judge",))
    try:
        judge.load_state_dict(ckpt["model"])
    except (RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} holds another network than the judge: {str(e).splitlines()[0]}") from None
    return judge.float().eval().to(device)


@torch.no_grad()
def judge_images(judge, images, batch=500):
    """uint8 (N, 3, 32, 32) -> log-probabilities (N, 10) and features (N, 256), float64 on the CPU."""
    device = next(judge.parameters()).device
    pairs = [judge(part.to(device)) for part in images.split(batch)]
    logits, features = (torch.cat(parts).cpu().double() for parts in zip(*pairs))
    return logits.log_softmax(dim=1), features


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    tr (C1 C2)^(1/2) = tr (S C2 S)^(1/2) with S = C1^(1/2): a symmetric matrix, whose eigenvalues are real.
    """
    def root(c):
        values, vectors = torch.linalg.eigh(c)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    s = root(cov1)
    cross = torch.linalg.eigvalsh(s @ cov2 @ s).clamp(min=0).sqrt().sum()
    return float(((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * cross)


def score(images, labels, judge=None):
    """C-FID, C-IS and class accuracy of pictures, by the bundled judge.

    images uint8 (N, 3, 32, 32), labels (N,). Returns a dict: c_fid (0 is best), c_is = exp(mean KL(p(y|x) || p(y)))
    (1 .. 10, Salimans et al. 2016, arXiv 1606.03498), accuracy: share that the judge sees as the class asked for,
    None where no class was. Raises ValueError for fewer than two pictures, which have no covariance.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} picture has no scores; they need two or more")
    judge = judge or load_judge()
    logp, features = judge_images(judge, images)
    p = logp.exp()
    kl = (p * (logp - p.mean(dim=0).log())).sum(dim=1).mean()
    c_fid = frechet_distance(features.mean(dim=0), features.T.cov(), judge.mean.cpu().double(), judge.cov.cpu().double())
    asked = labels < len(CLASSES)
    accuracy = float((logp.argmax(1) == labels)[asked].double().mean()) if asked.any() else None
    return {"c_fid": c_fid, "c_is": float(kl.exp()), "accuracy": accuracy}


def psnr(images, reference):
    """Mean over the pictures of 10 log10(255^2 / mse), in dB; equal pictures count 99 dB, so that a mean exists."""
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / mse)).clamp(max=99).mean())


# ---------------------------------------------------------------- pictures of pictures

def save_grids(path, grids, columns=16, zoom=2):
    """One titled block of pictures per entry of grids ({title: uint8 (n, 3, 32, 32)}) into one PNG, every pixel kept."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = math.ceil(max(map(len, grids.values())) / columns)
    width, height, title = columns * 32 * zoom, rows * 32 * zoom, 28
    total = len(grids) * (height + title)
    fig = plt.figure(figsize=(width / 100, total / 100), dpi=100)
    for i, (name, images) in enumerate(grids.items()):
        blank = torch.full((rows * columns - len(images), 3, 32, 32), 255, dtype=torch.uint8)
        grid = rearrange(torch.cat([images, blank]), "(r c) k h w -> (r h) (c w) k", c=columns).numpy()
        ax = fig.add_axes((0, 1 - (i + 1) * (height + title) / total, 1, height / total))
        ax.imshow(grid, interpolation="nearest", aspect="auto")
        ax.set_axis_off()
        fig.text(4 / width, 1 - (i * (height + title) + title * 0.75) / total, name, fontsize=10, parse_math=False)
    part = Path(path).with_name(Path(path).name + ".tmp")
    fig.savefig(part, format="png")
    plt.close(fig)
    os.replace(part, path)


# ---------------------------------------------------------------- the command line

def pick_device(name=None):
    """A torch.device: the one named, else cuda, mps or cpu, the first that exists. ValueError names the choices."""
    have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if "cuda" in have else "mps" if "mps" in have else "cpu")
    if name.split(":")[0] not in have:
        raise ValueError(f"--device {name} is not here; choose from {', '.join(have)}")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)            # Triton and CUDA graphs work on the current device
        return device
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; choose from {', '.join(have)}") from None


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


def run_cli(main):
    """Run a program: what the user can mend is one line on stderr and exit code 2; Ctrl-C is code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        # A GPU without memory has a type of its own (a RuntimeError), a CPU without it only says so: "can't allocate memory".
        if isinstance(e, RuntimeError) and not isinstance(e, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(e):
            raise                                    # a fault of ours: with its traceback, please
        print(f"error: {next(filter(str.strip, str(e).splitlines()), type(e).__name__)}", file=sys.stderr)
        sys.exit(2)


def provenance(args, device, seconds):
    """What a number needs beside it to be believed: command, settings, versions, hardware, date, seconds."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    settings = {k: os.path.relpath(v) if isinstance(v, str) and os.path.isabs(v) else v for k, v in vars(args).items()}
    launcher = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if "LOCAL_WORLD_SIZE" in os.environ else "python"
    return {"command": " ".join([launcher, os.path.relpath(sys.argv[0]), *sys.argv[1:]]), "settings": settings,
            "hardware": hardware, "torch": torch.__version__, "python": sys.version.split()[0],
            "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds, 1)}


def check_out(*paths):
    """ValueError where one of the files could not be written, to be called before the work; None is no file."""
    for path in filter(lambda name: name is not None, paths):
        if not path or not os.access(Path(path).resolve().parent, os.W_OK) or Path(path).is_dir():
            raise ValueError(f"cannot write {path}")


def write_json(path, report):
    """Like save_checkpoint: whole or not there, so that a kill loses nothing of what the file had."""
    part = Path(path).with_name(Path(path).name + ".tmp")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


def trained_steps(models):
    """{path: model} -> the DDIM steps that its quantized models were trained for, 50 where none is. ValueError where they differ."""
    steps = {str(path): len(model.clock.timesteps) for path, model in models.items() if hasattr(model, "clock")}
    if len(set(steps.values())) > 1:
        raise ValueError(f"trained for different numbers of steps ({', '.join(f'{p}: {s}' for p, s in steps.items())}); choose with --steps")
    return next(iter(steps.values()), 50)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT", help="default: the bundled teacher and W4A3 model")
    parser.add_argument("-n", type=positive, default=64, help="pictures from each checkpoint (64)")
    parser.add_argument("--steps", type=positive, help="DDIM steps (as many as the quantized model was trained for, else 50)")
    parser.add_argument("--class", dest="label", help=f"one class for all: {', '.join(CLASSES)}, or none")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is off (1)")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise (0)")
    parser.add_argument("--integer", action="store_true", help="run every quantized layer in integer arithmetic")
    parser.add_argument("--score", action="store_true", help="print C-FID, C-IS, class accuracy, PSNR; write them beside --out")
    parser.add_argument("--npz", metavar="FILE", help="write the pictures of the last checkpoint and their labels")
    parser.add_argument("--out", default="samples.png", help="the picture (samples.png)")
    parser.add_argument("--device", help="cpu, cuda or mps (the fastest one here)")
    args = parser.parse_args(argv)

    if args.label not in [None, *CLASSES, "none"]:
        raise ValueError(f"--class {args.label} does not exist; choose from {', '.join(CLASSES)}, none")
    if not math.isfinite(args.guidance) or args.guidance < 0:
        raise ValueError(f"--guidance {args.guidance} is not a number of 0 or more")
    if args.score and (args.n < 2 or args.out.endswith(".json")):
        raise ValueError("--score needs -n 2 or more, and an --out that is a picture: the scores go to a .json beside it")
    paths = args.checkpoints or [HERE / "checkpoints" / "teacher.pt", HERE / "checkpoints" / "w4a3-single.pt"]
    if len(set(map(str, paths))) < len(paths):
        raise ValueError("a checkpoint is named twice")
    check_out(args.out, args.npz)
    targets = [args.out] + [args.npz] * (args.npz is not None)
    scores_file = Path(args.out).with_suffix(".json")
    if args.score:
        targets.append(scores_file)
        if scores_file.exists() and (scores_file.is_dir() or '"scores"' not in scores_file.read_text()):
            raise ValueError(f"{scores_file} is there and holds no scores; choose another --out")
    if len({Path(f).resolve() for f in [*targets, *paths]}) < len(targets) + len(paths):
        raise ValueError("--out, --npz, the scores' .json and the checkpoints must be different files")
    device = pick_device(args.device)
    models = [load_model(path, device) for path in paths]                # all of them first: a bad one fails at once
    for path, model in zip(paths, models):
        if args.label in CLASSES[model.classes:]:
            raise ValueError(f"--class {args.label} is none of the {model.classes} classes of {path}")
        if args.integer and (hqdm.layers(model) or not any(map(hqdm.layers, models))):
            hqdm.set_integer(model, True)            # a float model among quantized ones stays float, to compare with
    args.steps = args.steps or trained_steps(dict(zip(paths, models)))
    for path, model in zip(paths, models):
        if hasattr(model, "clock") and not torch.equal(model.clock.timesteps, ddim_timesteps(args.steps)):
            print(f"note: {path} has activation scales for {len(model.clock.timesteps)} steps; each of the {args.steps} takes the nearest")

    grids, scores, first, began = {}, {}, None, time.time()
    judge = load_judge(device) if args.score else None
    for path, model in zip(paths, models):
        label = None if args.label is None else model.classes if args.label == "none" else CLASSES.index(args.label)
        start = said = time.time()
        def progress(done):
            nonlocal said
            if time.time() - said > 5 or done >= args.n:
                said = time.time()
                print(f"{path}: {done / args.n:.0%} of {args.n} pictures, {(said - start) / done * (args.n - done):.0f} s left", flush=True)
        images, labels = draw(model, args.n, args.steps, label, args.guidance, args.seed, progress=progress)
        grids[str(path)] = images[:64]
        first = images if first is None else first
        if args.score:
            scores[str(path)] = {**score(images, labels, judge), "psnr": psnr(images, first), "n": args.n,
                                 "seconds": round(time.time() - start, 1)}

    save_grids(args.out, grids)
    print(f"wrote {args.out}")
    if args.npz:
        with open(args.npz, "wb") as f:
            np.savez(f, arr_0=rearrange(images, "N C h w -> N h w C").numpy(), arr_1=labels.numpy())
        print(f"wrote {args.npz}")
    if args.score:
        print(f"{'checkpoint':44s} {'C-FID':>7s} {'C-IS':>6s} {'class acc':>9s} {'PSNR dB':>8s}")
        for path, s in scores.items():
            accuracy = "-" if s["accuracy"] is None else f"{s['accuracy']:.3f}"
            print(f"{path[-44:]:44s} {s['c_fid']:7.3f} {s['c_is']:6.3f} {accuracy:>9s} {s['psnr']:8.2f}")
        write_json(scores_file, {"scores": scores, **provenance(args, device, time.time() - began)})


if __name__ == "__main__":
    run_cli(main)
