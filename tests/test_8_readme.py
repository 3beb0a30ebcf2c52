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
    teacher, none, single = (score[n] for n in ("teacher", "w4a3-none", "w4a3-single"))
    assert single["c_is"] >= 0.92 * teacher["c_is"]
    assert single["c_fid"] < 0.95 * none["c_fid"] and single["psnr"] > none["psnr"] + 0.5        # beats none
    assert table.read("w4a3-single.json")["eps_error"] < 0.95 * table.read("w4a3-none.json")["eps_error"]
    assert abs(single["c_is"] / none["c_is"] - 1) < 0.015                                        # level in C-IS
    assert 1.5 * table.read("teacher-curve.json")[-1]["c_fid"] < teacher["c_fid"] and teacher["n"] < 5000          # few pictures, a higher C-FID
    for curve_of in ("teacher-curve.json", "teacher-plain-curve.json"):                          # the lowest C-FID came well before the end
        fids = [r["c_fid"] for r in table.read(curve_of)]
        assert fids.index(min(fids)) < 0.65 * len(fids) and fids[-1] > 1.2 * min(fids)
    run = {(r["rotation"], r["order"], r["steps"]): r for r in curve}
    for order, steps in [("pool", 1), ("pool", 30), ("pool", 100), ("pool", 300), ("trajectory", 500)]:
        h, without = run["single", order, steps], run["none", order, steps]
        assert h["c_is"] > without["c_is"] and h["c_fid"] < without["c_fid"] and h["eps_error"] < without["eps_error"]
    first, last = ({r: run[r, "pool", steps] for r in ("none", "double", "single")} for steps in (1, 1000))
    assert first["none"]["c_is"] < 1.5 and min(first["double"]["c_is"], first["single"]["c_is"]) > 6      # after one update: noise, pictures
    assert run["none", "trajectory", 500]["c_fid"] > 2 * run["single", "trajectory", 500]["c_fid"]         # in the paper's order far behind
    assert run["none", "pool", 300]["c_fid"] < 1.15 * run["single", "pool", 300]["c_fid"]                  # the pool teaches nearly all of it
    for key, share in (("eps_error", 1.05), ("c_is", 1.01)):                                     # level after 1,000 updates of the earlier teacher
        assert max(r[key] for r in last.values()) < share * min(r[key] for r in last.values())
    rows = table.read("rates.json")["rows"]
    rates = {r["factors"]["z_x"]: r["eps_error"] for r in rows if r["rotation"] == "none"}
    assert rates[0] == rates[1] and 0.6 < rates[4] / rates[1] < 0.7                              # zero points that do not move, or at four times the rate
    assert rates[16] < min(r["eps_error"] for r in rows if r["rotation"] == "single")
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
