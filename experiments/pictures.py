"""The README's picture: the same noise drawn by float, W4A3 only calibrated, and W4A3 trained -> pictures.png.

    python experiments/pictures.py         # two minutes on 2 cores
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hqdm  # noqa: E402
from plumbing.runs import new_parser, pick_device, positive, run_cli  # noqa: E402
from sample import CHECKPOINTS, draw, load_model, save_grids  # noqa: E402
from train import quantized_copy, trajectories  # noqa: E402
from unet import ddim_timesteps  # noqa: E402

KINDS = {"none": ("none (no transform)", "midtread"), "single-midrise": ("single (transform on activations), mid-rise grid", "midrise")}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("-n", type=positive, default=16, help="pictures in a row (16)")
    parser.add_argument("--ddim-steps", type=positive, default=50)
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent / "pictures.png"))
    parser.add_argument("--device")
    args = parser.parse_args()
    device, times = pick_device(args.device), tuple(ddim_timesteps(args.ddim_steps).tolist())
    models = {"float": load_model(CHECKPOINTS / "teacher.pt", device)}
    walks = trajectories(models["float"], 8, args.ddim_steps, seed=1_000_000)
    for name, (words, grid) in KINDS.items():
        scheme = hqdm.Scheme(4, 3, name.partition("-")[0], timesteps=times, grid=grid)
        models[f"W4A3 {words}, calibrated, not trained"] = quantized_copy(models["float"], scheme, walks)
    for name, (words, _) in KINDS.items():
        models[f"W4A3 {words}, trained"] = load_model(CHECKPOINTS / f"w4a3-{name}.pt", device)
    save_grids(args.out, {title: draw(model, args.n, args.ddim_steps)[0] for title, model in models.items()})


if __name__ == "__main__":
    run_cli(main)
