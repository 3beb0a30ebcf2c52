"""Tables and figures of the experiment, from results.json, which grid.py fills; table.py puts them into the pages.

    python experiments/results.py          # draw updates.png and spoil.png

walks.json has how the training was found.
"""
import json
import sys
from pathlib import Path
from statistics import fmean as mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.runs import new_parser, run_cli, whole_file  # noqa: E402
from train import WALKS  # noqa: E402

HERE = Path(__file__).resolve().parent
KINDS = {"none": "none", "double": "double", "single": "single", "midrise": "single, mid-rise grid"}
COLOURS = {"none": "C1", "double": "C3", "single": "C0", "midrise": "C2"}
# What the experiment was to reach: C-IS as a share of the float model's, and C-FID in times its, at most.
GOALS = {(4, "single"): (0.99, 1.15), (3, "single"): (0.955, 1.65), (3, "midrise"): (0.97, 1.65)}
CLAIMED = "+467.73%"             # of the Inception Score at W4A3: the paper's abstract, LDM-4 on ImageNet 256x256
PAIRS = (("single", "none"), ("double", "none"), ("midrise", "none"), ("double", "single"), ("midrise", "single"))
FAITHFUL = dict(psnr=29, brightness=1, contrast=0.01)            # and at W4A3: dB at least; grey levels and share, off at most


def read(name="results"):
    return json.loads((HERE / f"{name}.json").read_text())["rows"]


def kind(row):
    return "midrise" if (row["rotation"], row.get("grid")) == ("single", "midrise") else row["rotation"]


def of_part(rows, part):
    """The rows of a part but for the float model; where some are of fewer pictures, a try, without those."""
    found = [r for r in rows if r["part"] == part and r.get("wbits") != 32]
    return [r for r in found if r.get("n") == max(r.get("n", 0) for r in found)] if part != "cost" else found


def float_row(rows, n, steps=50):
    return next(r for r in rows if r.get("wbits") == 32 and (r["n"], r["ddim_steps"]) == (n, steps))


def recipes(rows):
    """Rows of part paper: by rotation; "searched": its none with searched zero points; "ours": our none without."""
    return {"ours" if not r.get("paper") else "searched" if r.get("searched") else r["rotation"]: r for r in of_part(rows, "paper")}


def groups(rows, part="headline"):
    """{(abits, kind): rows of all seeds, in order} of a part, more bits first."""
    found = {(a, k): sorted((r for r in of_part(rows, part) if (r["abits"], kind(r)) == (a, k)), key=lambda r: r["seed"])
             for a in (4, 3) for k in KINDS}
    return {key: seeds for key, seeds in found.items() if seeds}


def spread(values, digits=1, unit=1):
    """mean ± standard deviation, of one alone without it."""
    one = f"{mean(values) * unit:.{digits}f}"
    return f"{one} ± {stdev(values) * unit:.{digits}f}" if len(values) > 1 else one


def headline(rows, chosen=None):
    """Markdown: the float model, and mean ± deviation over seeds of each kind; chosen: some of (abits, kind)."""
    found = groups(rows)
    first = next(iter(found.values()))[0]
    top, size = float_row(rows, first["n"]), 2 * json.loads((HERE / "teacher.json").read_text())["parameters"]
    lines = ["| | rotation | C-FID (lower is better) | C-IS, share of float | class accuracy | PSNR to float, dB | MB (float: in half precision) |",
             "|---|---|---|---|---|---|---|",
             f"| float | | {top['c_fid']:.1f} | {top['c_is']:.2f}, 100% | {top['accuracy']:.1%} | | {size / 1e6:.1f} |"]
    for (abits, name), seeds in found.items():
        if chosen and (abits, name) not in chosen:
            continue
        c_is = [r["c_is"] for r in seeds]
        lines.append(f"| W4A{abits} | {KINDS[name]} | {spread([r['c_fid'] for r in seeds])} "
                     f"| {spread(c_is, 3)}, {mean(c_is) / top['c_is']:.1%} | {spread([r['accuracy'] for r in seeds], 1, 100)} % "
                     f"| {spread([r['psnr'] for r in seeds])} | {seeds[0]['megabytes']:.1f} |")
    seeds = sorted({r["seed"] for r in of_part(rows, "headline")})
    note = (f"\n{first['n']:,} pictures a model from the same noise, {first['ddim_steps']} DDIM steps, guidance 1; mean ± standard deviation "
            f"of training seeds {', '.join(map(str, seeds))}, {first['steps']:,} updates each at balance {first['balance']:g}, on "
            f"{first['hardware']} (`python experiments/grid.py headline`).")
    return "\n".join([*lines, note]) + "\n"


def finding(rows):
    """Text: what the headline rows say of the transform and of the grid, none of it where it does not hold."""
    found, fair = groups(rows), groups(rows, "balance")

    def lower(abits, name, other, found=found):
        """By how much the first's C-FID is lower, seed by seed."""
        return [b["c_fid"] - a["c_fid"] for a, b in zip(found[abits, name], found[abits, other], strict=True)]

    teachers, own = (next(r for r in of_part(rows, "tune") if (kind(r), r["walks"], r["balance"]) == ("midrise", walks, 0.5)) for walks in ("teacher", "student"))
    said = ((3, "single", "none"), (3, "midrise", "single"), (3, "midrise", "none"), (4, "single", "none"), (4, "double", "single"))
    again, sharper = lower(3, "single", "none", fair), [a["psnr"] - b["psnr"] for a, b in zip(found[3, "single"], found[3, "none"])]
    if (min(sharper + again + [gain for pair in said for gain in lower(*pair)]) <= 0 or mean(r["c_fid"] for r in fair[3, "none"]) > mean(r["c_fid"] for r in found[3, "none"]) or apart(found[3, "double"], found[3, "single"], "c_fid")
            or any(apart(found[a, "single"], found[a, "none"], "c_is") for a in (3, 4)) or not apart(fair[3, "single"], fair[3, "none"], "c_is") or own["c_fid"] > teachers["c_fid"] - 3):
        raise ValueError("what is said of the headline rows holds no more: write it anew")
    counts = {(kind(r), r["steps"]): r["c_fid"] for r in of_part(rows, "updates") + [r for r in found[3, "none"] + found[3, "single"] if r["seed"] == 0]}
    counts = {n: counts["none", n] / counts["single", n] for kind, n in sorted(counts) if kind == "none" and ("single", n) in counts}
    recipe, recipe_fid = ({name: r[key] for name, r in recipes(rows).items()} for key in ("c_is", "c_fid"))
    four = [mean(r["c_fid"] for r in seeds) for (abits, _), seeds in found.items() if abits == 4]
    by = {pair: f"{min(gains):.1f} to {max(gains):.1f}" for pair in said for gains in [lower(*pair)]}
    return (f"- **Does H help?** At W4A3 single's C-FID is below none's by {by[3, 'single', 'none']} in the three seeds, and its PSNR above by {mean(sharper):.1f} dB; C-IS does not tell them apart. At another balance, which suits none better, it leads by {min(again):.1f} to {max(again):.1f}, and in C-IS, too ([tuning](experiments/README.md#tuning)). It helps most in the first hundred updates: after "
            f"{', '.join(f'{n:,}' for n in counts)} updates none's C-FID is {', '.join(f'{v:.1f}' for v in counts.values())} times single's (seed 0).\n"
            f"- **The grid**: all eight levels, mid-rise, beat single's seven by {by[3, 'midrise', 'single']}, and none, which has eight, too, by {by[3, 'midrise', 'none']}. At W4A4 all kinds lie between {min(four):.1f} and {max(four):.1f}.\n"
            f"- **To rotate the weights, too**, did no harm that we see, unlike in the paper: double is not told apart from single at W4A3, and at W4A4 ahead by {by[4, 'double', 'single']} in the three seeds.\n"
            f"- **The paper's {CLAIMED}** of Inception Score over none at W4A3 is on ImageNet. By the paper's recipe single's C-IS here is {recipe['single'] / recipe['none'] - 1:.0%} above none's, and {recipe['single'] / recipe['searched'] - 1:.0%} once none has better zero points (C-FID: none {recipe_fid['none']:.0f}, then {recipe_fid['searched']:.0f}, single {recipe_fid['single']:.0f}; seed 0, `python experiments/grid.py paper`).\n"
            f"- **What helped most is not in the paper**: to train on the student's own sampling, towards the picture that the teacher draws from the same noise. It helps at 20 and 50 DDIM steps; at 10 C-FID gets worse. On the teacher's sampling mid-rise has a C-FID of {teachers['c_fid']:.1f}, on its own {own['c_fid']:.1f} "
            f"({own['n']:,} pictures, seed {own['seed']}, `python experiments/grid.py tune -n {own['n']}`).\n")


def apart(a, b, key):
    """Whether mean ± deviation of two lists of rows do not touch."""
    a, b = [r[key] for r in a], [r[key] for r in b]
    return abs(mean(a) - mean(b)) > stdev(a) + stdev(b)


def goals(rows):
    """Markdown: each goal of the experiment and what was reached."""
    found, lines = groups(rows), []
    top = float_row(rows, next(iter(found.values()))[0]["n"])
    for (abits, name), (share, times) in GOALS.items():
        if seeds := found.get((abits, name)):
            got_share, got_times = mean(r["c_is"] for r in seeds) / top["c_is"], mean(r["c_fid"] for r in seeds) / top["c_fid"]
            said = " and ".join("met" if ok else "missed" for ok in (got_share >= share, got_times <= times))
            lines.append(f"- W4A{abits} {KINDS[name]}: C-IS {got_share:.1%} of float (goal {share:.1%}), C-FID "
                         f"{got_times:.2f} times (goal {times}): {said}.")
    for name in KINDS:
        if seeds := found.get((3, name)):
            got = {key: mean(r[key] for r in seeds) for key in FAITHFUL}
            met = (got["psnr"] >= FAITHFUL["psnr"] and abs(got["brightness"]) <= FAITHFUL["brightness"]
                   and abs(got["contrast"] - 1) <= FAITHFUL["contrast"])
            all_of = {key: spread([r[key] for r in seeds], digits) for key, digits in (("psnr", 1), ("brightness", 1), ("contrast", 3))}
            lines.append(f"- W4A3 {KINDS[name]}, as float draws it: PSNR {all_of['psnr']} dB (goal {FAITHFUL['psnr']}), brighter by "
                         f"{all_of['brightness']} levels (goal within {FAITHFUL['brightness']}), contrast {all_of['contrast']} "
                         f"(goal within {FAITHFUL['contrast']:.0%}): {'met' if met else 'missed'}.")
    for part, where in (("headline", ""), ("balance", "at another balance, tried afterwards (see Tuning), ")):
        for abits in (4, 3):
            single, none = (groups(rows, part).get((abits, k), []) for k in ("single", "none"))
            if len(single) > 1 and len(none) > 1:
                ahead = [mean(sign * r[key] for r in single) > mean(sign * r[key] for r in none) and apart(single, none, key) for key, sign in (("c_fid", -1), ("c_is", 1))]
                lines.append(f"- W4A{abits} single ahead of none in C-FID and in C-IS, {where}with intervals that do not touch: {' and '.join('met' if a else 'missed' for a in ahead)}.")
    for r in [r for r in rows if r["part"] == "cost" and r["batch"] == 128]:
        said = " and ".join("met" if ok else "missed" for ok in (r["seconds"] <= 300, r["peak_gib"] < 11))
        lines.append(f"- From the bundled teacher to W4A3 single at batch 128: {r['seconds']:.0f} s (goal 300), {r['peak_gib']:.1f} GiB (goal under 11): {said}.")
    return "\n".join(lines) + "\n"


def pairs(rows):
    """Markdown: one kind against another: by how much it is ahead, seed by seed, and whether the intervals touch."""
    found, scores = groups(rows), (("c_fid", "C-FID", -1, 1), ("c_is", "C-IS", 1, 3))
    lines = ["| | " + " | ".join(f"{title}, ahead by | {title}, intervals" for _, title, _, _ in scores) + " |", "|---|---|---|---|---|"]
    for abits, name, other in [(b, *pair) for b in (4, 3) for pair in PAIRS]:
        ours, theirs = (sorted(found.get((abits, k), []), key=lambda r: r["seed"]) for k in (name, other))
        if len(ours) > 1 and len(ours) == len(theirs):
            cells = []
            for key, _, sign, digits in scores:
                gains = [sign * (a[key] - b[key]) for a, b in zip(ours, theirs)]
                cells += [f"{spread(gains, digits)} ({sum(g > 0 for g in gains)} of {len(gains)})", "apart" if apart(ours, theirs, key) else "touch"]
            lines.append(f"| W4A{abits} {KINDS[name]} against {other} | {' | '.join(cells)} |")
    return "\n".join([*lines, "\nAhead by: mean ± deviation of the differences seed by seed, and in how many of the seeds; intervals: mean ± deviation of each.\n"])


def tune(rows):
    """Markdown: what was tried on a seed that is not reported, and what it says of the main rows' setting."""
    found, kinds = of_part(rows, "tune"), ("none", "single", "midrise")
    lines = [f"| walks | updates | balance | rates | {' | '.join(KINDS[k] for k in kinds)} |", "|---|---|---|---|---|---|---|"]

    def setting(r):
        return r["walks"], r["steps"], r["balance"], r.get("lr", 1.0)
    for walks, steps, balance, lr in sorted(set(map(setting, found)), key=lambda s: (s[0] == "student", *s[1:])):
        made = {kind(r): r for r in found if setting(r) == (walks, steps, balance, lr)}
        cells = [f"{r['c_fid']:.1f} / {r['c_is']:.2f} / {r['psnr']:.1f}" if r else "" for r in map(made.get, kinds)]
        lines.append(f"| {walks}'s | {steps:,} | {balance:g} | x {lr:g} | {' | '.join(cells)} |")
    top = float_row(rows, found[0]["n"])
    note = (f"\nC-FID / C-IS / PSNR in dB of {found[0]['n']:,} pictures at W4A3, seed {found[0]['seed']} "
            f"(float: {top['c_fid']:.1f} / {top['c_is']:.2f}), on {found[0]['hardware']} (`python experiments/grid.py tune -n {found[0]['n']}`).\n")
    plain = groups(rows)[3, "single"][0]
    main = plain["walks"], plain["steps"], plain["balance"], 1.0
    fids = {(setting(r), kind(r)): r["c_fid"] for r in found}
    best = {k: min(v for (_, name), v in fids.items() if name == k) for k in ("none", "single")}
    leads = {s: fids[s, "none"] - fids[s, "single"] for s, name in fids if name == "none" and s[0] == "student"}
    same = dict(walks_an_image=WALKS, balance=plain["balance"], steps=plain["steps"], seed=found[0]["seed"], grid="midrise")
    again = [r["c_fid"] for r in read("walks") if same.items() <= r.items()] + [r["c_fid"] for r in read("means") if (r["seed"], r["means"]) == (same["seed"], False)]
    if min(leads.values()) < 2 or max(leads, key=leads.get) != main:
        raise ValueError("what is said of tuning holds no more: write it anew")
    return "\n".join([*lines, note + f"\nOn own walks single's C-FID is ahead of none's by {min(leads.values()):.1f} to {max(leads.values()):.1f}. The main rows' setting, "
                      f"chosen before, is the one with the largest lead; with each at its best it would be {best['none'] - best['single']:.1f}. But this is one seed and few pictures: the same training of mid-rise, run thrice, had {', '.join(f'{v:.1f}' for v in sorted([*again, fids[main, 'midrise']]))}. {balanced(rows)}"])


def balanced(rows):
    """Text: how much of single's lead is left at the balance that suits none best."""
    found, main, words = groups(rows, "balance"), groups(rows), []
    for bits in (3, 4):
        none, single = found[bits, "none"], found[bits, "single"]
        ahead = spread([a["c_fid"] - b["c_fid"] for a, b in zip(none, single, strict=True)])
        scores = [f"{spread([r['c_fid'] for r in seeds])} / {spread([r['c_is'] for r in seeds], 3)}" for seeds in (none, single)]
        words.append(f"W4A{bits} none {scores[0]}, single {scores[1]}, ahead by {ahead} in C-FID")
    gained = {k: mean(r["c_fid"] for r in main[3, k]) - mean(r["c_fid"] for r in found[3, k]) for k in ("none", "single")}
    touch = [not apart(found[b, "none"], found[b, "single"], key) for b in (3, 4) for key in ("c_fid", "c_is")]
    if touch != [False, False, False, True] or abs(gained["none"] - gained["single"]) > 0.3:
        raise ValueError("what is said of the balance holds no more: write it anew")
    return (f"So none and single were trained anew at the balance of none's best, {found[3, 'none'][0]['balance']:g}, with the main rows' seeds and pictures, C-FID / C-IS: {'; '.join(words)} (`python experiments/grid.py balance`). "
            f"At W4A3 none has gained {gained['none']:.1f} there and single {gained['single']:.1f}: nothing says that the setting made the lead. All intervals but those of C-IS at W4A4 are apart.\n")


def means():
    """Text: whether a mean of each channel, taken off before rounding, pays; from means.json."""
    rows = read("means")
    pairs = {key: list(zip(*([r[key] for r in rows if r["means"] is means] for means in (True, False)))) for key in ("c_fid", "c_is", "psnr")}
    ahead = {key: [a - b for a, b in both] for key, both in pairs.items()}
    if any(abs(mean(ahead[key])) > stdev(ahead[key]) for key in ("c_fid", "c_is")) or min(ahead["psnr"]) < 0:
        raise ValueError("what is said of the means holds no more: write it anew")
    return (f"**A mean of each channel**, learned, taken off before rounding and put back behind the product, is not told apart from none on the mid-rise grid: it changes C-FID by {spread(ahead['c_fid'])} and C-IS by "
            f"{spread(ahead['c_is'], 3)} (differences of seeds {', '.join(str(r['seed']) for r in rows if r['means'])}; one rate), though pictures come nearer to float's, by {spread(ahead['psnr'])} dB of PSNR "
            f"({rows[0]['n']:,} pictures, on {rows[0]['hardware']}, `python experiments/means.py`). So hqdm.py has none.\n")


def walks():
    """Markdown: how the training on the student's own walks was found, from walks.json."""
    report = json.loads((HERE / "walks.json").read_text())
    names = ("target", "share", "walks_an_image", "balance", "steps", "lr", "seed")
    lines = [f"| target | share | walks an image | balance | updates | rates | seed | {' | '.join(KINDS.values())} |", "|" + "---|" * 11]
    made = {}
    for r in report["rows"]:
        made.setdefault(tuple(r.get(name, 1.0) for name in names), {}).setdefault(kind(r), []).append(
            f"{r['c_fid']:.1f} / {r['c_is']:.2f} / {r['psnr']:.1f} / {r['fine_power']:.2f}")
    plain = dict(target="teacher's x_0", share=1, walks_an_image=4, balance=1, seed=100)
    short, long = ({kind(r): r["c_fid"] for r in report["rows"] if {**plain, "steps": steps}.items() <= r.items() and "lr" not in r} for steps in (1000, 4000))
    (old,) = (r for r in report["rows"] if {**plain, "target": "teacher's eps at the student's x_t", "grid": "midrise", "steps": 1000}.items() <= r.items())
    if not all(long[k] > short[k] for k in ("none", "single", "midrise")) or old["c_fid"] < short["midrise"] + 3:
        raise ValueError("what is said of targets and of long runs holds no more: write it anew")
    for key in sorted(made, key=lambda k: (k[0], -k[1], *k[2:])):
        lines.append("| " + " | ".join([key[0], *(f"{v:g}" for v in key[1:]), *("; ".join(made[key].get(k, ())) for k in KINDS)]) + " |")
    note = (f"\nC-FID / C-IS / PSNR in dB / power at fine scales as a share of float's, W4A3, {report['n']:,} pictures, on {report['hardware']} ({report['date']}, `walks.json`; "
            f"the number of walks, the target and its share are no options, so of these rows not all can be made again; two runs of one setting share a cell). Share: how much of the way from the teacher's eps to the target. "
            f"They pay by the new target: with the teacher's eps at the student's own x_t mid-rise has a C-FID of {old['c_fid']:.1f}, and {short['midrise']:.1f} with all else the same. Long runs were no better: with four walks at balance 1 all kinds have a higher C-FID after 4,000 updates than after 1,000.\n")
    return "\n".join([*lines, note])


# Rows of the table of one change each: what it says, the part, and what these rows alone have.
SIDE = [("as above, seed 0", "headline", {}), ("double, mid-rise grid", "side", dict(rotation="double", grid="midrise")),
        ("block 8", "side", dict(block=8)), ("block 16", "side", dict(block=16)), ("block 64", "side", dict(block=64)), ("LoRA of rank 4", "side", dict(rank=4)), ("batch 32", "side", dict(batch=32)),
        ("1 update", "updates", dict(steps=1)), ("4,000 updates", "updates", dict(steps=4000)), ("W3A3", "side", dict(wbits=3)), ("W4A2", "side", dict(abits=2)),
        *((f"{n} DDIM steps", "side", dict(ddim_steps=n)) for n in (10, 20, 100)), ("the paper's recipe", "paper", dict(steps=16_000))]
# What all others have; not the block, for none has its own.
PLAIN = dict(walks="student", wbits=4, abits=3, seed=0, ddim_steps=50, steps=1000, balance=0.75, batch=128, rank=32)


def side(rows):
    """Markdown: one change at a time, and the paper's recipe, one seed each."""
    lines = [f"| | float | {' | '.join(KINDS.values())} |", f"|---|{'---|' * (1 + len(KINDS))}"]
    for title, part, change in SIDE:
        wanted = change if part == "paper" else {**PLAIN, **change}
        made = {kind(r): r for r in of_part(rows, part) if wanted.items() <= r.items() and not r.get("searched")
                and ("block" in change or r["block"] in (1, 32)) and ("grid" in change or (r["rotation"], r["grid"]) != ("double", "midrise"))}
        if not made:
            continue
        first = next(iter(made.values()))
        cells = [f"{r['c_fid']:.1f} / {r['c_is']:.2f}" if r else "" for r in map(made.get, KINDS)]
        top = float_row(rows, first["n"], first["ddim_steps"])
        cells.insert(0, f"{top['c_fid']:.1f} / {top['c_is']:.2f}" if not change or first["ddim_steps"] != 50 else "")
        lines.append("".join(f"| {cell} " if cell else "| " for cell in (title, *cells)) + "|")
    return "\n".join([*lines, f"\nC-FID / C-IS of {first['n']:,} pictures, one seed, on {first['hardware']}.\n"])


def changes(rows):
    """Text: what the table of one change each says of blocks and bits."""
    two, seeds = {kind(r): r["c_fid"] for r in of_part(rows, "side") if r["abits"] == 2}, groups(rows)[3, "single"]
    made = sorted([seeds[0], *(r for r in of_part(rows, "side") if kind(r) == "single" and r["block"] != 32)], key=lambda r: r["block"])
    blocks, sharp = ({r["block"]: r[key] for r in made} for key in ("c_fid", "psnr"))
    falls, rises = [*blocks.values()] == sorted(blocks.values(), reverse=True), [*sharp.values()] == sorted(sharp.values())
    if not two["midrise"] < 0.8 * two["none"] < 0.8 * two["single"] or not falls or not rises or blocks[8] - blocks[64] > 2 * stdev([r["c_fid"] for r in seeds]):
        raise ValueError("what is said of 2 bits and of blocks holds no more: write it anew")
    return (f"Differences below the ± of the first table say nothing. C-FID falls with the block, {blocks[8]:.1f} to {blocks[64]:.1f} from 8 to 64, by little more than that; PSNR rises from {sharp[8]:.1f} to {sharp[64]:.1f} dB: larger blocks come nearer to float. "
            f"At 2 bits mid-tread has three of the four levels, and single is *behind* none; with all four, on mid-rise, it is far ahead. So the grid counts as much as the transform where levels are few "
            f"(`python experiments/grid.py headline updates side paper`; the recipe is below).\n")


def spaced(rows):
    """Text: models of 10 and 20 steps on the student's walks and on the teacher's."""
    own, teachers = ({(r["ddim_steps"], kind(r)): r for r in of_part(rows, "side") if r["ddim_steps"] != 50 and r["walks"] == walks} for walks in ("student", "teacher"))
    kinds = ("none", "single")
    if any((own[n, k]["c_fid"] < teachers[n, k]["c_fid"]) != (n == 20) or any(own[10, k][key] < teachers[10, k][key] for key in ("psnr", "c_is", "accuracy")) for n in (10, 20) for k in kinds):
        raise ValueError("what is said of few steps holds no more: write it anew")
    pairs = {n: " and ".join(f"{own[n, k]['c_fid']:.1f} instead of {teachers[n, k]['c_fid']:.1f}" for k in kinds) for n in (10, 20)}
    near, nearest = (" and ".join(f"{made[10, k]['psnr']:.1f}" for k in kinds) for made in (teachers, own))
    return (f"**At 10 steps own walks are worse in C-FID, at 20 better.** none and single on them instead of on the teacher's walks: 10 steps {pairs[10]}; 20 steps {pairs[20]}. "
            f"C-IS, accuracy and PSNR gain by them at 10 steps, too ({nearest} dB instead of {near}); float's own C-FID there is {float_row(rows, own[10, 'none']['n'], 10)['c_fid']:.1f}. "
            f"We do not know why (seed 0).\n")


def paper(rows):
    """Text: the paper's recipe, and what it says of the paper's gains."""
    none, double, single, searched, unsearched = map(recipes(rows).get, ("none", "double", "single", "searched", "ours"))
    plain = groups(rows)[3, "none"]
    top = float_row(rows, none["n"], none["ddim_steps"])
    ours = {r["rotation"]: r for r in of_part(rows, "side") if r["ddim_steps"] == none["ddim_steps"]}
    gap = single["c_is"] - none["c_is"]
    if (not none["c_is"] + gap / 2 < searched["c_is"] < single["c_is"] - gap / 5 or single["c_fid"] < double["c_fid"] - 1
            or abs(unsearched["c_fid"] - mean(r["c_fid"] for r in plain)) > 2 * stdev([r["c_fid"] for r in plain])):
        raise ValueError("what is said of the paper's recipe holds no more: write it anew")
    return (f"### The paper's own recipe\n\n{none['steps']:,} updates of batch {none['batch']} in the order of the walk, the paper's rates, {none['ddim_steps']} "
            f"steps, a plain mean; the baseline's zero points as EfficientDM finds them: both ends of a range shrink together. C-IS: float "
            f"{top['c_is']:.2f}, none {none['c_is']:.2f}, single {single['c_is']:.2f}, so single's is {single['c_is'] / none['c_is'] - 1:.0%} above none's. The paper "
            f"reports {CLAIMED} at W4A3 (+12.8% at W4A4) for LDM-4 on ImageNet at 256x256. So by this recipe the transform gains much here, too, if less. By ours, which "
            f"differs in zero points, rates, order, batch, updates and whose walks, and with as many steps, it gains little: none {ours['none']['c_is']:.2f}, single {ours['single']['c_is']:.2f}.\n\n"
            f"**Most of the recipe's gap comes from the baseline's zero points.** Where each end shrinks alone, too, as in ours, and all else is the paper's, none has C-IS {searched['c_is']:.2f} and C-FID {searched['c_fid']:.1f} instead of "
            f"{none['c_is']:.2f} and {none['c_fid']:.1f}; single has {single['c_is']:.2f} and {single['c_fid']:.1f}, its C-IS is {single['c_is'] / searched['c_is'] - 1:.0%} above. By our recipe they hardly show: with both ends together none has "
            f"{unsearched['c_is']:.2f} and {unsearched['c_fid']:.1f} instead of {plain[0]['c_is']:.2f} and {plain[0]['c_fid']:.1f} (seed {plain[0]['seed']}, {plain[0]['ddim_steps']} steps), though PSNR is {unsearched['psnr']:.1f} instead of {plain[0]['psnr']:.1f} dB. "
            f"Double ({double['c_is']:.2f}) does as well as single.\n")


def updates(rows):
    """Text: what single gains over none after so many updates."""
    made = {(kind(r), r["steps"]): r for r in of_part(rows, "updates") + [r for r in of_part(rows, "headline") if (r["abits"], r["seed"]) == (3, 0)]}
    counts = sorted({steps for name, steps in made if ("none", steps) in made and ("single", steps) in made})
    ratios = [made["none", n]["c_fid"] / made["single", n]["c_fid"] for n in counts]
    short, long = counts[-2:]
    rose = [made[k, long][key] > made[k, short][key] for k in ("none", "single", "midrise") for key in ("c_fid", "psnr")]
    if set(sorted(ratios)[-2:]) != set(ratios[:2]) or min(ratios) < 0.99 or not all(rose):
        raise ValueError("what is said of the updates holds no more: write it anew")
    fids = "; ".join(f"{KINDS[k]} {made[k, short]['c_fid']:.1f} and {made[k, long]['c_fid']:.1f}" for k in ("none", "single", "midrise"))
    return (f"### When does H matter?\n\n![C-FID, C-IS and PSNR against the number of updates](updates.png)\nMost at the beginning of training: after "
            f"{', '.join(f'{n:,}' for n in counts)} updates none's C-FID is {', '.join(f'{r:.2f}' for r in ratios)} times single's (W4A3, seed {PLAIN['seed']}). "
            f"Mid-rise has {made['midrise', 100]['c_fid']:.1f} after a hundred. **More updates than {short:,} were no gain** (one seed): pictures come nearer to float's (PSNR), and C-FID gets worse, {fids} after {short:,} and {long:,}: "
            f"own walks drift from the teacher's, and what they leave open of its picture is learned as a mean, which may be why.\n")


def spoiled(rows):
    """Text: which steps cost what, from the rows of part spoil."""
    made = {(r["float_first"], r["k"]): r for r in of_part(rows, "spoil")}
    alone = next(r for r in of_part(rows, "clamp") if r["name"].startswith("w4a3-single-midrise-plain"))
    steps, early, late, worst = alone["ddim_steps"], made[False, 20], made[True, 30], made[False, 45]
    if not (worst["c_fid"] > alone["c_fid"] > late["c_fid"] > early["c_fid"] + 1 and abs(early["psnr"] - late["psnr"]) < 2 and worst["fine_power"] > 1.1):
        raise ValueError("what is said of the steps holds no more: write it anew")
    return (f"### Which steps spoil the picture?\n\n![C-FID and PSNR where one network draws the first steps and another the rest](spoil.png)\nW4A3 (single, mid-rise) for the "
            f"first {early['k']} of {steps} steps, float for the rest: C-FID {early['c_fid']:.1f}, PSNR {early['psnr']:.1f} dB. W4A3 for the last {steps - late['k']} alone: "
            f"{late['c_fid']:.1f} and {late['psnr']:.1f}. So early steps move the picture as much as late ones do, and it is the late ones that cost C-FID. And float for the last {steps - worst['k']} steps is *worse* "
            f"than W4A3 all the way: {worst['c_fid']:.1f} against {alone['c_fid']:.1f}, with {worst['fine_power']:.2f} times float's power at fine scales. That fits "
            f"rounding errors that add up to grain in x_t on the way, more noise than t says: float takes away as much as t says, the student more, and its pictures have none left.\n")


def clamped(rows):
    """Text: what a clamp of x_0 at every step does to the float model and to the bundled W4A3 one."""
    made = {r["name"].removesuffix(f"-n{r['n']}"): r for r in of_part(rows, "clamp")}
    teacher, student, plain = (made[name] for name in ("teacher-clamped", "w4a3-single-midrise-clamped", "w4a3-single-midrise-plain"))
    said = "PSNR {psnr:.1f} dB, {brightness:+.1f} grey levels, contrast {contrast:.3f}"
    return (f"**Most of what moved brightness and contrast** was the sampler: many keep x_0 within [-1, 1] at every step. Near "
            f"t = 999 an error of eps is many times as large in x_0, as noise around the right picture, and clamped noise is grey. "
            f"The bundled W4A3 single, mid-rise: clamped {said.format(**student)}; as eq. 12 of DDIM has it "
            f"{said.format(**plain)}. What is left in the pictures is no grain and hardly blur: of the float pictures' power at 8 waves a side and more "
            f"these have {plain['fine_power']:.2f}, and the difference has {plain['fine_error']:.0%}. The float "
            f"model hardly notices: clamped and not, its pictures are {teacher['psnr']:.0f} dB apart ("
            f"{teacher['n']:,} pictures, on {teacher['hardware']}, `python experiments/grid.py clamp`).\n")


def costs(rows):
    """Text: what W4A3 single takes from the bundled teacher on, by batch."""
    made = sorted((r for r in rows if r["part"] == "cost"), key=lambda r: -r["batch"])
    fid = {r["batch"]: r["c_fid"] for r in of_part(rows, "side") if r["batch"] != 128}
    fid[128] = next(r["c_fid"] for r in groups(rows)[3, "single"] if r["seed"] == 0)
    said = "; ".join(f"batch {r['batch']} {r['seconds']:.0f} s, {r['peak_gib']:.1f} GiB" + (f", C-FID {fid[r['batch']]:.1f}" if r["batch"] in fid else "") for r in made)
    return f"{said} (one {made[0]['hardware']}, seed 0)"


def figure(path, panels, draw):
    """A PNG of `panels` axes side by side, each drawn by draw(ax, i)."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(4.6 * panels, 3.6), layout="constrained", dpi=110)
    for i, ax in enumerate(fig.subplots(1, panels, squeeze=False)[0]):
        draw(ax, i)
        ax.grid(alpha=0.3)
    with whole_file(path) as part:
        fig.savefig(part, format="png")


SCORES = (("c_fid", "C-FID (lower is better)"), ("c_is", "C-IS (higher is better)"), ("psnr", "PSNR to float, dB"))


def draw_updates(rows, path):
    """C-FID, C-IS and PSNR against updates of W4A3; float dashed."""
    found = of_part(rows, "updates")
    kinds, seed = {kind(r) for r in found}, found[0]["seed"]
    found += [r for r in of_part(rows, "headline") if (r["abits"], r["seed"]) == (3, seed) and kind(r) in kinds]
    top = float_row(rows, found[0]["n"])

    def draw(ax, i):
        key, title = SCORES[i]
        for name in KINDS:
            points = sorted((r["steps"], r[key]) for r in found if kind(r) == name)
            if points:
                ax.plot(*zip(*points), "o-", markersize=4, color=COLOURS[name], label=KINDS[name])
        if key != "psnr":
            ax.axhline(top[key], color="0.4", linestyle="--", linewidth=1, label="float")
        ticks = sorted({r["steps"] for r in found})
        ax.set(title=title, xlabel="updates", xscale="log")
        if key == "c_fid":
            ax.set(yscale="log")
            ax.set_yticks([12, 25, 50, 100, 200], [12, 25, 50, 100, 200])
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.minorticks_off()
        if i == 0:
            ax.legend(frameon=False, fontsize=9)
    figure(path, 3, draw)


def draw_spoil(rows, path):
    """C-FID and PSNR where one network does the first k steps and the other one the rest."""
    found, steps = of_part(rows, "spoil"), of_part(rows, "spoil")[0]["ddim_steps"]
    alone = {r["name"].split("-plain")[0]: r for r in of_part(rows, "clamp") if "-plain" in r["name"]}

    def draw(ax, i):
        key, title = (SCORES[0], SCORES[2])[i]
        for name, style in (("w4a3-single-midrise", "--"), ("teacher", ":")):
            if name in alone and (key, name) != ("psnr", "teacher"):
                ax.axhline(alone[name][key], color="0.4", linestyle=style, linewidth=1, label="float alone" if name == "teacher" else "W4A3 alone")
        for float_first, colour, label in ((True, "C0", "float, then W4A3"), (False, "C1", "W4A3, then float")):
            ax.plot(*zip(*sorted((r["k"], r[key]) for r in found if r["float_first"] == float_first)), "o-", markersize=4,
                    color=colour, label=label)
        ax.set(title=title, xlabel=f"steps that the first network draws, of {steps}")
        if i == 0:
            ax.legend(frameon=False, fontsize=9)
    figure(path, 2, draw)


def main():
    new_parser(__doc__).parse_args()
    draw_updates(read(), HERE / "updates.png")
    draw_spoil(read(), HERE / "spoil.png")


if __name__ == "__main__":
    run_cli(main)
