"""Where the time of one DDIM step goes: float, fake-quantized and integer side by side -> steps.json, steps.png.

    python experiments/steps.py            # on the device at hand; of the other one steps.json keeps what it has

Rows "before" stay: an integer step by the code before plumbing/blocks.py, with its date and what float took on that day.

torch.profiler names operators (CPU) or kernels (GPU); each is counted to the first group whose words are in its name.
(So the pass of plumbing/blocks.py that normalises and rounds is rounding.) What these leave of `ms`, the median
of steps without the profiler, which costs a little, is Python on a CPU, idle units on a GPU.

The limit, of the integer network's layers and norms: the bytes that must move if each layer reads its float32 input,
writes and reads its integers and writes float32 once, and each norm reads its input once more, at the speed of a copy;
and the multiply-adds at the speed of a large int8 product, both measured here. Attention's products are not counted.
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
from unet import GroupNorm  # noqa: E402

HERE = Path(__file__).resolve().parent
GROUPS = {"attention": "attention|_attend|fmha|softmax",
          "norms and SiLU": "group_norm|silu|_moments|_join|_apply_kernel|Welford",
          "transform and rounding": "_quantize|_walsh|aten::mm$|round|clamp|div|floor|remainder|aten::sub|aten::min|aten::max|"
                                    "lshift|rshift|bitwise|aten::mul",
          "scales and bias": "_scale_kernel|addcmul",
          "convolutions and matrix products": "conv|_int_kernel|int_mm|addmm|gemm|cutlass|xmma|gemv|splitK",
          "additions, copies, the rest": ""}


def group_of(name):
    return next(group for group, words in GROUPS.items() if re.search(words, name))


def synchronize(device):
    torch.cuda.synchronize() if device.type == "cuda" else None


def milliseconds(f, device):
    """The median of 15 calls, after three."""
    times = []
    for _ in range(18):
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def work(net, inputs):
    """(bytes, multiply-adds) of an integer step: see above. Its quantized layers and its norms are looked at."""
    moved, multiplied = [], []

    def layer(m, args, y):
        taps = m.weights.shape.numel() // m.weights.shape[0]
        moved.append((4 + 2 * m.dtype.itemsize) * args[0].numel() + 4 * y.numel())
        multiplied.append(y.numel() * taps)
    hooks = [m.register_forward_hook(layer) for m in hqdm.layers(net)]
    hooks += [m.register_forward_hook(lambda m, args, y: moved.append(4 * y.numel())) for m in net.modules() if isinstance(m, GroupNorm)]
    net(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(moved), sum(multiplied)


def limit(net, inputs, device):
    """{name: value} of what a step takes at least, and of the two speeds that say so."""
    moved, multiplied = work(net, inputs)
    n, side = (2**28, 8192) if device.type == "cuda" else (2**25, 2048)
    a, b = torch.ones(n, device=device), torch.empty(n, device=device)
    q = torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device)
    copy_speed = 8 * n / milliseconds(lambda: b.copy_(a), device) / 1e6                      # GB/s
    int8_speed = side**3 / milliseconds(lambda: torch._int_mm(q, q.T), device) / 1e9           # 10^12 a second
    return {"gigabytes": round(moved / 1e9, 3), "gigabytes_per_s": round(copy_speed, 1), "ms_to_move": round(moved / copy_speed / 1e6, 2),
            "tera_multiply_adds": round(multiplied / 1e12, 4), "tera_per_s": round(int8_speed, 2),
            "ms_to_multiply": round(multiplied / int8_speed / 1e9, 2)}


def measure(net, inputs, device):
    """{group: milliseconds} of net(*inputs)."""
    step = recorded(net, device)
    ms = milliseconds(lambda: step(*inputs), device)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profiler:
        step(*inputs)
        synchronize(device)
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in profiler.key_averages():
        us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[group_of(event.key)] += us / 1e3
    spent["idle" if device.type == "cuda" else "Python"] = max(0, ms - sum(spent.values()))
    return {"ms": round(ms, 2), **{name: round(v, 2) for name, v in spent.items()}}


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
        ax.margins(y=0.08)
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
    least = limit(net, inputs, device)
    print(json.dumps(least), flush=True)
    path = HERE / "steps.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    rows += [row for row in report.get(device.type, {"rows": []})["rows"] if row["what"].endswith("before")]
    report[device.type] = {"rows": rows, "limit": least, **provenance(vars(args), device, time.time() - start)}
    write_json(path, report)
    draw_figure(report, path.with_suffix(".png"))


if __name__ == "__main__":
    run_cli(main)
