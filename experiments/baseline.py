"""How strong is the baseline without the transform? W4A3 runs from one start, on the same batches, by their eps error.

    python experiments/baseline.py      # CPU, 2 cores: half an hour; writes experiments/baseline.json

Students: single, double, and none with its zero points learned at 0, 1 and 4 times hqdm.RATES["z_x"]. A zero point is
rounded, so it must first travel half a level before anything changes: at rate 1 that takes more updates than here. Each row
gives the error on unseen noises after 0, 1/4, 1/2 and all of the updates. One seed a row: under 2 % means nothing.
"""
import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from sample import load_model, pick_device, positive, provenance, run_cli  # noqa: E402
from train import HERE, distil_updates, eps_error, make_pool, pool_batches  # noqa: E402
from unet import ddim_timesteps  # noqa: E402

STUDENTS = [("single", 1), ("double", 1), ("none", 0), ("none", 1), ("none", 4)]        # rotation, factor of RATES["z_x"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--ddim-steps", type=positive, default=10)
    parser.add_argument("--device")
    args = parser.parse_args()
    device, start, rows = pick_device(args.device), time.time(), []
    teacher = load_model(HERE / "checkpoints" / "teacher.pt", device).requires_grad_(False)
    calib, pool, test = (make_pool(teacher, n, args.ddim_steps, seed) for n, seed in ((8, 1), (256, 2), (16, 3)))
    for rotation, factor in STUDENTS:
        torch.manual_seed(0)
        student = copy.deepcopy(teacher)
        hqdm.quantize_unet(student, 4, 3, rotation, timesteps=ddim_timesteps(args.ddim_steps).tolist())
        hqdm.calibrate(student, teacher, ((x, t.expand(len(x)), calib["y"]) for x, t in zip(calib["x"], calib["t"])))
        groups = hqdm.parameter_groups(student)
        groups[-1]["base_lr"] *= factor                          # the last group holds the zero points
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        row = {"rotation": rotation, "zero_point_rate": factor, "eps_error": {0: eps_error(student, test)}}
        updates = distil_updates(student, optimizer, pool_batches(pool, args.batch, args.steps, seed=0), args.steps)
        for step, _ in enumerate(updates, start=1):
            if step % max(1, args.steps // 4) == 0 and step != 3 * args.steps // 4:
                row["eps_error"][step] = eps_error(student, test)
        rows.append(row)
        print(f"{time.time() - start:.0f} s", row, flush=True)
    report = {"rows": rows, **provenance(args, device, time.time() - start)}
    (Path(__file__).parent / "baseline.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
