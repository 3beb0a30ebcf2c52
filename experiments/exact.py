"""Count mismatches between integer and fake-quantized arithmetic in a trained model: accumulators and pictures.

    python experiments/exact.py CKPT ... -n 100 --out FILE.json      # every count should be 0

Accumulators: at three DDIM steps every layer's input of a real trajectory is multiplied four times: as the
fake-quantized layer does it, in integers in views A and B, and, as the judge, in float64, whose sums are exact below
2^53 on any device. All are compared with the first. Pictures: whole trajectories drawn three times, compared as uint8.
"""
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from plumbing.runs import check_out, new_parser, pick_device, positive, provenance, run_cli, write_json  # noqa: E402
from sample import draw, load_model, noise_and_labels  # noqa: E402
from unet import ddim  # noqa: E402

ROUTES = ["view A", "view B", "float64"]             # what is compared with the fake-quantized sums


def sums(layer, x, route):
    """A layer's sums before the scales, (B, .., C_out), of its input x (B, .., C_in): "fake", or one of ROUTES."""
    layer.integer, layer.view = "view" in route, route[-1] if "view" in route else "B"
    with hqdm.full_float32(x.device):
        q_x, _ = layer.activations(x.float(), layer.dtype)
        q_w, _ = layer.operand()
        if route == "float64":
            q_w = q_w.double()                       # and q_x follows
        acc = (layer.multiply_int if layer.integer else layer.multiply)(q_x, q_w)
    layer.integer = False
    return acc


@torch.no_grad()
def compare_sums(model, n, steps):
    """(comparisons of a sum, how many differ, largest |sum|), all layers, at the first, a middle and the last step."""
    compared = differ = largest = 0

    def look(layer, args):                           # the DDIM step is known: hooks run inside the network's call
        nonlocal compared, differ, largest
        x = layer.channels_last(args[0])
        fake = sums(layer, x, "fake")
        for route in ROUTES:
            differ += int((sums(layer, x, route).float() != fake).sum())
            compared += fake.numel()
        largest = max(largest, int(fake.abs().max()))

    device = next(model.parameters()).device
    noise, y = noise_and_labels(n)
    x = noise.to(device, memory_format=torch.channels_last)
    trajectory = [(t, x_t.clone()) for t, x_t, _, _ in ddim(model, x, y.to(device), steps)]
    hooks = [layer.register_forward_pre_hook(look) for layer in hqdm.layers(model)]
    for t, x_t in (trajectory[0], trajectory[len(trajectory) // 2], trajectory[-1]):
        model(x_t, torch.full((n,), t, device=device), y.to(device))
    for hook in hooks:
        hook.remove()
    return compared, differ, largest


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT")
    parser.add_argument("-n", type=positive, default=100, help="pictures from each checkpoint (100)")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--out", help="a JSON file for the counts; without it they are only printed")
    parser.add_argument("--device")
    args = parser.parse_args()
    check_out(args.out, ".json")
    device, start, rows = pick_device(args.device), time.time(), {}
    for path in args.checkpoints:
        model = load_model(path, device)
        compared, differ, largest = compare_sums(model, 2, args.steps)
        row = {"sums": compared, "sums_that_differ": differ, "largest_sum": largest, "pictures": args.n}
        began = time.time()
        fake, _ = draw(model, args.n, args.steps)
        row["fake_seconds"] = round(time.time() - began, 2)
        for view in "AB":
            hqdm.set_integer(model, True, view)
            began = time.time()
            pictures, _ = draw(model, args.n, args.steps)
            row[f"integer_{view}_seconds"] = round(time.time() - began, 2)
            row[f"pictures_that_differ_{view}"] = int((pictures != fake).flatten(1).any(1).sum())
        rows[path] = row
        print(path, json.dumps(row), flush=True)
        if args.out:
            write_json(args.out, {"checkpoints": rows, "routes": ROUTES,
                                  **provenance(vars(args), device, time.time() - start)})


if __name__ == "__main__":
    run_cli(main)
