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

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
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
    write, names = "--write" in sys.argv, [a for a in sys.argv[1:] if not a.startswith("--")]
    wrong = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        committed = nbformat.read(path, as_version=4)
        run = nbformat.from_dict(committed)
        ExecutePreprocessor(timeout=300).preprocess(run, {"metadata": {"path": str(FOLDER)}})
        old, new = printed(committed), printed(run)
        if write:
            nbformat.write(run, path)
            old = new
        for cell in new:
            if differ(old[cell], new[cell]):
                wrong += 1
                print(f"{path.name} {cell} printed\n{new[cell]}\nand not\n{old[cell]}")
        print(f"{path.name}: {len(new)} cells compared", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
