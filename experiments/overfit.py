"""Does a teacher learn its images by heart? Squared error of its noise on training and on test images -> overfit.json.

    python experiments/overfit.py CKPT CKPT .. --data data      # float checkpoints, or a run's last.pt: its average
    python experiments/overfit.py checkpoints/teacher.pt --data data --out experiments/overfit-dropout.json

All models see the same images and noise, so that their differences are known far better than their errors: `change` is
to the first model, with its standard error. Where it is below zero on training images alone, they were learned by
heart.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.runs import (check_out, new_parser, pick_device, positive, provenance,  # noqa: E402
                           read_checkpoint, run_cli,
                           write_json)
from train import load_cifar10  # noqa: E402
from unet import T, UNet, add_noise  # noqa: E402

HERE = Path(__file__).resolve().parent


def load(path, device):
    """(model in eval mode, updates or None): a float checkpoint, or the EMA in a run's state."""
    ckpt = read_checkpoint(path, kind=("float", "training"))
    weights = ckpt.get("model" if ckpt["kind"] == "float" else "ema")
    if weights is None:
        raise ValueError(f"{path} is the state of a quantized run; a teacher's is needed")
    model = UNet(**ckpt.get("unet", {}))
    model.load_state_dict(weights)
    updates = len(ckpt["losses"]) if "losses" in ckpt else None
    return model.float().eval().to(device, memory_format=torch.channels_last), updates


@torch.no_grad()
def errors(model, x_0, y, t, eps, batch=250):
    """(N,) float64: mean squared error of each image's predicted noise at time t."""
    parts = []
    for x, labels, noise in zip(x_0.split(batch), y.split(batch), eps.split(batch)):
        tt = torch.full((len(x),), t, device=x.device)
        e = model(add_noise(x, tt, noise).contiguous(memory_format=torch.channels_last), tt, labels) - noise
        parts.append(e.square().mean(dim=(1, 2, 3)))
    return torch.cat(parts).double().cpu()


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's .bin files (data)")
    parser.add_argument("-n", type=positive, default=2000, help="images of each set (2000)")
    parser.add_argument("--times", type=int, nargs="+", default=[100, 200, 300])
    parser.add_argument("--out", default=str(HERE / "overfit.json"))
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out, ".json")
    if not all(0 <= t < T for t in args.times):
        raise ValueError(f"--times {args.times} are not all from 0 to {T - 1}")
    device, start, rows, first = pick_device(args.device), time.time(), [], {}
    sets = {"train": load_cifar10(args.data), "test": load_cifar10(args.data, test=True)}
    for path in args.checkpoints:
        model, updates = load(path, device)
        for name, (images, labels) in sets.items():
            for t in args.times:
                g = torch.Generator().manual_seed(t)
                pick = torch.randperm(len(images), generator=g)[:args.n]
                eps = torch.randn(len(pick), 3, 32, 32, generator=g).to(device)
                e = errors(model, (images[pick].float() / 127.5 - 1).to(device), labels[pick].to(device), t, eps)
                row = {"checkpoint": path, "updates": updates, "images": name, "n": len(e), "t": t,
                       "error": float(e.mean())}
                if path != args.checkpoints[0]:
                    change = e - first[name, t]
                    row.update(change=float(change.mean()), standard_error=float(change.std() / len(e) ** 0.5))
                first.setdefault((name, t), e)
                rows.append(row)
                print(" ".join(f"{k} {v:.6f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        write_json(args.out, {"rows": rows, **provenance(vars(args), device, time.time() - start)})


if __name__ == "__main__":
    run_cli(main)
