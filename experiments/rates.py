"""Compare learning rates and rotations of the quantized training: short W4A3 runs on the same batches.

    python experiments/rates.py --out experiments/rates.json

Each row multiplies hqdm.RATES (LoRA, s_w, s_x, z_x) by four factors and reports the eps error on unseen noises, untrained
and trained. The paper's own rates are the row (0.01, 0.01, 1/16, 1/16). The last rows ask how strong the baseline without
the transform is: with zero points that are not searched ("ends": false, both ends of a range shrink together), at several
rates, for they are rounded, and one must travel half a level before anything changes; and with searched ones, as it is.
One seed and 100 updates a row: differences under 2 % mean nothing.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from sample import check_out, load_model, pick_device, positive, provenance, run_cli, write_json  # noqa: E402
from train import HERE, adamw, distil_updates, eps_error, make_pool, pool_batches  # noqa: E402
from unet import ddim_timesteps  # noqa: E402

ROWS = [("single", factors, True) for factors in [(0.01, 0.01, 1 / 16, 1 / 16), (0.1, 0.1, 1, 1), (1, 1, 1, 1), (1, 1, 4, 1),
                                                  (1, 1, 0.25, 1), (4, 1, 1, 1), (1, 10, 1, 1)]]
ROWS += [("double", (1, 1, 1, 1), True), *(("none", (1, 1, 1, z_x), ends) for ends in (False, True) for z_x in (1, 4, 16))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--ddim-steps", type=positive, default=10)
    parser.add_argument("--out", help="a JSON file; without it the rows are only printed")
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out)
    device, start = pick_device(args.device), time.time()
    teacher = load_model(HERE / "checkpoints" / "teacher.pt", device).requires_grad_(False)
    calib, pool, test = (make_pool(teacher, n, args.ddim_steps, seed) for n, seed in ((8, 1), (64, 2), (16, 3)))
    rows, search = [], hqdm.search_scale
    for rotation, factors, ends in ROWS:
        hqdm.search_scale = search if ends else lambda *given, **more: search(*given, **{**more, "ends": False})
        torch.manual_seed(0)                         # LoRA's A is drawn at random
        student = copy.deepcopy(teacher)
        hqdm.quantize_unet(student, 4, 3, rotation, timesteps=ddim_timesteps(args.ddim_steps).tolist())
        hqdm.calibrate(student, teacher, ((x, t.expand(len(x)), calib["y"]) for x, t in zip(calib["x"], calib["t"])))
        row = {"rotation": rotation, "ends": ends, "factors": dict(zip(hqdm.RATES, factors)),
               "eps_error_untrained": eps_error(student, test)}
        groups = hqdm.parameter_groups(student)
        for group in groups:
            name = next(n for n, p in student.named_parameters() if p is group["params"][0]).rpartition(".")[2]
            group["base_lr"] *= row["factors"]["lora" if name == "lora_A" else name.removeprefix("log_")]
        optimizer = adamw(groups, device)
        for _ in distil_updates(student, optimizer, pool_batches(pool, args.batch, args.steps, seed=0), args.steps):
            pass
        rows.append({**row, "eps_error": eps_error(student, test)})
        print(rows[-1], flush=True)
    if args.out:
        report = {"rates": hqdm.RATES, "rows": rows, **provenance(args, device, time.time() - start)}
        write_json(args.out, report)


if __name__ == "__main__":
    run_cli(main)
