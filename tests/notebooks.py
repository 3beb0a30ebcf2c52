"""Run the notebooks and compare what they print with what is committed; --write commits what they print now.

    python tests/notebooks.py                  # all of them: CI
    python tests/notebooks.py --write hadamard # run one, and keep its outputs

Words must be equal, numbers nearly: within 3 % or 0.002, and up to 12 of a count of thousands. Cells with the tag
`timing` are only run. Pictures are not compared: look at them.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.runs import new_parser, run_cli  # noqa: E402

FOLDER = ROOT / "notebooks"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def printed(notebook):
    """{cell id: text} of what cells printed, but for those with the tag timing."""
    return {c.id: "".join(o.get("text", "") for o in c.outputs if o.get("name") == "stdout")
            for c in notebook.cells if c.cell_type == "code" and "timing" not in c.metadata.get("tags", [])}


def differ(old, new):
    """Whether two texts have other words, or numbers that are not nearly the same."""
    if NUMBER.sub("#", old).split() != NUMBER.sub("#", new).split():
        return True
    pairs = zip(*([float(v.replace(",", "")) for v in NUMBER.findall(text)] for text in (old, new)))
    return any(abs(a - b) > max(0.03 * abs(a), 0.002) and not (abs(a) >= 1000 and abs(a - b) <= 12) for a, b in pairs)


def main():
    every, wrong = sorted(path.stem for path in FOLDER.glob("*.ipynb")), 0
    parser = new_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)} (all)")
    parser.add_argument("--write", action="store_true", help="keep what they print")
    args = parser.parse_args()
    if unknown := set(args.names) - set(every):
        raise ValueError(f"there is no notebook {unknown.pop()}; choose from {', '.join(every)}")
    for path in (FOLDER / f"{name}.ipynb" for name in args.names or every):
        committed = nbformat.read(path, as_version=4)
        run = nbformat.from_dict(committed)
        ExecutePreprocessor(timeout=300, record_timing=False).preprocess(run, {"metadata": {"path": str(FOLDER)}})
        old, new = printed(committed), printed(run)
        if args.write:
            nbformat.write(run, path)
            old = new
        for cell in new:
            if differ(old[cell], new[cell]):
                wrong += 1
                print(f"{path.name} {cell} printed\n{new[cell]}\nand not\n{old[cell]}")
        print(f"{path.name}: {len(new)} cells compared", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run_cli(main)
