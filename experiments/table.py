"""Make the README's tables and its sentence on exactness from the JSON files beside this one: no number in them is typed by hand.

    python experiments/table.py            # print them
    python experiments/table.py --write    # put them into README.md, each between its two markers

scores.json and scores-200.json (200 DDIM steps) are what sample.py --score wrote, real.json what real.py did, NAME.json the metrics.json of the run that made each checkpoint,
teacher-curve.json what its EMA drew on the way, teacher-plain.json and teacher-plain-curve.json the same of a run without dropout,
options.json what options.py tried spacing.json and rates.json what those did, overfit.json and overfit-dropout.json what overfit.py measured, exact-cpu.json and exact-cuda.json what exact.py counted, bench.json what bench.py measured.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import run_cli  # noqa: E402

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def read(name):
    return json.loads((HERE / name).read_text())


def name_of(path):
    """checkpoints/NAME.pt or runs/NAME/model.pt -> NAME."""
    path = Path(path)
    return path.parent.name if path.stem == "model" else path.stem


def results():
    """Markdown: one row a checkpoint, from scores.json and the runs' metrics; above them what real images get."""
    report, real = read("scores.json"), read("real.json")["rows"]["test images"]
    lines = ["| model | C-FID | C-IS | class accuracy | PSNR dB | eps error, untrained -> trained | file MB | training s |",
             "|---|---|---|---|---|---|---|---|",
             f"| {real['n']:,} real test images | {real['c_fid']:.1f} | {real['c_is']:.2f} | {real['accuracy']:.1%} | | | | |"]
    first, scores = next(iter(report["scores"].values())), report["scores"]
    for path, s in scores.items():
        run = read(f"{name_of(path)}.json")
        quantized = "eps_error" in run
        psnr = f"{s['psnr']:.1f}" if quantized else ""
        error = f"{run['eps_error_untrained']:.4f} -> {run['eps_error']:.4f}" if quantized else ""
        lines.append(f"| {name_of(path)} | {s['c_fid']:.1f} | {s['c_is']:.2f} ({s['c_is'] / first['c_is']:.1%}) | {s['accuracy']:.1%} "
                     f"| {psnr} | {error} | {run['bytes'] / 1e6:.2f} | {run['seconds']:.0f} |")
    n, seed = report["settings"]["n"], report["settings"]["seed"]
    lines.append(f"\n{n:,} pictures a model, {report['settings']['steps']} DDIM steps, guidance {report['settings']['guidance']:g}, seed {seed}; drawn and scored on "
                 f"{report['hardware']}, torch {report['torch']}, {report['date']}. One training run each (seed {run['settings']['seed']}), on {run['hardware']}.")
    return "\n".join(lines) + "\n"


def long_run(name):
    """Text: how a teacher was trained and what its EMA drew on the way, from NAME.json and NAME-curve.json."""
    run, curve = read(f"{name}.json"), read(f"{name}-curve.json")
    fids, images = (", ".join(values) for values in zip(*((f"{r['c_fid']:.1f}", f"{r['images'] / 1e6:.0f}") for r in curve)))
    # what is bundled was trained before provenance knew of torchrun
    command = re.sub("^python ", f"torchrun --nproc_per_node={run['processes']} " if run["processes"] > 1 else "python ", run["command"])
    return (f"`{command.replace(' --resume', '')}`, {run['seconds'] / 60:.0f} minutes on {run['processes']} {run['hardware']}{', resumed on the way' * run['settings']['resume']}: "
            f"C-FID {fids} after {images} M images, at the end C-IS {curve[-1]['c_is']:.2f} and class accuracy {curve[-1]['accuracy']:.2%} (`experiments/{name}-curve.json`)")


def by_heart(name, checkpoint):
    """Text: by how much a teacher's error on test images is above that on training images, from the JSON of overfit.py."""
    rows = [r for r in read(name)["rows"] if r["checkpoint"] == checkpoint]
    train, test = (sum(r["error"] for r in rows if r["images"] == images) for images in ("train", "test"))
    return f"{test / train - 1:.1%}"


def teacher():
    """Markdown: what was tried for the teacher, from options.json; the two long runs."""
    rows = read("options.json")["rows"]
    first, overfit, whole = rows["plain"]["settings"], read("overfit.json")["rows"], read("teacher-curve.json")[-1]
    half, fine = (read(name)["scores"]["checkpoints/teacher.pt"] for name in ("scores.json", "scores-200.json"))
    names = {name: f"{name}, dropout 0" if row["settings"]["dropout"] == 0 and "dropout" not in name else name for name, row in rows.items()}
    names["plain"] = f"batch {first['batch']}, rate {first['lr']:g}, {first['shape']} decay, dropout {first['dropout']}"
    return (f"**The teacher**: {long_run('teacher')}. Its half-precision file has C-FID {half['c_fid']:.2f} and C-IS {half['c_is']:.3f} (float32: {whole['c_fid']:.2f}, {whole['c_is']:.3f}); "
            f"with {read('scores-200.json')['settings']['steps']} DDIM steps instead of {read('scores.json')['settings']['steps']}, {fine['c_fid']:.2f} and {fine['c_is']:.3f}. A run before it, not bundled: {long_run('teacher-plain')}. "
            f"Both had their lowest C-FID well before the end; why it rises is not settled. They know their images by heart a little: the error of the noise on {overfit[0]['n']:,} test images was above that on as many training images by "
            f"{by_heart('overfit.json', 'runs/teacher-plain/last.pt')} after update {overfit[0]['updates']:,} of the earlier run and by {by_heart('overfit.json', 'runs/teacher-plain/model.pt')} "
            f"at its end, at the end of the bundled one, with dropout, by {by_heart('overfit-dropout.json', 'checkpoints/teacher.pt')} (t = {', '.join(str(t) for t in dict.fromkeys(r['t'] for r in overfit))}; "
            f"`experiments/overfit.py`).\n"
            f"Tried before, one run of {rows['plain']['images'] / 1e6:.1f} M images each, C-FID / C-IS (`experiments/options.py`): "
            + "; ".join(f"{names[name]}: {r['c_fid']:.1f} / {r['c_is']:.2f}" for name, r in rows.items())
            + ". So short a run gains from a small batch; the long ones took large ones for their speed.\n")


def findings():
    """Markdown: what the transform is worth, from curve.json, scores.json, spacing.json and rates.json; goals that were missed."""
    curve, rates, spacing, report = read("curve.json"), read("rates.json"), read("spacing.json"), read("scores.json")
    run = {(r["rotation"], r["order"], r["steps"]): r for r in curve["rows"]}
    teacher, none, double, single = (next(s for path, s in report["scores"].items() if name_of(path) == n)
                                     for n in ("teacher", "w4a3-none", "w4a3-double", "w4a3-single"))
    fine = read("scores-200.json")
    factors = [f"{run['none', 'pool', n]['c_fid'] / run['single', 'pool', n]['c_fid']:.2f}" for n in (1, 30, 100, 300, 1000)]
    walks = ", ".join(f"{r} {run[r, 'trajectory', 500]['c_fid']:.1f}" for r in ("none", "double", "single"))
    errors = " and ".join(f"{run[r, 'pool', 1000]['eps_error']:.5f}" for r in ("none", "single"))
    spaced = ", ".join(f"{r['c_fid']:.1f} for p = {r['power']:g}" for r in spacing["rows"])
    short = {(r["ends"], r["factors"]["z_x"]): r for r in rates["rows"] if r["rotation"] == "none"}
    old, quick, ours = short[False, 1], short[False, 16], short[True, 1]
    best = min(r["eps_error"] for r in rates["rows"] if r["rotation"] == "single")
    return (f"**When does H matter?** Most when training is short: after 1, 30, 100, 300 and 1,000 updates the baseline's C-FID is {', '.join(factors)} times single's, "
            f"though the eps errors, which training sees, are level at the end ({errors}). W4A3, {curve['settings']['n']:,} pictures a point, one run each "
            f"(`experiments/curve.json`). In the paper's order of steps (crosses) double beats none and single does not: C-FID {walks}.\n\n"
            f"**Not reached.** Our goal was that single beats none and double in both scores after 1,000 updates: it beats none, and double by only "
            f"{double['c_fid'] / single['c_fid'] - 1:.1%} in C-FID and {single['c_is'] / double['c_is'] - 1:.1%} in C-IS, one run each; in PSNR none is ahead. "
            f"C-FID with {report['settings']['steps']} DDIM steps should be within 10% of that with {fine['settings']['steps']} and is "
            f"{teacher['c_fid'] / fine['scores']['checkpoints/teacher.pt']['c_fid'] - 1:.0%} above. Steps at 999 u^p, closer together near the picture, regain part of it: "
            f"{spaced} ({spacing['settings']['n']} pictures, `experiments/spacing.py`); the paper's are even, and so are ours.\n\n"
            f"**A baseline is worth its zero points.** On the usual grid, whose two ends only shrink together, none starts with {old['eps_error_untrained'] / ours['eps_error_untrained']:.1f} "
            f"times the eps error of ours and has {old['eps_error'] / ours['eps_error']:.1f} times after {rates['settings']['steps']} updates, or {quick['eps_error'] / ours['eps_error']:.1f} times where its zero "
            f"points learn sixteen times as fast (short runs of {rates['settings']['ddim_steps']} DDIM steps, `experiments/rates.json`). There H seems to do wonders; yet in those runs our none ({ours['eps_error']:.4f}) "
            f"is ahead of single ({best:.4f}) in eps error, if not in the scores above.\n")


def exact():
    """Markdown: integer against fake-quantized arithmetic, from exact-cpu.json and, where there is one, exact-cuda.json."""
    parts = []
    for report in (read(path.name) for path in sorted(HERE.glob("exact-*.json"))):
        rows = report["checkpoints"].values()
        sums, pictures = sum(r["sums"] for r in rows), sum(2 * r["pictures"] for r in rows)
        bad = sum(r["sums_that_differ"] for r in rows), sum(r["pictures_that_differ_A"] + r["pictures_that_differ_B"] for r in rows)
        cpu = report["hardware"].startswith("cpu")
        parts.append(f"{', '.join(map(name_of, report['checkpoints']))} on {'a CPU' if cpu else 'an ' + report['hardware']}: {bad[0]} of {sums:,} "
                     f"comparisons of a sum differ (fake against view A, view B{' and int64' * cpu}), and {bad[1]} of {pictures} of a picture")
    return "; ".join(parts) + ". Views A and B are two computations for single alone.\n"


def speed():
    """Markdown: the figures of bench.json, a column each for the GPU and the CPU."""
    report = read("bench.json")
    gpu, cpu = report["h200"], report["cpu2"]
    g, c = gpu["figures"], cpu["figures"]

    def of(entry, part, key, what, **where):
        return next(r[key] for r in entry["parts"][part] if r["what"] == what and all(r[k] == v for k, v in where.items()))

    def transform(f):
        return f"{f['hadamard_fraction_of_copy']:.2f} ({f['hadamard_error']:.0e}); {f['there_and_back_in_copies']:.1f}"

    def rates(entry):
        return " / ".join(f"{of(entry, 'sampling', 'images_per_s_50', what):.3g}" for what in ("float", "w4a3-single, fake", "w4a3-single, integer B"))

    def ratios(entry, batches, what=None):
        return " / ".join(f"{of(entry, 'update', 'of_float', what, batch=b) if what else entry['figures'][f'qat_update_ratio_b{b}']:.2f}" for b in batches)

    lines = ["| what | NVIDIA H200 | 2 CPU cores | part of `experiments/bench.py` |", "|---|---|---|---|",
             f"| H x in float32, share of a copy's speed (error); time of H, quantize, H back in copies "
             f"| {transform(g)} | {transform(c)} | hadamard |",
             f"| one quantized update / one float update, batch 128 / 512 (CPU 4 / 16), slowest rotation | {ratios(gpu, (128, 512))} | {ratios(cpu, (4, 16))} | update |",
             f"| the same, layers computed as in the authors' code | {ratios(gpu, (128, 512), WAY)} | {ratios(cpu, (4, 16), WAY)} | update |",
             f"| pictures a second at 50 steps: float / fake-quantized / integer, W4A3 single | {rates(gpu)} | {rates(cpu)} | sampling |"]
    speeds = {r["what"]: r["images_per_s"] for r in gpu["parts"]["training"]}
    compiled = " / ".join(f"{speeds['ours'] / speeds[f'{name}, compiled']:.1f}" for name in ("denoising-diffusion-pytorch", "diffusers UNet2DModel"))
    lines.append(f"| float training, images a second, batch 512 / 1,024 (CPU 8); as many times denoising-diffusion-pytorch / diffusers (compiled) "
                 f"| {speeds['ours']:,.0f} / {speeds['ours, batch 1024']:,.0f}; {g['float_vs_ddpm_pytorch']:.1f} / {g['float_vs_diffusers']:.1f} ({compiled}) | {c['float_images_per_s']:.0f} | training |")
    gpus = report["h100"]["parts"]["scaling"]
    one, two = (f"{r['images_per_s']:,.0f}" for r in gpus if r["images_per_s"])
    others = "".join(f"; {r['what']} not measured" for r in gpus if not r["images_per_s"])
    lines.append(f"| the same by torchrun on 1 / 2 GPUs, 512 images each | on H100: {one} / {two}, {report['h100']['figures']['ddp_speedup_2']:.2f} times{others} | | scaling |")
    lines.append(f"| seconds of `make test` / the notebook / `make train` | | {c['seconds_tests']:.0f} / {c['seconds_notebook']:.0f} / {c['seconds_train']:.0f} | commands |")
    return "\n".join(lines) + "\n"


WAY = "single, the authors' way"
SECTIONS = {"results": results, "teacher": teacher, "findings": findings, "exact": exact, "speed": speed}


def markers(name):
    return f"<!-- {name}: experiments/table.py -->\n", f"<!-- end of {name} -->\n"


def main():
    text = README.read_text()
    for name, make in SECTIONS.items():
        start, end = markers(name)
        if "--write" not in sys.argv:
            print(make())
        elif start not in text or end not in text:
            raise ValueError(f"README.md has no markers for {name}")
        else:
            head, _, rest = text.partition(start)
            text = head + start + make() + end + rest.partition(end)[2]
    if "--write" in sys.argv:
        README.write_text(text)


if __name__ == "__main__":
    run_cli(main)
