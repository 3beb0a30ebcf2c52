"""Where the time of one DDIM step goes: float, fake-quantized and integer side by side -> steps.json, steps.png.

    python experiments/steps.py            # on the device at hand; of the other one steps.json keeps what it has

torch.profiler names operators (CPU) or kernels (GPU); each is counted to the first group whose words are in its name:
the pass of plumbing/blocks.py, with which integers are normalised, too, to rounding.
What is left of the profiled step is Python on a CPU, idle units on a GPU. The profiler costs a little: `ms`, above each
bar, is the median of steps without it.
"""
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from plumbing.runs import new_parser, pick_device, positive, provenance, recorded, run_cli, whole_file, write_json  # noqa: E402
from sample import CHECKPOINTS, load_model  # noqa: E402

HERE = Path(__file__).resolve().parent
GROUPS = {"attention": "attention|fmha|softmax",
          "norms and SiLU": "group_norm|silu|_moments|_join|_apply_kernel|Welford",
          "transform and rounding": "_quantize|_walsh|aten::mm$|round|clamp|div|floor|remainder|aten::sub|aten::min|aten::max|"
                                    "lshift|rshift|bitwise|aten::mul",
          "scales and bias": "_scale_kernel|addcmul",
          "convolutions and matrix products": "conv|_int_kernel|int_mm|addmm|gemm|cutlass|xmma|gemv|splitK",
          "additions, copies, the rest": ""}


def group_of(name):
    return next(group for group, words in GROUPS.items() if re.search(words, name))


def measure(net, inputs, device):
    """{group: milliseconds} of net(*inputs)."""
    def synchronize():
        torch.cuda.synchronize() if device.type == "cuda" else None
    step, times = recorded(net, device), []
    for _ in range(3):
        step(*inputs)
    for _ in range(15):
        synchronize()
        start = time.perf_counter()
        step(*inputs)
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profiler:
        start = time.perf_counter()
        step(*inputs)
        synchronize()
        profiled = 1e3 * (time.perf_counter() - start)
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in profiler.key_averages():
        ms = (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e3
        spent[group_of(event.key)] += ms
    spent["idle" if device.type == "cuda" else "Python"] = max(0, profiled - sum(spent.values()))
    return {"ms": round(statistics.median(times), 2), **{name: round(ms, 2) for name, ms in spent.items()}}


def draw_figure(report, path):
    """A stacked bar for each network, a panel for each device."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(4.4 * len(report) + 2.6, 3.6), layout="constrained", dpi=110)
    colours = ("#CC79A7", "#009E73", "#0072B2", "#56B4E9", "#E69F00", "#999999", "#DDDDDD")      # Okabe-Ito, and greys
    for ax, part in zip(fig.subplots(1, len(report), squeeze=False)[0], report.values()):
        names = [row["what"].replace(", ", ",\n") for row in part["rows"]]
        groups, bottom = [k for k in part["rows"][0] if k not in ("what", "ms")], [0.0] * len(names)
        for group, colour in zip(groups, colours):
            values = [row[group] for row in part["rows"]]
            ax.bar(names, values, bottom=bottom, color=colour, label=group)
            bottom = [a + b for a, b in zip(bottom, values)]
        for i, row in enumerate(part["rows"]):
            ax.text(i, bottom[i], f"{row['ms']:.0f} ms", ha="center", va="bottom", fontsize=9)
        ax.set_title(f"one step, batch {part['settings']['batch']}, {part['hardware']}", fontsize=10)
        ax.set_ylabel("milliseconds")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9, reverse=True)
    with whole_file(path) as part:
        fig.savefig(part, format="png")


@torch.no_grad()
def main():
    parser = new_parser(__doc__)
    parser.add_argument("--batch", type=positive, help="pictures (500; on a CPU 16)")
    parser.add_argument("--device")
    args = parser.parse_args()
    device, start, rows = pick_device(args.device), time.time(), []
    args.device, args.batch = device.type, args.batch or (500 if device.type == "cuda" else 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, 3, 32, 32, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    inputs = x, torch.full((args.batch,), 500, device=device), torch.zeros(args.batch, dtype=torch.long, device=device)
    for what, file in (("float", "teacher"), ("W4A3, fake", "w4a3-single-midrise"), ("W4A3, integer", "w4a3-single-midrise")):
        net = load_model(CHECKPOINTS / f"{file}.pt", device)
        if what.endswith("integer"):
            hqdm.set_integer(net)
        rows.append({"what": what, **measure(net, inputs, device)})
        print(json.dumps(rows[-1]), flush=True)
    path = HERE / "steps.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report[device.type] = {"rows": rows, **provenance(vars(args), device, time.time() - start)}
    write_json(path, report)
    draw_figure(report, path.with_suffix(".png"))


if __name__ == "__main__":
    run_cli(main)
