"""Train the judge: the small CIFAR-10 classifier whose features and class probabilities score generated pictures.

    python experiments/judge.py --data data      # one H200: about 2 minutes; writes runs/judge/model.pt and model.json

No label smoothing and no mixing of images: both flatten the class probabilities, and the C-IS is made of those.
The recipe is a plain one: random crops, flips and 8x8 holes, SGD with Nesterov momentum and one linear warm-up and
decay, bf16 autocast where the GPU has it. The bundled weights are the average of the weights over the last passes.
The residual layout follows David Page's ResNet-9 ("How to train your ResNet", myrtle.ai, 2018); the code is ours.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.runs import (autocast, check_out, new_parser, number, pick_device, positive,  # noqa: E402
                           provenance, run_cli,
                           save_checkpoint, write_json)
from sample import Judge, judge_images  # noqa: E402
from train import load_cifar10  # noqa: E402


def augment(images, pad=4, hole=8):
    """uint8 (B, 3, 32, 32) -> the same shape: a random shift by up to 4 pixels, a flip, and a grey 8x8 hole each."""
    B, _, h, w = images.shape
    device = images.device
    padded = F.pad(images.float(), (pad,) * 4, mode="reflect")
    rows = torch.arange(h, device=device) + torch.randint(2 * pad + 1, (B, 1), device=device)        # (B, h)
    cols = torch.arange(w, device=device) + torch.randint(2 * pad + 1, (B, 1), device=device)        # (B, w)
    cols = torch.where(torch.rand(B, 1, device=device) < 0.5, cols, cols.flip(1))
    b = torch.arange(B, device=device)[:, None, None]
    out = padded.permute(0, 2, 3, 1)[b, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)      # (B, 3, h, w)
    top, left = torch.randint(h - hole + 1, (2, B, 1), device=device)
    in_rows = (torch.arange(h, device=device) >= top) & (torch.arange(h, device=device) < top + hole)
    in_cols = (torch.arange(w, device=device) >= left) & (torch.arange(w, device=device) < left + hole)
    return torch.where((in_rows[:, :, None] & in_cols[:, None, :])[:, None], 127.5, out)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data", default="data", help="folder with cifar-10-batches-bin (data)")
    parser.add_argument("--passes", type=positive, default=80, help="over the 50,000 images (80)")
    parser.add_argument("--batch", type=positive, default=512)
    parser.add_argument("--lr", type=number(), default=0.4, help="peak learning rate at batch 512 (0.4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/judge/model.pt", help="checkpoint; its accuracy: a .json beside it")
    parser.add_argument("--device")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    check_out(args.out, ".pt"), check_out(Path(args.out).with_suffix(".json"))
    device, start = pick_device(args.device), time.time()
    torch.manual_seed(args.seed)

    images, labels = (t.to(device) for t in load_cifar10(args.data))
    test_images, test_labels = load_cifar10(args.data, test=True)
    judge = Judge().to(device, memory_format=torch.channels_last)
    # Weight decay on weights alone; batch norms and biases have one dimension.
    groups = [{"params": [p for p in judge.parameters() if p.ndim > 1], "weight_decay": 5e-4},
              {"params": [p for p in judge.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    per_pass = len(images) // args.batch
    total = per_pass * args.passes
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total, pct_start=0.15, anneal_strategy="linear",
                                                   cycle_momentum=False, final_div_factor=1e3)
    average = torch.optim.swa_utils.AveragedModel(
        judge, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / (2 * per_pass)), use_buffers=True)

    for epoch in range(args.passes):
        judge.train()
        order = torch.randperm(len(images), device=device)
        for i in range(per_pass):
            pick = order[i * args.batch:(i + 1) * args.batch]
            with autocast(device):
                logits, _ = judge(augment(images[pick]).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[pick])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(judge)
        if (epoch + 1) % 5 == 0 or epoch + 1 == args.passes:
            judge.eval()
            logp, _ = judge_images(average.module.eval(), test_images)
            accuracy = float((logp.argmax(1) == test_labels).double().mean())
            print(f"pass {epoch + 1}/{args.passes}  loss {loss.item():.4f}  test accuracy {accuracy:.4f}  "
                  f"{time.time() - start:.0f} s", flush=True)

    # Half precision is what gets bundled, so it is what gets measured: accuracy, then the statistics of the features.
    judge = average.module.half().float().eval()
    logp, _ = judge_images(judge, test_images)
    accuracy = float((logp.argmax(1) == test_labels).double().mean())
    _, features = judge_images(judge, images)
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    state["mean"], state["cov"] = features.mean(0).float(), features.T.cov().float()
    state = {k: v.cpu() for k, v in state.items()}
    save_checkpoint(args.out, kind="judge", model=state, test_accuracy=accuracy)
    result = {"test_accuracy": accuracy, "n": len(test_labels),
              "parameters": sum(p.numel() for p in judge.parameters()),
              **provenance(vars(args), device, time.time() - start)}
    write_json(Path(args.out).with_suffix(".json"), result)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_cli(main)
