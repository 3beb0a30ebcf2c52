"""Compare learning rates and rotations of the quantized training: short W4A3 runs on the same batches.

    python experiments/rates.py --out experiments/rates.json

Each row multiplies train.RATES (LoRA, s_w, s_x, z_x) by four factors and reports the eps error on unseen noises,
untrained and trained. The paper's own rates are the row (0.01, 0.01, 1/16, 1/16). The last rows ask how strong the
baseline without the transform is: with zero points that are not searched ("ends": false, both ends of a range shrink
together), at several rates, for they are rounded, and one must travel half a level before anything changes; and with
searched ones, as it is. Rows with a batch of their own look for what a CPU can do in two minutes. One seed, and 100
updates a row unless it says otherwise: differences under 2 % mean nothing.
"""
import contextlib
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from plumbing.runs import (adamw, check_out, new_parser, pick_device, positive, provenance, run_cli,  # noqa: E402
                           write_json)
from sample import CHECKPOINTS, load_model  # noqa: E402
from train import (RATES, Carousel, distil, eps_errors, parameter_groups, quantized_copy,  # noqa: E402
                   trajectories)
from unet import ddim_timesteps  # noqa: E402

ONE = (1, 1, 1, 1)
ROWS = [dict(factors=f) for f in [(0.01, 0.01, 1 / 16, 1 / 16), (0.1, 0.1, 1, 1), ONE, (1, 1, 4, 1), (1, 1, 0.25, 1),
                                  (4, 1, 1, 1), (1, 10, 1, 1)]]
ROWS += [dict(rotation="double")]
ROWS += [dict(rotation="none", factors=(1, 1, 1, z_x), ends=ends) for ends in (False, True) for z_x in (1, 4, 16)]
# What a CPU could do in the time of its short run: these batches take it about as long.
ROWS += [dict(batch=b, steps=n) for b, n in ((1, 440), (2, 350), (4, 240), (8, 150), (16, 85))]
ROWS += [dict(batch=8, steps=150, factors=f) for f in [(0.3, 1, 1, 1), (3, 1, 1, 1), (3, 3, 3, 3), (10, 1, 1, 1),
                                                       (1, 1, 16, 1), (1, 100, 1, 1)]]
ROWS += [dict(batch=8, steps=1000)]                  # and with more time


@contextlib.contextmanager
def searched(ends):
    """Inside, calibration shrinks each end of a range alone too, as it does by default; or, without `ends`, never."""
    search = hqdm.search_scale
    if not ends:
        hqdm.search_scale = lambda v, grid, p, ends=False, *more, **named: search(v, grid, p, False, *more, **named)
    try:
        yield
    finally:
        hqdm.search_scale = search


def scaled(groups, student, factors):
    """parameter_groups with their rates times {name in RATES: factor}."""
    names = {p: name.rpartition(".")[2] for name, p in student.named_parameters()}
    for group in groups:
        name = names[group["params"][0]]
        group["lr"] *= factors["lora" if name == "lora_A" else name.removeprefix("log_")]
    return groups


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--ddim-steps", type=positive, default=10)
    parser.add_argument("--out", help="a JSON file; without it the rows are only printed")
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out, ".json")
    device, start = pick_device(args.device), time.time()
    teacher = load_model(CHECKPOINTS / "teacher.pt", device).requires_grad_(False)
    timesteps = tuple(ddim_timesteps(args.ddim_steps).tolist())
    walks, unseen = (trajectories(teacher, n, len(timesteps), seed) for n, seed in ((8, 1), (16, 3)))
    batches, students, rows = {}, {}, []
    for given in ROWS:
        row = {"rotation": "single", "ends": True, "batch": args.batch, "steps": args.steps, "factors": ONE, **given}
        rotation, ends, batch, steps, factors = row.values()
        key = rotation, ends
        if key not in students:
            torch.manual_seed(0)                     # LoRA's A is drawn at random
            with searched(ends):
                students[key] = quantized_copy(teacher, hqdm.Scheme(4, 3, rotation, timesteps=timesteps), walks)
        if (batch, steps) not in batches:            # all rows of one size train on the same
            batches[batch, steps] = list(Carousel(teacher, 16 * batch, timesteps, seed=2).batches(batch, steps, seed=0))
        student = copy.deepcopy(students[key])
        row["factors"], before = dict(zip(RATES, factors)), eps_errors(student, unseen)
        optimizer = adamw(scaled(parameter_groups(student), student, row["factors"]), device)
        for _ in distil(student, optimizer, batches[batch, steps], steps):
            pass
        after = eps_errors(student, unseen)
        rows.append({**row, "eps_error_untrained": statistics.fmean(before), "eps_error": statistics.fmean(after),
                     "eps_errors_untrained": before, "eps_errors": after})
        print({k: v for k, v in rows[-1].items() if "errors" not in k}, flush=True)
        if args.out:
            write_json(args.out, {"rates": RATES, "rows": rows, **provenance(vars(args), device, time.time() - start)})


if __name__ == "__main__":
    run_cli(main)
