"""Make the README's table and its sentence on exactness from the JSON files beside this one: no number in them is typed by hand.

    python experiments/table.py            # print them
    python experiments/table.py --write    # put them into README.md, each between its two markers

scores.json is what sample.py --score wrote, NAME.json the metrics.json of the run that made each checkpoint,
exact-cpu.json what exact.py counted, bench.json what bench.py measured.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def read(name):
    return json.loads((HERE / name).read_text())


def name_of(path):
    """checkpoints/NAME.pt or runs/NAME/model.pt -> NAME."""
    path = Path(path)
    return path.parent.name if path.stem == "model" else path.stem


def results():
    """Markdown: one row a checkpoint, from scores.json and the runs' metrics."""
    report = read("scores.json")
    lines = ["| model | C-FID | C-IS | class accuracy | PSNR dB | eps error, untrained -> trained | file MB | training s |",
             "|---|---|---|---|---|---|---|---|"]
    first, scores = next(iter(report["scores"].values())), report["scores"]
    for path, s in scores.items():
        run = read(f"{name_of(path)}.json")
        quantized = "eps_error" in run
        psnr = f"{s['psnr']:.1f}" if quantized else ""
        error = f"{run['eps_error_untrained']:.4f} -> {run['eps_error']:.4f}" if quantized else ""
        lines.append(f"| {name_of(path)} | {s['c_fid']:.1f} | {s['c_is']:.2f} ({s['c_is'] / first['c_is']:.1%}) | {s['accuracy']:.1%} "
                     f"| {psnr} | {error} | {run['bytes'] / 1e6:.2f} | {run['seconds']:.0f} |")
    n, seed = report["settings"]["n"], report["settings"]["seed"]
    lines.append(f"\n{n:,} pictures a row, {report['settings']['steps']} DDIM steps, guidance {report['settings']['guidance']:g}, seed {seed}, one "
                 f"training run each (seed {run['settings']['seed']}); {report['hardware']}, torch {report['torch']}, {report['date']}.")
    return "\n".join(lines) + "\n"


def exact():
    """Markdown: integer against fake-quantized arithmetic, its equality from exact-cpu.json and its speed from bench.json."""
    report, speed = read("exact-cpu.json"), read("bench.json")["cpu2"]["figures"]
    rows = report["checkpoints"].values()
    sums, pictures = sum(r["sums"] for r in rows), sum(2 * r["pictures"] for r in rows)
    bad = sum(r["sums_that_differ"] for r in rows), sum(r["pictures_that_differ_A"] + r["pictures_that_differ_B"] for r in rows)
    return (f"{', '.join(map(name_of, report['checkpoints']))} on a CPU: {bad[0]} of {sums:,} comparisons of a sum differ (fake against view A, view B and "
            f"int64), and {bad[1]} of {pictures} of a picture (views A and B, which are two computations for single alone). "
            f"W4A3 single draws {speed['integer_vs_fake_sampling']:.2f} times as fast in integers as fake-quantized and {speed['integer_vs_float_sampling']:.2f} "
            f"times as fast as the float model (2 cores, `experiments/bench.py`).\n")


SECTIONS = {"results": results, "exact": exact}


def markers(name):
    return f"<!-- {name}: experiments/table.py -->\n", f"<!-- end of {name} -->\n"


def main():
    text = README.read_text()
    for name, make in SECTIONS.items():
        start, end = markers(name)
        if "--write" not in sys.argv:
            print(make())
        elif start not in text or end not in text:
            sys.exit(f"README.md has no markers for {name}")
        else:
            head, _, rest = text.partition(start)
            text = head + start + make() + end + rest.partition(end)[2]
    if "--write" in sys.argv:
        README.write_text(text)


if __name__ == "__main__":
    main()
