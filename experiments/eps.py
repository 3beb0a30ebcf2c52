"""The eps error of quantized checkpoints at each DDIM step, and of the same schemes only calibrated -> eps.json.

    python experiments/eps.py CKPT CKPT .. -n 16

For a checkpoint without the metrics.json of its run. All see the same walks of the teacher, which none was trained or
calibrated on. The mean over the steps is what train.py
prints; it is mostly the error at t = 0, where next to no noise is left to predict. The median step tells more.
"""
import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.runs import check_out, pick_device, positive, provenance, run_cli, write_json  # noqa: E402
from sample import CHECKPOINTS, load_model, name_of  # noqa: E402
from train import eps_errors, quantized_copy, trajectories  # noqa: E402

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT")
    parser.add_argument("-n", type=positive, default=64, help="unseen walks (64)")
    parser.add_argument("--out", default=str(HERE / "eps.json"))
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out)
    device, start, rows = pick_device(args.device), time.time(), {}
    teacher = load_model(CHECKPOINTS / "teacher.pt", device).requires_grad_(False)
    walks = functools.lru_cache(lambda n, steps, seed: trajectories(teacher, n, steps, seed))
    for path in args.checkpoints:
        student = load_model(path, device, kind=("quantized",))
        scheme = student.hqdm
        calibration, unseen = (walks(n, len(scheme.timesteps), seed) for n, seed in ((32, 1_000_000), (args.n, 2_000_000)))
        before = eps_errors(quantized_copy(teacher, scheme, calibration), unseen)
        after = eps_errors(student, unseen)
        rows[name_of(path)] = {
            "untrained": statistics.fmean(before), "trained": statistics.fmean(after),
            "median_times_smaller": statistics.median(b / a for b, a in zip(before, after)),
            "bytes": Path(path).stat().st_size, "untrained_at_t": before, "trained_at_t": after}
        print(name_of(path), json.dumps({k: v for k, v in rows[name_of(path)].items() if not k.endswith("_t")}), flush=True)
        write_json(args.out, {"rows": rows, **provenance(vars(args), device, time.time() - start)})


if __name__ == "__main__":
    run_cli(main)
