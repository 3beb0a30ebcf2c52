#!/usr/bin/env bash
# What is bundled and what the README says of it, in stages; each can be run alone, from the repository's root:
#
#   bash experiments/all.sh judge options teacher quantized scores pictures
#
# judge       experiments/judge.py -> checkpoints/judge.pt, experiments/judge.json; real.py -> real.json
# options     seven short teachers that differ in one setting each -> experiments/options.json
# teacher     train.py -> checkpoints/teacher.pt, experiments/teacher.json, teacher-curve.*, overfit-dropout.json
# quantized   grid.py -> results.json, runs/grid; three models of its first seed bundled, with their metrics beside this file
# scores      the teacher with 200 DDIM steps, spacing.py; exact.py; table.py (needs what quantized made)
# pictures    models that are only calibrated beside the trained ones -> experiments/pictures.png
#
# The first three need CIFAR-10 in data/. grid.py shares its rows with copies of itself: start one a GPU.
# These stages write over what is bundled, so all but `pictures` refuse to run without a GPU, where they would be short.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

judge() {
    $PYTHON experiments/judge.py --data data --out runs/judge/model.pt
    cp runs/judge/model.pt checkpoints/judge.pt
    cp runs/judge/model.json experiments/judge.json
    $PYTHON experiments/real.py --data data
}

options() {
    $PYTHON experiments/options.py --data data
}

teacher() {
    # 41 M images on all GPUs (1, 2, 4 or 8: they share each batch evenly). Where an earlier call was cut off, go on.
    $PYTHON -m torch.distributed.run --nproc_per_node=gpu train.py --data data --steps 20000 --batch 2048 --lr 0.0016 \
        --dropout 0.05 --score-every 2500 --out runs/teacher $([ -e runs/teacher/last.pt ] && echo --resume)
    cp runs/teacher/model.pt checkpoints/teacher.pt
    cp runs/teacher/metrics.json experiments/teacher.json
    cp runs/teacher/curve.json experiments/teacher-curve.json
    cp runs/teacher/loss.png experiments/teacher-curve.png
    $PYTHON experiments/overfit.py checkpoints/teacher.pt --data data --out experiments/overfit-dropout.json
}

quantized() {
    local grid="$PYTHON experiments/grid.py --out runs/grid/results.json"        # from nothing, or what is there
    $grid tune -n 2000
    $grid headline
    for name in w4a3-none w4a3-single-midrise w4a4-single; do
        cp runs/grid/$name-seed0/model.pt checkpoints/$name.pt
        cp runs/grid/$name-seed0/metrics.json experiments/$name.json
    done
    $grid updates balance side paper spoil clamp cost
    cp runs/grid/results.json experiments/results.json
}

scores() {
    $PYTHON sample.py checkpoints/teacher.pt --steps 200 --score -n 5000 --out experiments/scores-200.png
    $PYTHON experiments/spacing.py
    for device in cuda cpu; do
        $PYTHON experiments/exact.py checkpoints/w4a3-none.pt checkpoints/w4a3-single-midrise.pt checkpoints/w4a4-single.pt \
            -n 16 --device $device --out experiments/exact-$device.json
    done
    $PYTHON experiments/table.py --write
}

pictures() {
    $PYTHON experiments/pictures.py
}

[ $# -gt 0 ] || { sed -n '2,14p' "$0"; exit 2; }
for stage in "$@"; do
    case $stage in
        pictures) ;;
        judge|options|teacher|quantized|scores)
            $PYTHON -c 'import torch; exit(not torch.cuda.is_available())' ||
                { echo "error: stage $stage needs a GPU" >&2; exit 2; } ;;
        *) echo "error: no stage $stage" >&2; exit 2 ;;
    esac
    $stage
done
