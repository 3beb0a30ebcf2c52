"""Draw pictures from checkpoints, compare them from the same noise, and score them.

    python sample.py                                     # the bundled teacher and W4A3 model: samples.png, in 30 s
    python sample.py runs/w4a3-single/model.pt -n 64     # one checkpoint of your own; it carries its own configuration
    python sample.py CKPT CKPT --class cat --guidance 2  # one class, classifier-free guidance
    python sample.py CKPT --integer                      # draws with floats and with integers: 0 bytes differ
    python sample.py CKPT CKPT --score -n 5000           # C-FID, C-IS, class accuracy, PSNR to the first checkpoint
    python sample.py CKPT --npz FILE -n 50000            # for public FID tools: uint8 (N, 32, 32, 3) in arr_0;
    python sample.py CKPT --png FOLDER -n 50000          # or one PNG a picture

The scores come from a small CIFAR-10 classifier of our own (experiments/judge.py), not from Inception: compare them
with each other, never with FID or IS of a paper. All noise is drawn on the CPU from --seed, image by image, so
picture i starts from the same noise on every device, at every batch size and for every checkpoint.
"""
import itertools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange

import hqdm
from plumbing.runs import (check_out, natural, new_parser, number, one_line, pick_device, positive, provenance,
                           read_checkpoint, recorded, run_cli, whole_file, write_json)
from unet import T, UNet, ddim, ddim_timesteps

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
BUNDLED = "teacher", "w4a3-single-midrise"                       # what is drawn from unless told otherwise


# ---------------------------------------------------------------- drawing

def load_model(path, device="cpu", kind=("float", "quantized")):
    """A checkpoint -> the network, in eval mode and float32, ready to draw; a quantized one comes packed (no LoRA).

    Raises ValueError where the tensors do not fit the configuration beside them, and as read_checkpoint does.
    """
    ckpt = read_checkpoint(path, kind)
    try:
        with torch.device("meta"):                   # sizes without memory: a parameter takes half a byte at least
            parameters = sum(p.numel() for p in UNet(**ckpt["unet"]).parameters())
        if parameters > 2 * sum(v.nbytes for v in ckpt["model"].values()):
            raise ValueError(f"{parameters:,} parameters are not in its tensors")
        model = UNet(**ckpt["unet"])
        if ckpt["kind"] == "quantized":
            hqdm.quantize_network(model, hqdm.Scheme(**ckpt["scheme"]), packed=True)
        model.load_state_dict(ckpt["model"])
        check_values(model)
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError, ArithmeticError, IndexError) as e:
        raise ValueError(f"{path} does not fit its own configuration: {one_line(e)}") from None
    return model.float().eval().to(device, memory_format=torch.channels_last)


def check_values(model):
    """ValueError, naming the tensor, where a loaded model holds what no training makes."""
    for name, v in (*model.named_parameters(), *model.named_buffers()):
        if v.is_floating_point() and not v.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    for name, layer in model.named_modules():
        if isinstance(layer, hqdm.HQLayer):
            w, s_x = layer.weights, layer.activations.log_s_x.exp()
            q_w = hqdm.unpack_weights(w.q_w, w.bits, w.shape)
            for what, v, good in (("s_x", s_x, s_x.isfinite() & (s_x > 0)), ("s_w", w.s_w, w.s_w > 0),
                                  ("z_w", w.z_w, w.z_w <= w.grid[1]), ("q_w", q_w, q_w <= w.grid[1])):
                if not good.all():
                    raise ValueError(f"{name} has {what} = {v[~good][0].item():g}")
    if not all(0 <= t < T for t in (model.hqdm.timesteps if hqdm.layers(model) else ())):
        raise ValueError(f"timesteps {model.hqdm.timesteps} are not all from 0 to {T - 1}")


def noise_and_labels(n, seed=0, classes=10, label=None, size=32):
    """(n, 3, size, size) normal noise and (n,) labels on the CPU; labels go 0 1 .. 9 0 1 .. unless one is given.

    The noise of picture i does not depend on n: the generator is read picture by picture.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(3, size, size, generator=generator) for _ in range(n)])
    labels = torch.arange(n) % max(1, classes) if label is None else torch.full((n,), label)
    return noise, labels


def to_uint8(x):
    """Images in [-1, 1] -> uint8 0 .. 255, rounded to the nearest."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw(model, n, steps=50, label=None, guidance=1.0, seed=0, batch=500, progress=None, rows=slice(None)):
    """n pictures: uint8 (n, 3, size, size) and their labels (n,), both on the CPU. Deterministic DDIM (eta = 0).

    The model draws in eval mode and is left in its own.
    rows: those of the n to draw, so that several processes can share them.
    progress: called after every step with how many pictures' worth of work is done. Raises FloatingPointError where a
    picture is not finite (an extreme guidance; a quantized model's integers can hide a NaN: load_model refuses those).
    """
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    size = getattr(model, "config", {}).get("size", 32)
    noise, labels = (v[rows] for v in noise_and_labels(n, seed, model.classes, label, size))
    pictures, net, modes = [], recorded(model, device), {m: m.training for m in model.modules()}
    model.eval()                                     # without dropout
    try:
        for x, y in zip(noise.split(batch), labels.split(batch)):
            x = x.to(device, memory_format=torch.channels_last)
            for i, (_, _, _, x_0) in enumerate(ddim(net, x, y.to(device), steps, guidance), start=1):
                if progress:
                    progress(sum(map(len, pictures)) + len(x) * i / steps)
            if not x_0.isfinite().all():
                raise FloatingPointError(f"the pictures are not finite at --steps {steps} --guidance {guidance:g}")
            pictures.append(to_uint8(x_0).cpu().contiguous())
    finally:
        for m, mode in modes.items():
            m.training = mode
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


def load_judge(device="cpu", path=CHECKPOINTS / "judge.pt"):
    """The bundled judge, in eval mode. ValueError where the tensors do not fit, and as read_checkpoint raises it."""
    judge, ckpt = Judge(), read_checkpoint(path, kind=("judge",))
    try:
        judge.load_state_dict(ckpt["model"])
    except (RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} holds another network than the judge: {one_line(e)}") from None
    return judge.float().eval().to(device)


@torch.no_grad()
def judge_images(judge, images, batch=500):
    """uint8 (N, 3, 32, 32) -> log-probabilities (N, 10) and features (N, 256), float64 on the CPU.

    ValueError for other images, and for a judge in training mode.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, 32, 32) or judge.training:
        raise ValueError(f"the judge, in eval mode, looks at uint8 (N, 3, 32, 32), not {images.dtype} "
                         f"{(*images.shape,)} {'in training mode' * judge.training}")
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
    None where no class was (labels of 10 and more). Raises ValueError for fewer than two pictures, which have no
    covariance, for other than a label a picture, and as judge_images does.
    """
    if len(images) < 2 or labels.shape != (len(images),):
        raise ValueError(f"{len(images)} pictures and {(*labels.shape,)} labels have no scores: two or more, one each")
    judge = judge or load_judge()
    logp, features = judge_images(judge, images)
    p = logp.exp()
    kl = (p * (logp - p.mean(dim=0).log())).sum(dim=1).mean()
    real_mean, real_cov = judge.mean.cpu().double(), judge.cov.cpu().double()
    c_fid = frechet_distance(features.mean(dim=0), features.T.cov(), real_mean, real_cov)
    asked = labels < len(CLASSES)
    accuracy = float((logp.argmax(1) == labels)[asked].double().mean()) if asked.any() else None
    return {"c_fid": c_fid, "c_is": float(kl.exp()), "accuracy": accuracy}


def psnr(images, reference):
    """Mean over the pictures of 10 log10(255^2 / mse), in dB; equal pictures count 99 dB, so that a mean exists.

    Both (N, 3, h, w), uint8; ValueError for others.
    """
    if images.shape != reference.shape or {images.dtype, reference.dtype} != {torch.uint8}:
        raise ValueError(f"no PSNR between {images.dtype} {(*images.shape,)} and {reference.dtype} "
                         f"{(*reference.shape,)}: both must be uint8, of one shape")
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / mse)).clamp(max=99).mean())


# ---------------------------------------------------------------- pictures of pictures, and files for other tools

def save_grids(path, grids, columns=16, zoom=2):
    """A titled block of pictures per entry of grids ({title: uint8 (n, 3, h, h)}) in one PNG, every pixel kept."""
    from matplotlib.figure import Figure             # not pyplot, whose backend is everybody's
    columns = min(columns, max(map(len, grids.values())))
    rows = math.ceil(max(map(len, grids.values())) / columns)
    side = next(iter(grids.values())).shape[-1]
    width, height, title = columns * side * zoom, rows * side * zoom, 28
    total = len(grids) * (height + title)
    fig = Figure(figsize=(width / 100, total / 100), dpi=100)
    for i, (name, images) in enumerate(grids.items()):
        blank = torch.full((rows * columns - len(images), 3, side, side), 255, dtype=torch.uint8)
        grid = rearrange(torch.cat([images, blank]), "(r c) k h w -> (r h) (c w) k", c=columns).numpy()
        ax = fig.add_axes((0, 1 - (i + 1) * (height + title) / total, 1, height / total))
        ax.imshow(grid, interpolation="nearest", aspect="auto")
        ax.set_axis_off()
        fig.text(4 / width, 1 - (i * (height + title) + title * 0.75) / total, name, fontsize=10, parse_math=False)
    with whole_file(path) as part:
        fig.savefig(part, format="png")


def save_pngs(folder, images):
    """uint8 (N, 3, 32, 32) -> folder/00000.png .. , what most public FID tools read."""
    from matplotlib.image import imsave
    Path(folder).mkdir(exist_ok=True)
    for i, image in enumerate(rearrange(images, "N C h w -> N h w C").numpy()):
        imsave(Path(folder) / f"{i:05d}.png", image)


def save_npz(path, images, labels):
    """arr_0: uint8 (N, 32, 32, 3), what OpenAI's evaluator reads; arr_1: labels (N,)."""
    with whole_file(path) as part, open(part, "wb") as f:
        np.savez(f, arr_0=rearrange(images, "N C h w -> N h w C").numpy(), arr_1=labels.numpy())


# ---------------------------------------------------------------- the command line

def name_of(path):
    """checkpoints/NAME.pt or runs/NAME/model.pt -> NAME."""
    path = Path(path)
    return path.parent.name if path.stem == "model" and path.parent.name else path.stem


def load_models(args):
    """{name: model}; the name is a path where two share theirs. ValueError where --class or --integer suits none."""
    names = [name_of(path) for path in args.checkpoints]
    names = [path if names.count(name) > 1 else name for name, path in zip(names, args.checkpoints)]
    models = {name: load_model(path, args.device) for name, path in zip(names, args.checkpoints)}
    for name, model in models.items():
        if args.label in CLASSES[model.classes:]:
            raise ValueError(f"--class {args.label} is none of the {model.classes} classes of {name}")
    if args.integer and not any(map(hqdm.layers, models.values())):
        raise ValueError("--integer needs a quantized checkpoint; this is a float one")
    return models


def trained_steps(models):
    """{name: model} -> the DDIM steps its quantized models were trained for, else 50. ValueError where they differ."""
    steps = {name: len(model.hqdm.timesteps) for name, model in models.items() if hqdm.layers(model)}
    if len(set(steps.values())) > 1:
        each = ", ".join(f"{name}: {n}" for name, n in steps.items())
        raise ValueError(f"trained for different numbers of steps ({each}); choose with --steps")
    return next(iter(steps.values()), 50)


def timed_draw(name, model, args):
    """(pictures, labels, seconds) as the command line asks for them; says every five seconds how far it is."""
    label = None if args.label is None else model.classes if args.label == "none" else CLASSES.index(args.label)
    start = said = time.time()

    def progress(done):
        nonlocal said
        if time.time() - said > 5 or done >= args.n:
            said = time.time()
            left = (said - start) / done * (args.n - done)
            print(f"{name}: {done / args.n:.0%} of {args.n} pictures, {left:.0f} s left", flush=True)
    images, labels = draw(model, args.n, args.steps, label, args.guidance, args.seed, args.batch, progress)
    return images, labels.where(labels < model.classes, len(CLASSES)), time.time() - start   # "none" is 10 for all


def write_files(args, drawn):
    """--out, --npz and --png. drawn: {name: (pictures, labels, seconds)}; the last two hold the last one's."""
    save_grids(args.out, {name: images[:64] for name, (images, _, _) in drawn.items()})
    print(f"wrote {args.out}")
    name, (images, labels, _) = list(drawn.items())[-1]
    if args.npz:
        save_npz(args.npz, images, labels)
    if args.png:
        save_pngs(args.png, images)
    for target in filter(None, (args.npz, args.png)):
        print(f"wrote {target}: {len(images)} pictures of {name}")


def write_scores(args, drawn, judge, began, argv):
    """Print the scores and write them beside --out. PSNR is to the first of drawn."""
    scores, first = {}, list(drawn.values())[0][0]
    if args.n < 2000:
        print(f"note: C-FID of {args.n} pictures is large by itself; compare it with that of {args.n} others only")
    print(f"{'checkpoint':24s} {'C-FID':>7s} {'C-IS':>6s} {'class acc':>9s} {'PSNR dB':>8s}")
    for path, (name, (images, labels, seconds)) in zip(args.checkpoints, drawn.items()):
        s = {**score(images, labels, judge), "psnr": psnr(images, first), "n": args.n, "seconds": round(seconds, 1)}
        accuracy = "-" if s["accuracy"] is None else f"{s['accuracy']:.3f}"
        print(f"{name[-24:]:24s} {s['c_fid']:7.3f} {s['c_is']:6.3f} {accuracy:>9s} {s['psnr']:8.2f}", flush=True)
        scores[path] = s
    made = provenance({**vars(args), "device": str(args.device)}, args.device, time.time() - began, argv)
    write_json(Path(args.out).with_suffix(".json"), {"scores": scores, **made})


def parse(argv):
    """The command line -> its options, all checked before any work. ValueError names what is wrong with them."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="default: the bundled teacher and W4A3 model")
    add("-n", type=positive, help="pictures from each checkpoint (64; cpu 16)")
    add("--steps", type=positive, help="DDIM steps (what the quantized model was trained for, else 50)")
    add("--class", dest="label", help=f"one class for all: {', '.join(CLASSES)}, or none")
    add("--guidance", type=number(0), default=1.0, help="classifier-free guidance; 1 is off (1)")
    add("--seed", type=natural, default=0, help="of the noise (0)")
    add("--batch", type=positive, default=500, help="pictures at a time (500); fewer take less memory")
    add("--integer", action="store_true", help="draw once more with int8 products, and compare the bytes")
    add("--score", action="store_true", help="print C-FID, C-IS, class accuracy, PSNR; write them beside --out")
    add("--npz", metavar="FILE", help="write the pictures of the last checkpoint and their labels")
    add("--png", metavar="FOLDER", help="write the pictures of the last checkpoint, one file each")
    add("--out", default="samples.png", help="the picture (samples.png)")
    add("--device", help="cpu, cuda or mps (the fastest one here)")
    args = parser.parse_args(argv)
    args.checkpoints = args.checkpoints or [str(CHECKPOINTS / f"{name}.pt") for name in BUNDLED]
    args.device = pick_device(args.device)
    if args.integer and args.device.type not in ("cpu", "cuda"):
        print(f"note: {args.device} multiplies no integers, so --integer draws on the cpu")
        args.device = torch.device("cpu")
    args.n = args.n or (16 if args.device.type == "cpu" else 64)
    check(args)
    return args


def check(args):
    """ValueError for bad values, and where a file to be written is a checkpoint, another target, or cannot be."""
    if args.label not in [None, *CLASSES, "none"]:
        raise ValueError(f"--class {args.label} does not exist; choose from {', '.join(CLASSES)}, none")
    if len(set(args.checkpoints)) < len(args.checkpoints):
        raise ValueError("a checkpoint is named twice")
    if args.score and args.n < 2:
        raise ValueError("--score needs -n 2 or more")
    png = None if args.png is None else Path(args.png)
    check_out(args.out, ".png"), check_out(args.npz, ".npz"), check_out(args.png if png and not png.is_dir() else None)
    scores = Path(args.out).with_suffix(".json")
    check_out(scores if args.score else None)
    if args.score and scores.exists() and b'"scores"' not in scores.read_bytes():
        raise ValueError(f"{scores} is there and holds no scores; choose another --out")
    used = png and png.is_dir() and (any(png.iterdir()) or not os.access(png, os.W_OK))
    if png and (args.png == "" or png.is_file() or used):
        raise ValueError("--png takes a folder that is new or empty, and may be written to")
    files = [args.out, args.npz, args.png, *args.checkpoints, scores if args.score else None]
    files = [Path(f).resolve() for f in files if f is not None]
    if len(set(files)) < len(files):
        raise ValueError("--out, --npz, --png, the scores' .json and the checkpoints must be different files")


def main(argv=None):
    args, began = parse(argv), time.time()
    models, judge = load_models(args), load_judge(args.device) if args.score else None       # a bad one fails at once
    args.steps = args.steps or trained_steps(models)
    for name, model in models.items():
        own = list(model.hqdm.timesteps) if hqdm.layers(model) else []
        if own and own != ddim_timesteps(args.steps).tolist():
            print(f"note: {name} has activation scales for {len(own)} steps; "
                  f"each of the {args.steps} takes the nearest")

    drawn = {}
    for name, model in models.items():
        images, _, seconds = drawn[name] = timed_draw(name, model, args)
        if args.integer and hqdm.layers(model):
            hqdm.set_integer(model)
            whole, _, took = timed_draw(f"{name} in integers", model, args)
            differ = f"{int((whole != images).sum())} of {images.numel():,} bytes differ"
            print(f"{name}: {differ} between floats on the integer grid ({seconds:.1f} s) and integers ({took:.1f} s)",
                  flush=True)
    write_files(args, drawn)
    if args.score:
        write_scores(args, drawn, judge, began, argv)


if __name__ == "__main__":
    run_cli(main)
