"""Would other DDIM steps draw better? The teacher's pictures with t = 999 u^p, u even from 1 to 0 -> spacing.json.

    python experiments/spacing.py                                # p = 1 (what we use), 1.5 and 2, 50 steps each
    python experiments/spacing.py --powers 1 1.5 --steps 50 200 -n 5000 --out FILE.json

p = 2 is the quadratic choice that the DDIM paper makes for CIFAR-10 (appendix D.2): more steps near the picture.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import unet  # noqa: E402
from plumbing.runs import (check_out, new_parser, number, pick_device, positive, provenance,  # noqa: E402
                           run_cli, write_json)
from sample import CHECKPOINTS, draw, load_model, psnr, score  # noqa: E402

HERE = Path(__file__).resolve().parent


def spaced(power):
    """A ddim_timesteps: rounded to integers, and near 0, where two would be the same, moved apart by 1."""
    def timesteps(steps):
        times = (999 * torch.linspace(1, 0, steps, dtype=torch.float64)**power).round().long()
        return torch.maximum(times, torch.arange(steps).flip(0))
    return timesteps


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--powers", nargs="+", type=number(), default=[1, 1.5, 2])
    parser.add_argument("--steps", nargs="+", type=positive, default=[50])
    parser.add_argument("-n", type=positive, default=500)
    parser.add_argument("--out", default=str(HERE / "spacing.json"))
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out, ".json")
    device, start, rows, first = pick_device(args.device), time.time(), [], None
    model = load_model(CHECKPOINTS / "teacher.pt", device)
    for steps in args.steps:
        for power in args.powers:
            unet.ddim_timesteps = spaced(power)
            pictures, labels = draw(model, args.n, steps)
            first = pictures if first is None else first
            rows.append({"power": power, "steps": steps, "last_times": spaced(power)(steps)[-5:].tolist(),
                         **score(pictures, labels), "psnr_to_first": psnr(pictures, first)})
            print(rows[-1], flush=True)
            write_json(args.out, {"rows": rows, **provenance(vars(args), device, time.time() - start)})


if __name__ == "__main__":
    run_cli(main)
