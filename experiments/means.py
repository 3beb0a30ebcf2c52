"""Does a learned mean of each channel pay? A W4A3 layer of single then rounds x - m and adds conv(m, w_hat) -> means.json

    python experiments/means.py --seeds 100 101 102     # mid-rise grid; rows of other seeds are kept

m is one vector a layer for all t: H m is the mean of the rotated channels, at first that of the float model's walks.
conv(m, w_hat) does not depend on x, and differs from a bias at the borders only. Trained as grid.py's headline rows.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
import train  # noqa: E402
from grid import EQUAL, TEACHER, Scorer  # noqa: E402
from plumbing.runs import adamw, new_parser, pick_device, positive, provenance, run_cli, write_json  # noqa: E402
from sample import draw, load_model  # noqa: E402
from unet import ddim_timesteps  # noqa: E402

RATE = train.RATES["s_x"] / 10                       # of m; both have the unit of x


@torch.no_grad()
def give_means(student, teacher, walks):
    """Give each rotated layer the mean of the float model's inputs, and calibrate once more. Returns the means, (C,)."""
    twins, sums, rotated = dict(teacher.named_modules()), {}, {
        name: m for name, m in student.named_modules() if isinstance(m, hqdm.HQLayer) and m.activations.symmetric}

    def look_at(name, layer):
        def look(_, args):
            sums.setdefault(name, []).append(layer.channels_last(args[0]).flatten(0, -2).mean(0))
        return twins[name].register_forward_pre_hook(look)
    hooks, inputs = [look_at(*item) for item in rotated.items()], [(x, t, y) for x, t, y, _ in walks]
    for args in inputs:
        teacher(*args)
    for hook in hooks:
        hook.remove()
    for name, layer in rotated.items():
        shift(layer, torch.nn.Parameter(torch.stack(sums[name]).mean(0)))
    hqdm.calibrate(student, teacher, inputs)
    return [layer.mean for layer in rotated.values()]


def shift(layer, m):
    """Let a layer round x - m, and add what its weight makes of m."""
    layer.mean, plain = m, layer.channels_last

    def makes_up(_, args, y):
        q_w, s_w = layer.weights()
        w = q_w * s_w.view(-1, *[1] * (q_w.ndim - 1))
        if q_w.ndim == 2:
            return y + F.linear(m, w)
        image = m.view(1, -1, 1, 1).expand(1, -1, *args[0].shape[2:])
        return y + F.conv2d(image, w, stride=layer.stride, padding=layer.padding)
    layer.channels_last = lambda x: plain(x) - m     # what calibrate looks at, and what a convolution starts with
    if isinstance(layer, hqdm.HQLinear):
        layer.register_forward_pre_hook(lambda _, args: (args[0] - m,))
    layer.register_forward_hook(makes_up)


def run_row(seed, means, args, teacher, score_of):
    """Train as `python train.py --wbits 4 --abits 3 --grid midrise` does, with means or without; draw and score."""
    device, times = next(teacher.parameters()).device, tuple(ddim_timesteps(args.ddim_steps).tolist())
    torch.manual_seed(seed)
    walks = train.trajectories(teacher, min(32, args.n), len(times), seed + 1_000_000)
    student = train.quantized_copy(teacher, hqdm.Scheme(4, 3, grid="midrise", timesteps=times), walks)
    groups = [{"params": give_means(student, teacher, walks), "lr": RATE}] if means else []
    optimizer = adamw([*train.parameter_groups(student), *groups], device)
    carousel = train.Carousel(teacher, args.batch * train.WALKS, times, seed + 3_000_000, own=True)
    batches = carousel.batches(args.batch, args.steps, seed)
    for _ in train.distil(student, optimizer, batches, args.steps, 0, EQUAL["balance"], carousel.advance):
        pass
    scores = score_of(*draw(student, args.n, args.ddim_steps), args.ddim_steps)
    made = provenance({}, device, 0)
    return {"seed": seed, "means": means, "steps": args.steps, "batch": args.batch, **scores,
            **{k: made[k] for k in ("command", "hardware", "torch", "date")}}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=positive, default=EQUAL["steps"])
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--ddim-steps", type=positive, default=50)
    parser.add_argument("-n", type=positive, default=2000, help="pictures that are scored")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    teacher = load_model(TEACHER, pick_device(args.device)).requires_grad_(False)
    score_of = Scorer(teacher, args.n)
    for seed in args.seeds:
        for means in (False, True):
            row = run_row(seed, means, args, teacher, score_of)
            rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
            rows = [r for r in rows if (r["seed"], r["means"]) != (seed, means)] + [row]
            write_json(args.out, {"rows": sorted(rows, key=lambda r: (r["seed"], r["means"]))})
            print(f"seed {seed}, means {means}: C-FID {row['c_fid']:.2f}, C-IS {row['c_is']:.3f}, PSNR {row['psnr']:.2f}", flush=True)


if __name__ == "__main__":
    run_cli(main)
