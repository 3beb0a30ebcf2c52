"""What the README and the docstrings say is so: snippets run, numbers come from JSON, names exist."""
import ast
import doctest
import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT

import hqdm

sys.path.insert(0, str(ROOT / "experiments"))
README = (ROOT / "README.md").read_text()
MODULES = ["hqdm", "unet", "sample", "train"]


def test_doctests():
    """The method by hand in four numbers: squared error 3.00 without H, 0.25 with it."""
    result = doctest.testmod(hqdm)
    assert result.attempted >= 6 and result.failed == 0


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_snippets_run(snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_is_short_and_its_files_exist():
    assert len(README.splitlines()) < 150
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|ipynb|png|bin|pt|txt))`", README) + re.findall(r"\]\((experiments/[^)]+)\)", README):
        assert (ROOT / name).exists() or name == "samples.png", name


def test_readme_tables_are_made_from_json():
    """Not one number of the tables is typed by hand: they are exactly what experiments/table.py makes."""
    table = importlib.import_module("table")
    for name, make in table.SECTIONS.items():
        start, end = table.markers(name)
        assert make() == README.partition(start)[2].partition(end)[0] and len(make()) > 100


def test_what_the_readme_says_of_its_results():
    """Each sentence about the scores, "not reached" included, holds for the JSON that the tables are made from."""
    table = importlib.import_module("table")
    report, curve = table.read("scores.json"), table.read("curve.json")["rows"]
    score = {table.name_of(path): s for path, s in report["scores"].items()}
    teacher, none, double, single = (score[n] for n in ("teacher", "w4a3-none", "w4a3-double", "w4a3-single"))
    assert single["c_is"] >= 0.92 * teacher["c_is"]
    assert single["c_fid"] < 0.9 * none["c_fid"] and single["c_is"] > 1.01 * none["c_is"] and single["accuracy"] > none["accuracy"]      # beats none
    assert 1 < double["c_fid"] / single["c_fid"] < 1.05 and 1 < single["c_is"] / double["c_is"] < 1.005      # double only by a little
    assert none["psnr"] > single["psnr"] > 0.97 * none["psnr"]                                   # in PSNR none is ahead
    for curve_of in ("teacher-curve.json", "teacher-plain-curve.json"):                          # the lowest C-FID came well before the end
        fids = [r["c_fid"] for r in table.read(curve_of)]
        assert fids.index(min(fids)) < 0.65 * len(fids) and fids[-1] > 1.2 * min(fids)
    whole = table.read("teacher-curve.json")[-1]                                                 # half precision changes less than 1 %
    assert all(abs(teacher[key] / whole[key] - 1) < 0.01 for key in ("c_fid", "c_is", "accuracy"))
    run = {(r["rotation"], r["order"], r["steps"]): r for r in curve}
    ratio = {steps: run["none", "pool", steps]["c_fid"] / run["single", "pool", steps]["c_fid"] for steps in (1, 30, 100, 300, 1000)}
    assert ratio[1] > 1.3 * ratio[100] > 1.3 * 1.1 * ratio[1000] > 1.3 * 1.1 * 1.1               # most when training is short
    for steps in ratio:                                                                          # always ahead of none, level with double
        none, double, single = (run[r, "pool", steps] for r in ("none", "double", "single"))
        assert single["c_is"] > none["c_is"] and single["c_fid"] < none["c_fid"]
        assert steps == 1 or 0.95 < single["c_fid"] / double["c_fid"] < 1.05
    assert abs(none["eps_error"] / single["eps_error"] - 1) < 0.01                               # level after 1,000
    none, double, single = (run[r, "trajectory", 500] for r in ("none", "double", "single"))
    assert double["c_fid"] < 0.85 * none["c_fid"] and single["c_fid"] > none["c_fid"]            # in the paper's order double beats none, single does not
    rates = {r["ends"]: r for r in table.read("rates.json")["rows"] if r["rotation"] == "none" and r["factors"]["z_x"] == 1}
    assert all(rates[False][key] > 1.5 * rates[True][key] for key in ("eps_error_untrained", "eps_error"))       # zero points that are not searched
    assert rates[True]["eps_error"] < min(r["eps_error"] for r in table.read("rates.json")["rows"] if r["rotation"] == "single")      # ours is ahead there
    rows = {r["batch"]: r for r in table.read("bench.json")["h200"]["parts"]["training"] if r["what"].startswith("ours")}
    assert rows[512]["images_per_s"] < 20_000 < rows[1024]["images_per_s"]                       # missed at 512: by these two rows
    assert 0.25 < (2 * rows[512]["ms"] - rows[1024]["ms"]) / rows[512]["ms"] < 0.33              # near a third of a step does not grow
    fine = table.read("scores-200.json")["scores"]["checkpoints/teacher.pt"]
    assert teacher["c_fid"] > 1.1 * fine["c_fid"]                                                # 50 steps miss their goal
    even, *closer = table.read("spacing.json")["rows"]
    assert even["power"] == 1 and all(even["c_fid"] - (teacher["c_fid"] - fine["c_fid"]) < r["c_fid"] < even["c_fid"] for r in closer)    # part of it
    assert report["hardware"] and report["date"] and report["command"]


def test_legend_names_exist():
    """Every parameter of the legend of hqdm.py exists, with the shape that the legend itself gives."""
    legend = hqdm.__doc__.partition("symbol    in the code")[2].splitlines()
    size = dict(S=3, C_out=16, C_in=64, r=8, kh=3, kw=3)
    single, none = (hqdm.HQConv2d(torch.nn.Conv2d(64, 16, 3), rotation=r, clock=hqdm.Clock([9, 5, 0]), rank=8) for r in ("single", "none"))
    seen = []
    for line in legend:
        names = [n for n in ("log_s_x", "z_x", "log_s_w", "z_w", "lora_A", "lora_B") if n in line.split()]
        shapes = re.findall(r"\(([\w, ]+)\)", line.rpartition(names[-1])[2] if names else "")
        for name, shape in zip(names, shapes):
            numbers = tuple(size[n] if n in size else int(n) for n in re.findall(r"\w+", shape))
            assert tuple(getattr(none if name == "z_x" else single, name).shape) == numbers, line
            seen.append(name)
    assert len(seen) == 6 and not hasattr(single, "z_x")
    single.freeze()                                              # two 4-bit weights a byte
    assert single.q_w.dtype == torch.uint8 and len(single.q_w) == 16 * 64 * 9 // 2


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_they_may(module):
    """numpy, torch, einops, matplotlib, the standard library, and the modules before this one; hqdm tries Triton, a part of torch."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"numpy", "torch", "einops"} | ({"matplotlib"} if module in ("sample", "train") else {"triton"} if module == "hqdm" else set())
    assert names - set(sys.stdlib_module_names) <= allowed | set(MODULES[:MODULES.index(module)]) - ({"hqdm"} if module == "unet" else set())


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_are_documented(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    bare = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node) and node.name != "main"]
    assert bare == []
