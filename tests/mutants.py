"""Do the tests notice? One token of the code is changed at a time, and the tests must fail: python tests/mutants.py

    python tests/mutants.py -n 150 hqdm.py          # 150 random changes of hqdm.py; unet.py and sample.py likewise
    python tests/mutants.py -n 80 unet.py --seed 1 --out experiments/mutants-unet.json

Changed are operators, comparisons, numbers, True and False, min and max, not docstrings and messages. Each mutant runs
in a copy of the repository; tests stop at the first failure or after five minutes, which counts as noticed. What
survives is printed with its line: some are equivalent (the program means the same), the others show a missing test.
A run that was cut off goes on from its --out; what survived there is tried again first, for the tests may have grown.
"""
import ast
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.runs import check_out, natural, new_parser, positive, run_cli, write_json  # noqa: E402

OTHER = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "//", "**": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
         "==": "!=", "!=": "==", "and": "or", "or": "and", "not": "", "True": "False", "False": "True", "min": "max",
         "max": "min", "amin": "amax", "amax": "amin", "&": "|", "|": "&", "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+="}
TESTS = {"hqdm.py": "12346", "unet.py": "56", "sample.py": "6"}     # which test files know the module, quickest first


def mutants(source):
    """All (line, column, old, new) whose replacement still compiles and is no part of an import or a raised message."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise)):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    found, lines = [], source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), old = token.start, token.string
        new = str(int(old) + 1) if token.type == tokenize.NUMBER and old.isdigit() else OTHER.get(old)
        if new is None or row in skipped:
            continue
        line = lines[row - 1]
        changed = line[:column] + new + line[column + len(old):]
        try:
            compile("".join([*lines[:row - 1], changed, *lines[row:]]), "mutant", "exec")
        except SyntaxError:
            continue
        found.append((row, column, old, new))
    return found


def noticed(folder, name, source, mutant):
    """Whether the tests in `folder`, a copy of the repository, fail with this change of its file `name`."""
    row, column, old, new = mutant
    lines = source.splitlines(keepends=True)
    lines[row - 1] = lines[row - 1][:column] + new + lines[row - 1][column + len(old):]
    (folder / name).write_text("".join(lines))
    files = sorted(str(p) for digit in TESTS[name] for p in (folder / "tests").glob(f"test_{digit}*.py"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main():
    parser = new_parser(__doc__)
    parser.add_argument("module", choices=list(TESTS))
    parser.add_argument("-n", type=positive, default=150, help="mutants to try (150)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", help="a JSON file; without it the survivors are only printed")
    args = parser.parse_args()
    check_out(args.out, ".json")
    source = (ROOT / args.module).read_text()
    chosen = mutants(source)
    random.Random(args.seed).shuffle(chosen)
    report = {"module": args.module, "seed": args.seed, "possible": len(chosen), "tried": 0, "survivors": []}
    if args.out and Path(args.out).is_file():
        report = json.loads(Path(args.out).read_text())
    lines = [line.strip() for line in source.splitlines()]
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__"))
        for s in list(report["survivors"]):          # where its line is gone, so is the mutant
            s["line"] = lines.index(s["text"]) + 1 if s["text"] in lines else None
            if not s["line"] or noticed(folder, args.module, source, (s["line"], s["column"], s["old"], s["new"])):
                report["survivors"].remove(s)
        for mutant in chosen[report["tried"]:args.n]:
            report["tried"] += 1
            if not noticed(folder, args.module, source, mutant):
                row, column, old, new = mutant
                found = {"line": row, "column": column, "old": old, "new": new, "text": lines[row - 1]}
                report["survivors"].append(found)
                print(f"{args.module}:{row}:{column}: {old} -> {new or 'nothing'}:  {found['text']}", flush=True)
            if args.out:
                write_json(args.out, report)
        if args.out:
            write_json(args.out, report)
    left = len(report["survivors"])
    print(f"{args.module}: {report['tried']} mutants of {report['possible']}, {report['tried'] - left} noticed, {left} not")


if __name__ == "__main__":
    run_cli(main)
