"""What the pages and docstrings say is so: snippets run, numbers come from JSON, names exist, the house has its order."""
import ast
import copy
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import hqdm
import unet
from plumbing import kernels

sys.path.insert(0, str(ROOT / "experiments"))
README = (ROOT / "README.md").read_text()
MODULES = ["hqdm", "unet", "sample", "train"]
KERNELS = ["plumbing/kernels", "plumbing/norm", "plumbing/attention", "plumbing/blocks"]
FILES = [*MODULES, *KERNELS, "plumbing/kept", "plumbing/int8", "plumbing/runs"]


def test_doctests():
    """The method by hand in four numbers: squared error 3.00 without H, 0.25 with it."""
    result = doctest.testmod(hqdm)
    assert result.attempted >= 6 and result.failed == 0


ALONE = '''
import copy, doctest, torch, torch.nn as nn
import hqdm

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.mid = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.time, self.norm = nn.Linear(1, 64), nn.GroupNorm(8, 64)
        self.deep, self.token = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 64)
        self.conv_out = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.mid(torch.relu(self.conv_in(x)))
        h = self.norm(h + self.time(t.float()[:, None] / 1000)[:, :, None, None])
        h = torch.relu(self.deep(torch.relu(h)))
        h = h + self.token(h.movedim(1, -1)).movedim(-1, 1)
        return self.conv_out(h)

assert doctest.testmod(hqdm).failed == 0 and not hasattr(hqdm.int_product, "__wrapped__")
torch.manual_seed(0)
teacher, x, times = Net(), torch.randn(6, 3, 8, 8), (999, 500, 0)
student = copy.deepcopy(teacher)
rows = hqdm.quantize_network(student, hqdm.Scheme(4, 3, timesteps=times))
assert sum(r["float_bytes"] for r in rows) == 4 * sum(p.numel() for p in teacher.parameters())
hqdm.calibrate(student, teacher, [(x, torch.full((6,), t)) for t in times])
t, losses = torch.tensor([999, 500, 0] * 2), []
optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-3)
for _ in range(5):
    loss = (student(x, t) - teacher(x, t).detach()).square().mean()
    optimizer.zero_grad(), loss.backward(), optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
y = student(x, t)
hqdm.freeze(student)
assert torch.equal(student(x, t), y)
for view in "AB":
    hqdm.set_integer(student, True, view)
    assert torch.equal(student(x, t), y)
print("alone")
'''


def test_hqdm_alone(tmp_path):
    """In an empty folder, without plumbing: doctests; a network of one's own is quantized, trained, frozen, integer."""
    shutil.copy(ROOT / "hqdm.py", tmp_path)
    (tmp_path / "net.py").write_text(ALONE)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "net.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "alone\n", done.stderr


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_snippets_run(snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_is_short_and_its_files_exist():
    """Under 110 lines; each file and option that a page names is there, and each function that it sends to."""
    assert len(README.splitlines()) < 110
    pages = {ROOT: README, ROOT / "experiments": (ROOT / "experiments" / "README.md").read_text()}
    for folder, page in pages.items():
        names = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|ipynb|png|bin|json))`", page) + re.findall(r"\]\(([\w./-]+)\)", page)
        for name in names:
            made = name in ("samples.png", "loss.png")           # by a run
            assert made or (folder / name).exists() or (ROOT / name).exists(), name
    sources = {name: (ROOT / f"{name}.py").read_text() for name in MODULES}
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert f'"{option}"' in sources["sample"] + sources["train"], option
    sent = re.findall(r"`(\w+)`(?: and `(\w+)`)? in `(\w+)\.py`", README)
    assert len(sent) >= 2
    for *names, module in sent:
        assert all(re.search(rf"\b{name}\b", sources[module]) for name in names if name), names


def test_tables_are_made_from_json():
    """Not one number of the tables is typed by hand: they are exactly what experiments/table.py makes."""
    table = importlib.import_module("table")
    for path, sections in table.PAGES.items():
        page = path.read_text()
        for name, make in sections.items():
            start, end = table.markers(name)
            assert make() == page.partition(start)[2].partition(end)[0] and len(make()) > 100


def test_what_a_step_spends_is_counted_once(monkeypatch):
    """Operators and kernels by name; a network's milliseconds are all in some group."""
    steps = importlib.import_module("steps")
    of = {"aten::mm": "transform and rounding", "_norm_quantize_kernel": "transform and rounding", "_attend_kernel": "attention", "aten::addmm": "convolutions and matrix products",
          "sm90_xmma_fprop_implicit_gemm": "convolutions and matrix products", "onednn::qconv2d_pointwise": "convolutions and matrix products",
          "_int_kernel": "convolutions and matrix products", "fmha_cutlassF_f32": "attention", "_apply_kernel": "norms and SiLU",
          "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::addcmul": "scales and bias", "aten::cat": "additions, copies, the rest"}
    assert {name: steps.group_of(name) for name in of} == of
    monkeypatch.setattr(steps, "milliseconds", lambda *_: 7.254)
    row = steps.measure(torch.nn.Conv2d(3, 8, 3), (torch.randn(2, 3, 9, 9),), torch.device("cpu"))
    assert list(row) == ["ms", *steps.GROUPS, "Python"] and row["convolutions and matrix products"] > 0 and min(row.values()) >= 0
    assert row["ms"] == 7.25


def test_what_a_step_has_to_do():
    """Bytes and multiply-adds of one convolution and one norm, by hand."""
    steps, x = importlib.import_module("steps"), torch.randn(2, 32, 6, 6)
    net = torch.nn.Sequential(unet.GroupNorm(32), torch.nn.Conv2d(32, 5, 3))
    teacher = copy.deepcopy(net)
    hqdm.quantize_network(net, hqdm.Scheme(), eight_bits=())
    hqdm.calibrate(net, teacher, [(x,)])
    hqdm.set_integer(net)
    numbers, out = 2 * 32 * 6 * 6, 2 * 5 * 4 * 4
    assert steps.work(net, (x,)) == (4 * numbers + (4 + 1 + 1) * numbers + 4 * out, out * 32 * 3 * 3)
    assert not any(m._forward_hooks for m in net)


def test_means_deviations_and_goals_of_the_experiment():
    """From made-up rows: mean ± deviation over seeds, goals met and missed, intervals that touch and that do not."""
    results = importlib.import_module("results")
    same = {"wbits": 4, "abits": 3, "n": 9, "ddim_steps": 50, "steps": 7, "balance": 0.5, "part": "headline", "hardware": "x",
            "accuracy": 0.8, "psnr": 30.0, "brightness": -0.5, "contrast": 0.985, "megabytes": 5.27}
    top = {**same, "wbits": 32, "c_fid": 10.0, "c_is": 8.0}
    def rows(rotation, fids, scores, grid="midtread"):
        return [{**same, "rotation": rotation, "grid": grid, "seed": i, "c_fid": f, "c_is": c} for i, (f, c) in enumerate(zip(fids, scores))]
    made = [top, *rows("none", (20, 22, 24), (7.0, 7.1, 7.2)), *rows("single", (16, 17, 18), (7.6, 7.7, 7.8)),
            *rows("single", (15, 16, 26), (7.70, 7.75, 7.80), "midrise")]
    table, goals = results.headline(made), results.goals(made)
    assert "| W4A3 | none | 22.0 ± 2.0 | 7.100 ± 0.100, 88.8% |" in table and "W4A4" not in table and "| float | | 10.0 | 8.00, 100%" in table
    assert "single: C-IS 96.2% of float (goal 95.5%), C-FID 1.70 times (goal 1.65): met and missed." in goals
    assert "mid-rise grid: C-IS 96.9% of float (goal 97.0%), C-FID 1.90 times (goal 1.65): missed and missed." in goals
    assert "W4A3 none, as float draws it: PSNR 30.0 ± 0.0 dB (goal 29), brighter by -0.5 ± 0.0 levels (goal within 1), contrast 0.985 ± 0.000 (goal within 1%): missed." in goals
    assert "W4A3 single ahead of none in C-FID and in C-IS, with intervals that do not touch: met and met." in goals
    turned = [{**r, "rotation": {"none": "single", "single": "none"}[r["rotation"]]} for r in made[1:7]]     # apart, but behind
    assert "do not touch: missed and missed." in results.goals([top, *turned])
    pairs = results.pairs(made)
    assert "| W4A3 single against none | 5.0 ± 1.0 (3 of 3) | apart | 0.600 ± 0.000 (3 of 3) | apart |" in pairs
    assert "mid-rise grid against none | 3.0 ± 4.4 (2 of 3) | touch | 0.650 ± 0.050 (3 of 3) | apart |" in pairs and "double" not in pairs
    with pytest.raises(ValueError, match="holds no more"):                   # a finding that is none any more
        more = [*rows("double", (16, 17, 18), (7.6, 7.7, 7.8)), *({**r, "abits": 4} for r in made[1:]),
                *({**r, "abits": 4} for r in rows("double", (16, 17, 18), (7.6, 7.7, 7.8)))]
        tried = [{**r, "part": "tune", "walks": walks} for walks in ("teacher", "student") for r in made[-1:]]
        results.finding([*made, *more, *tried, *({**r, "part": "balance"} for r in made[1:])])
    assert results.headline(made, {(3, "single")}).count("| W4A3 ") == 1
    cost = [{**made[4], "part": "cost", "batch": batch, "seconds": s, "peak_gib": gib} for batch, s, gib in ((32, 90, 2.0), (128, 150, 6.25))]
    assert results.costs([*made, *cost, {**made[4], "part": "side", "batch": 32, "c_fid": 21.0}]) == (
        "batch 128 150 s, 6.2 GiB, C-FID 16.0; batch 32 90 s, 2.0 GiB, C-FID 21.0 (one x, seed 0)")
    assert "at batch 128: 150 s (goal 300), 6.2 GiB (goal under 11): met and met." in results.goals([*made, *cost])
    assert "at batch 128: 301 s (goal 300), 12.0 GiB (goal under 11): missed and missed." in results.goals(
        [*made, {**cost[1], "seconds": 301, "peak_gib": 12}])


def test_none_and_single_at_another_balance():
    """From made-up rows: both kinds and bits in words, with the lead seed by seed; refused where the lead is another."""
    results = importlib.import_module("results")
    fids = {("none", 3): (20, 21, 22), ("single", 3): (17.5, 18, 18.5), ("none", 4): (15, 15.5, 16), ("single", 4): (13, 13.5, 14)}
    made = [{"part": part, "wbits": 4, "abits": bits, "rotation": kind, "seed": seed, "n": 9000, "balance": 0.25,
             "c_fid": f + (part == "headline"), "c_is": 8 + seed / 10 + (kind == "single" and bits == 3) / 2}
            for part in ("balance", "headline") for (kind, bits), three in fids.items() for seed, f in reversed([*enumerate(three)])]
    said = results.balanced(made)
    assert "W4A3 none 21.0 ± 1.0 / 8.100 ± 0.100, single 18.0 ± 0.5 / 8.600 ± 0.100, ahead by 3.0 ± 0.5 in C-FID; W4A4 none" in said
    assert "none's best, 0.25," in said and "none has gained 1.0 there and single 1.0" in said
    for change in ({"c_fid": 19.5}, {"c_is": 7.0}):
        with pytest.raises(ValueError, match="holds no more"):
            results.balanced([{**r, **change} if (r["part"], r["rotation"]) == ("balance", "single") else r for r in made])


def test_what_the_pages_say_of_the_results():
    """Each sentence about the scores, "not reached" included, holds for the JSON that the tables are made from."""
    table, results = importlib.import_module("table"), importlib.import_module("results")
    rows = results.groups(results.read())
    by_seed = {key: sorted(found, key=lambda r: r["seed"]) for key, found in rows.items()}
    assert len(by_seed) == 8 and all([r["seed"] for r in found] == [0, 1, 2] for found in by_seed.values())
    none, double, single, midrise = (by_seed[3, name] for name in ("none", "double", "single", "midrise"))
    for a, b in zip(single, none):                                           # beats none in each seed
        assert a["c_fid"] < b["c_fid"] and all(a[key] > b[key] for key in ("accuracy", "psnr"))
    fid = {name: results.mean(r["c_fid"] for r in found) for (bits, name), found in by_seed.items() if bits == 3}
    assert results.finding(results.read()).count(" to ") > 5 and fid["midrise"] < fid["single"] < fid["none"]
    top = results.float_row(results.read(), midrise[0]["n"])
    plain, best = (f"{results.mean(r['c_is'] for r in found) / top['c_is']:.0%}" for found in (single, midrise))
    assert f"keeps {plain} of the Inception Score on the paper's grid, {best} on another" in README
    met = re.findall(r": (met|missed)( and (?:met|missed))?\.\n", results.goals(results.read()))
    assert len(met) == 12 and [m for m in met if "missed" in "".join(m)] == [("met", " and missed")] * 3   # C-IS apart
    made = {r["name"].removesuffix(f"-n{r['n']}"): r for r in results.of_part(results.read(), "clamp")}
    free, clamped = made["w4a3-single-midrise-plain"], made["w4a3-single-midrise-clamped"]
    assert 0.95 < free["fine_power"] < 1 and free["psnr"] > clamped["psnr"] + 3                  # no grain, hardly blur
    assert abs(free["brightness"]) < 1 < clamped["brightness"] and clamped["contrast"] < 0.97 < free["contrast"]
    for curve_of in ("teacher-curve.json", "teacher-plain-curve.json"):      # the lowest C-FID came well before the end
        fids = [r["c_fid"] for r in table.read(curve_of)]
        assert fids.index(min(fids)) < 0.65 * len(fids) and fids[-1] > 1.2 * min(fids)
    half, whole = table.read("scores-pool.json")["scores"]["checkpoints/teacher.pt"], table.read("teacher-curve.json")[-1]
    assert all(abs(half[key] / whole[key] - 1) < 0.01 for key in ("c_fid", "c_is", "accuracy"))  # half precision: under 1 %
    fine = table.read("scores-200.json")["scores"]["checkpoints/teacher.pt"]
    assert half["n"] == fine["n"] and half["c_fid"] > 1.1 * fine["c_fid"]                        # 50 steps miss their goal
    even, *closer = table.read("spacing.json")["rows"]
    assert even["power"] == 1 and all(even["c_fid"] - (half["c_fid"] - fine["c_fid"]) < r["c_fid"] < even["c_fid"] for r in closer)
    run = table.read("w4a3-single-cpu.json")                                 # the goal of half is missed, because of t = 0
    assert "{steps} updates, {ddim_steps} DDIM steps instead of 50".format(**run["settings"]) in README
    assert 1 < run["eps_error_untrained"] / run["eps_error"] < 2 and run["eps_errors_untrained"][-1] > 4 * sum(
        run["eps_errors_untrained"][:-1])
    for name in ("teacher", *table.BUNDLED):                     # the bundled files are as large as the table says
        assert 1 < (ROOT / "checkpoints" / f"{name}.pt").stat().st_size / table.eps_errors(name)[2] < 1.05
    for name in table.BUNDLED:                                               # the eps error is mostly the last step's
        _, after, _ = table.eps_errors(name)
        assert after[-1] == max(after) > 0.4 * sum(after)


def test_what_the_pages_say_of_earlier_runs():
    """The same of the learning rates and of the speed."""
    table = importlib.import_module("table")
    rows = [r for r in table.read("rates.json")["rows"] if (r["batch"], r["steps"]) == (8, 100)]
    rates = {r["ends"]: r for r in rows if r["rotation"] == "none" and r["factors"]["z_x"] == 1}
    assert all(rates[False][key] > 1.5 * rates[True][key] for key in ("eps_error_untrained", "eps_error"))
    assert rates[True]["eps_error"] < min(r["eps_error"] for r in rows if r["rotation"] == "single")
    bench = table.read("bench.json")
    speed = {r["batch"]: r for r in bench["h200"]["parts"]["training"] if r["what"].startswith("ours")}
    assert speed[512]["images_per_s"] < 20_000 < speed[1024]["images_per_s"]                     # the goal is for 512
    assert 0.2 < (2 * speed[512]["ms"] - speed[1024]["ms"]) / speed[512]["ms"] < 0.3            # what does not grow


def test_legend_names_exist():
    """Every parameter of the legend of hqdm.py exists, with the shape that the legend itself gives."""
    legend = hqdm.__doc__.partition("symbol    in the code")[2].splitlines()
    size = dict(S=3, C_out=16, C_in=64, r=8, kh=3, kw=3)
    single, none = (hqdm.HQConv2d(torch.nn.Conv2d(64, 16, 3), hqdm.Scheme(rotation=r, rank=8, timesteps=(9, 5, 0)))
                    for r in ("single", "none"))
    seen = []
    for line in legend:
        names = [n for n in ("log_s_x", "z_x", "log_s_w", "z_w", "lora_A", "lora_B") if n in line.split()]
        shapes = re.findall(r"\(([\w, ]+)\)", line.rpartition(names[-1])[2] if names else "")
        for name, shape in zip(names, shapes):
            numbers = tuple(size[n] if n in size else int(n) for n in re.findall(r"\w+", shape))
            layer = none if name == "z_x" else single
            assert tuple(getattr(layer.activations if "_x" in name else layer.weights, name).shape) == numbers, line
            seen.append(name)
    assert len(seen) == 6 and not hasattr(single.activations, "z_x")


@pytest.mark.parametrize("file", FILES)
def test_modules_import_only_what_they_may(file):
    """numpy, torch, einops, matplotlib; the modules before; plumbing knows none of the four; kernels may try Triton."""
    tree = ast.parse((ROOT / f"{file}.py").read_text())
    names = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    allowed = {"numpy", "torch", "einops", "plumbing"} | ({"triton"} if file in KERNELS else set())
    if file in ("sample", "plumbing/runs"):
        allowed.add("matplotlib")
    before = set(MODULES[:MODULES.index(file)]) if file in MODULES else set()
    assert names - set(sys.stdlib_module_names) <= allowed | before - ({"hqdm"} if file == "unet" else set())


@pytest.mark.parametrize("file", FILES)
def test_the_house_is_in_order(file):
    """Public functions have docstrings, but for kernels, whose definitions have theirs; no line has over 120 columns."""
    text = (ROOT / f"{file}.py").read_text()
    fast = set(kernels.FAST) if file in KERNELS else set()
    bare = [node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node) and node.name != "main"]
    assert set(bare) <= fast and max(map(len, text.splitlines())) <= 120
    if file == "hqdm":                               # definitions only: no GPU in them
        assert not re.search(r"triton|fast_gpu|torch\.cuda", text)


def test_the_forward_pass_is_short():
    """The paper's formula in about ten lines, within the first 350, without a branch on a device."""
    tree = ast.parse((ROOT / "hqdm.py").read_text())
    layer = next(n for n in tree.body if getattr(n, "name", "") == "HQLayer")
    forward = next(n for n in layer.body if getattr(n, "name", "") == "forward")
    source = ast.unparse(forward)
    assert forward.end_lineno <= 350 and forward.end_lineno - forward.lineno <= 12
    assert "is_cuda" not in source and source.count("device") == 1           # full_float32(x.device)
