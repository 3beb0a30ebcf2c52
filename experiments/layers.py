"""What the transform does to each layer of the bundled teacher before any training -> layers.json, layers.png.

    python experiments/layers.py                   # a minute on 2 cores
    python experiments/layers.py --floor           # of the bundled W4A3 model: which roundings are left at t > 800

For the input of every low-bit layer (of those that read the time embedding, one) at every DDIM step: kurtosis (3 for a
normal distribution), max / rms, and the share of its power that rounding at 3 bits loses, with each rotation and grid,
scales calibrated. For every weight: the share lost at 4 bits, as it is (none, single) and rotated (double).

--floor -> floor.json: the eps error where next to everything is noise, with the rounding of one layer's activations
switched off at a time, of all at 8 bits, of all at 3, of all.
"""
import contextlib
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from plumbing.runs import check_out, new_parser, pick_device, positive, provenance, run_cli, whole_file  # noqa: E402
from plumbing.runs import write_json  # noqa: E402
from sample import CHECKPOINTS, load_model  # noqa: E402
from train import trajectories  # noqa: E402

HERE = Path(__file__).resolve().parent
WAYS = {"none": ("none", "midtread"), "single": ("single", "midtread"), "single midrise": ("single", "midrise")}


def moments(v):
    """(kurtosis, max / rms) of all numbers of v."""
    v = v.double().flatten()
    rms = v.square().mean().sqrt()
    return four(((v - v.mean()) ** 4).mean() / v.var(correction=0) ** 2), four(v.abs().max() / rms)


def lost(v, rounded):
    return four((rounded - v).square().mean() / v.square().mean())


def four(v):
    """Four digits of a number."""
    return float(f"{float(v):.4g}")


@torch.no_grad()
def look(x, abits):
    """A row's numbers for one layer's input x (B, .., C) at one step."""
    H_x, row = hqdm.hadamard(x, -1), {}
    for name, v in (("x", x), ("H x", H_x)):
        row[f"kurtosis {name}"], row[f"max/rms {name}"] = moments(v)
    for name, (rotation, grid) in WAYS.items():
        quantizer = hqdm.ActivationQuantizer(x.shape[-1], abits, rotation, grid=grid)
        hqdm.fit_scale(quantizer.to(x.device), x)
        q, s = quantizer(x)                          # rounding errors of H x are those of x: H is orthonormal
        row[f"lost {name}"] = lost(x if rotation == "none" else H_x, q * s.view(-1, *[1] * (x.ndim - 1)))
    return row


@torch.no_grad()
def weight_row(weight, wbits):
    """Shares of a weight's power that its rounding loses: as it is, and rotated."""
    row = {}
    for name in ("single", "double"):
        quantizer = hqdm.WeightQuantizer(weight, wbits, name)
        q, s = quantizer()
        row[f"lost {name}"] = lost(quantizer.weight, s.view(-1, *[1] * (q.ndim - 1)) * q)
    return row


def measure(teacher, walks, abits=3, wbits=4):
    """Rows of all low-bit layers: (activations, a row a layer and step; weights, a row a layer)."""
    student = load_model(CHECKPOINTS / "w4a3-single-midrise.pt")
    low = {name: layer for name, layer in student.named_modules()
           if isinstance(layer, hqdm.HQLayer) and layer.scheme.rotation == "single"}
    twins, rows, t = dict(teacher.named_modules()), [], None
    alike = [name for name in low if name.endswith(".emb")][1:]              # they all read the time embedding: once
    hooks = [twins[name].register_forward_pre_hook(lambda _, args, name=name, layer=layer: rows.append(
        {"layer": name, "t": t, **look(layer.channels_last(args[0]), abits)})) for name, layer in low.items() if name not in alike]
    for x, times, y, _ in walks:
        t = int(times[0])
        teacher(x, times, y)
    for hook in hooks:
        hook.remove()
    return rows, [{"layer": name, **weight_row(twins[name].weight, wbits)} for name in low]


@contextlib.contextmanager
def fine(layers, factor=2**12):
    """Inside, these layers' activations are rounded to a grid so fine that it does not matter."""
    with contextlib.ExitStack() as back, torch.no_grad():
        for a in (layer.activations for layer in layers):
            for name in ("log_s_x", "z_x"):
                if hasattr(a, name):
                    back.callback(getattr(a, name).copy_, getattr(a, name).clone())
            back.callback(setattr, a, "grid", a.grid)
            a.grid = a.grid._replace(low=a.grid.low * factor, high=a.grid.high * factor)
            a.log_s_x -= math.log(factor)
            if not a.symmetric:
                a.z_x *= factor
        yield


@torch.no_grad()
def floor(walks, checkpoint):
    """Rows: what is not rounded, and the eps error at the first DDIM step; the first row is the model as it is."""
    model = load_model(checkpoint, walks[0][0].device)
    x, t, y, eps = walks[0]
    every = {name: layer for name, layer in model.named_modules() if isinstance(layer, hqdm.HQLayer)}
    groups = {"nothing": [], "all": list(every.values()), **{f"all of {bits} bits": [
        layer for layer in every.values() if layer.scheme.abits == bits] for bits in sorted(
        {layer.scheme.abits for layer in every.values()})}, **{name: [layer] for name, layer in every.items()}}
    rows = []
    for name, chosen in groups.items():
        with fine(chosen):
            rows.append({"not rounded": name, "t": int(t[0]), "layers": len(chosen),
                         "eps_error": four((model(x, t, y) - eps).square().mean())})
    return rows


def draw_figure(report, path):
    """Four panels: outliers over layers and over steps, what rounding loses, and the weights."""
    from matplotlib.figure import Figure
    rows, weights = report["activations"], report["weights"]
    fig = Figure(figsize=(12, 7), layout="constrained")
    axes = fig.subplots(2, 2)

    def line(ax, key, along, label, **style):
        groups = {}
        for r in rows:
            groups.setdefault(r[along], []).append(r[key])
        at, mark = (list(groups), "o-") if along == "t" else (range(1, len(groups) + 1), "o")
        ax.plot(at, [statistics.median(v) for v in groups.values()], mark, markersize=4, label=label, **style)
    for name, colour in (("x", "C1"), ("H x", "C0")):
        line(axes[0, 0], f"max/rms {name}", "layer", name, color=colour)
        line(axes[0, 1], f"kurtosis {name}", "t", name, color=colour)
    for name, colour in zip(WAYS, ("C1", "C0", "C2")):
        line(axes[1, 0], f"lost {name}", "layer", name, color=colour)
    axes[0, 1].axhline(3, color="0.5", linestyle=":", label="normal\ndistribution")
    for name, colour in (("single", "C0"), ("double", "C3")):
        label = {"single": "as it is\n(none, single)", "double": "rotated\n(double)"}[name]
        shares = [r[f"lost {name}"] for r in weights]
        axes[1, 1].plot(range(1, len(weights) + 1), shares, "o", markersize=4, color=colour, label=label)
    for ax, title, xlabel, ylabel in (
            (axes[0, 0], "outliers: largest value of a layer's input", "input, in order of layers", "max / rms, median of steps"),
            (axes[0, 1], "outliers along the walk", "t", "kurtosis, median of layers"),
            (axes[1, 0], "3-bit activations: power lost to rounding", "input, in order of layers", "share, median of steps"),
            (axes[1, 1], "4-bit weights: power lost to rounding", "layer, in order", "share")):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0, 1].invert_xaxis()
    with whole_file(path) as part:
        fig.savefig(part, dpi=110, format="png")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--walks", type=positive, default=16, help="pictures drawn at once (16)")
    parser.add_argument("--ddim-steps", type=positive, default=10)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--checkpoint", default=str(CHECKPOINTS / "w4a3-single-midrise.pt"), help="of --floor")
    parser.add_argument("--out", help="a JSON file; its figure goes beside it (layers.json or floor.json, here)")
    parser.add_argument("--device")
    args = parser.parse_args()
    args.out = args.out or str(HERE / ("floor.json" if args.floor else "layers.json"))
    check_out(args.out, ".json")
    device, start = pick_device(args.device), time.time()
    teacher = load_model(CHECKPOINTS / "teacher.pt", device)
    walks = trajectories(teacher, args.walks, args.ddim_steps, seed=4_000_000)
    if args.floor:
        rows = floor(walks, args.checkpoint)
        for row in sorted(rows, key=lambda row: row["eps_error"])[:12] + rows[:1]:
            print(f"{row['not rounded']:24s} {row['eps_error'] / rows[0]['eps_error']:.2f}")
        return write_json(args.out, {"rows": rows, **provenance(vars(args), device, time.time() - start)})
    rows, weights = measure(teacher, walks)
    report = {"activations": rows, "weights": weights, **provenance(vars(args), device, time.time() - start)}
    for key in [k for k in rows[0] if k not in ("layer", "t")]:
        print(f"{key:20s} median {statistics.median(r[key] for r in rows):8.3f}")
    for key in ("lost single", "lost double"):
        print(f"weights, {key:11s} median {statistics.median(r[key] for r in weights):8.4f}")
    write_json(args.out, report)
    draw_figure(report, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    run_cli(main)
