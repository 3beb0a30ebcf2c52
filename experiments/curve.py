"""What training does to the three rotations: scores after 1 .. 1,000 updates, and in the paper's order of steps.

    python experiments/curve.py      # reads runs/, writes experiments/curve.json and curve.png

The runs and their scores come from `bash experiments/all.sh quantized curve`: W4A3, seed 0, one run a point.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.runs import new_parser, run_cli, whole_file, write_json  # noqa: E402

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
COLOURS = {"none": "C3", "double": "C0", "single": "C2"}


def collect():
    """One row a run: rotation, order, updates, eps error, its scores."""
    report, rows = json.loads((RUNS / "curve" / "scores.json").read_text()), []
    for path, scores in report.pop("scores").items():
        if path == "checkpoints/teacher.pt":
            report["teacher"] = scores
            continue
        run = json.loads((HERE.parent / path).with_name("metrics.json").read_text())
        settings = {key: run["settings"][key] for key in ("rotation", "order", "steps")}
        rows.append({**settings, "eps_error": run["eps_error"], **scores})
    return {"rows": rows, **report}


def plot(report, path):
    """C-FID and C-IS against updates: lines for mixed steps, crosses for the paper's order, dashes for the teacher."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 3.4), layout="constrained")
    axes = fig.subplots(1, 2)
    for ax, key, title in zip(axes, ("c_fid", "c_is"), ("C-FID (lower is better)", "C-IS (higher is better)")):
        for rotation, colour in COLOURS.items():
            for order, style, size in (("mixed", "o-", 5), ("trajectory", "x", 9)):
                rows = [r for r in report["rows"] if (r["rotation"], r["order"]) == (rotation, order)]
                points = sorted((r["steps"], r[key]) for r in rows)
                label = rotation if order == "mixed" else None
                ax.plot(*zip(*points), style, color=colour, markersize=size, label=label)
        ax.plot([], [], "x", color="0.3", markersize=9, label="the paper's order")
        ax.axhline(report["teacher"][key], color="0.4", linestyle="--", linewidth=1, label="float")
        ax.set(xscale="log", xlabel="updates", title=title, yscale="log" if key == "c_fid" else "linear")
    ticks = [5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 300, 500]
    low, high = axes[0].get_ylim()
    axes[0].set_yticks([t for t in ticks if low < t < high], [t for t in ticks if low < t < high])
    axes[0].minorticks_off()
    axes[1].legend(loc="lower right")
    with whole_file(path) as part:
        fig.savefig(part, dpi=110, format="png")


def main():
    new_parser(__doc__).parse_args()
    report = collect()
    write_json(HERE / "curve.json", report)
    plot(report, HERE / "curve.png")
    for r in sorted(report["rows"], key=lambda r: (r["order"], r["steps"])):
        print(f"{r['order']:10s} {r['steps']:5d} {r['rotation']:6s} C-FID {r['c_fid']:6.1f}  C-IS {r['c_is']:.2f}  "
              f"eps error {r['eps_error']:.5f}")


if __name__ == "__main__":
    run_cli(main)
