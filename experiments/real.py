"""What the bundled judge says of real images: the scores that pictures could reach -> real.json.

    python experiments/real.py --data data

5,000 test images and as many training images. The judge learned the training images, so their scores are too good.
"""
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.runs import (check_out, natural, new_parser, pick_device, positive, provenance, run_cli,  # noqa: E402
                           write_json)
from sample import load_judge, score  # noqa: E402
from train import load_cifar10  # noqa: E402

HERE = Path(__file__).resolve().parent


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's .bin files (data)")
    parser.add_argument("-n", type=positive, default=5000, help="images of each set (5000)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", default=str(HERE / "real.json"))
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out, ".json")
    device, start, rows = pick_device(args.device), time.time(), {}
    judge = load_judge(device)
    for name in ("training images", "test images"):
        images, labels = load_cifar10(args.data, test=name == "test images")
        pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:args.n]
        rows[name] = {"n": len(pick), **score(images[pick], labels[pick], judge)}
        print(name, json.dumps(rows[name]), flush=True)
        write_json(args.out, {"rows": rows, **provenance(vars(args), device, time.time() - start)})


if __name__ == "__main__":
    run_cli(main)
