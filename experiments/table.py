"""Make the README's table from the JSON files beside this one: no number in it is typed by hand.

    python experiments/table.py            # print it
    python experiments/table.py --write    # put it into README.md, between its two markers

scores.json is what sample.py --score wrote; NAME.json is the metrics.json of the run that made each checkpoint.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
START, END = "<!-- table: experiments/table.py -->\n", "<!-- end of table -->\n"


def name_of(path):
    """checkpoints/NAME.pt or runs/NAME/model.pt -> NAME."""
    path = Path(path)
    return path.parent.name if path.stem == "model" else path.stem


def table():
    """Markdown: one row a checkpoint, from scores.json and the runs' metrics."""
    report = json.loads((HERE / "scores.json").read_text())
    lines = ["| model | C-FID | C-IS | class accuracy | PSNR dB | eps error, untrained -> trained | MB | training s |",
             "|---|---|---|---|---|---|---|---|"]
    first, scores = next(iter(report["scores"].values())), report["scores"]
    for path, s in scores.items():
        run = json.loads((HERE / f"{name_of(path)}.json").read_text())
        quantized = "eps_error" in run
        psnr = f"{s['psnr']:.1f}" if quantized else ""
        error = f"{run['eps_error_untrained']:.4f} -> {run['eps_error']:.4f}" if quantized else ""
        lines.append(f"| {name_of(path)} | {s['c_fid']:.1f} | {s['c_is']:.2f} ({s['c_is'] / first['c_is']:.1%}) | {s['accuracy']:.1%} "
                     f"| {psnr} | {error} | {run['bytes'] / 1e6:.2f} | {run['seconds']:.0f} |")
    n, seed = report["settings"]["n"], report["settings"]["seed"]
    lines.append(f"\n{n:,} pictures a row, {report['settings']['steps']} DDIM steps, guidance {report['settings']['guidance']:g}, seed {seed}, one "
                 f"training run each (seed {run['settings']['seed']}); {report['hardware']}, torch {report['torch']}, {report['date']}.")
    return "\n".join(lines) + "\n"


def main():
    text = table()
    if "--write" not in sys.argv:
        print(text, end="")
        return
    head, _, rest = README.read_text().partition(START)
    README.write_text(head + START + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
