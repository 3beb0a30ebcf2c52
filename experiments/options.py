"""Which settings the teacher likes: short trainings that differ in one thing each, scored alike -> options.json.

    python experiments/options.py --data data                       # all rows, 2,000 updates of 512 images each: a GPU
    python experiments/options.py --data data --rows plain linear   # some; the others keep what the file has

Short runs answer short questions: they favour small dropout, for one, because a million images is too few to overfit.
The rows plain, lr / 2, lr * 2 and linear drew from another average of the weights, with a fixed decay of
1 - 8 / updates: with it "dropout 0" had C-FID 78.6 and C-IS 6.24 instead of what the file has. One run a row; less
than two C-FID says little.
"""
import copy
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from plumbing.runs import (adamw, check_out, new_parser, pick_device, positive, provenance,  # noqa: E402
                           run_cli, write_json)
from sample import draw, score  # noqa: E402
from unet import UNet, ddpm_loss  # noqa: E402

HERE = Path(__file__).resolve().parent
PLAIN = dict(batch=512, lr=8e-4, shape="cosine", dropout=0.1, loss="ddpm")
ROWS = {"plain": {}, "lr / 2": {"lr": 4e-4}, "lr * 2": {"lr": 1.6e-3}, "linear": {"shape": "linear"},
        "dropout 0": {"dropout": 0.0},
        # by now without dropout, which had won: compare these with "dropout 0"
        "batch 256": {"batch": 256, "lr": 5.6e-4, "dropout": 0.0}, "min-SNR": {"loss": "min-SNR", "dropout": 0.0}}


def train_and_score(images, labels, steps, n, batch, lr, shape, dropout, loss):
    """One teacher from scratch on steps * 512 images -> its scores and seconds."""
    torch.compiler.reset()                           # or the second batch size would be compiled for any size
    torch.manual_seed(0)
    device, steps = images.device, steps * PLAIN["batch"] // batch
    model = UNet(dropout=dropout).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw([{"params": list(model.parameters()), "lr": lr}], device)
    start = time.time()
    loss = functools.partial(ddpm_loss, gamma={"ddpm": math.inf, "min-SNR": 5.0}[loss])
    updates = train.teacher_updates(model, ema, optimizer, images, labels, steps, batch, seed=0, shape=shape, loss=loss)
    losses = [pair[0] for pair in updates]
    seconds = time.time() - start
    return {**score(*draw(ema.eval(), n)), "loss": float(torch.stack(losses[-len(losses) // 10:]).mean()),
            "images": steps * batch, "seconds": round(seconds, 1)}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=positive, default=2000, help="updates of 512 images (2000)")
    parser.add_argument("-n", type=positive, default=2000, help="pictures to score (2000)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", default=str(HERE / "options.json"))
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out, ".json")
    device, start = pick_device(args.device), time.time()
    images, labels = (v.to(device) for v in train.find_data(args.data))
    for name in args.rows:
        settings = {**PLAIN, **ROWS[name]}
        row = {"settings": settings, "n": args.n, **train_and_score(images, labels, args.steps, args.n, **settings)}
        print(f"{name}: {row}", flush=True)
        row["provenance"] = provenance(vars(args), device, time.time() - start)
        report = json.loads(Path(args.out).read_text()) if Path(args.out).is_file() else {"rows": {}}
        report["rows"][name] = row
        write_json(args.out, report)


if __name__ == "__main__":
    run_cli(main)
