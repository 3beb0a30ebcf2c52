#!/usr/bin/env bash
# What is bundled and what the README says of it, in stages; each can be run alone, from the repository's root:
#
#   bash experiments/all.sh judge options teacher quantized scores curve pictures
#
# judge       experiments/judge.py -> checkpoints/judge.pt, experiments/judge.json; real.py -> real.json
# options     seven short teachers that differ in one setting each -> experiments/options.json
# teacher     train.py -> checkpoints/teacher.pt, experiments/teacher.json, teacher-curve.*, overfit-dropout.json
# quantized   train.py --wbits .. -> runs/NAME, two of them bundled; experiments/NAME.json
# scores      sample.py --score, spacing.py, exact.py, table.py (needs what quantized made)
# pictures    models that are only calibrated beside the trained ones -> experiments/pictures.png
# curve       15 shorter W4A3 trainings, also in the paper's order of steps -> experiments/curve.json, curve.png
#
# The first three need CIFAR-10 in data/.
# These stages write over what is bundled, so all but `pictures` refuse to run without a GPU, where they would be short.
# PARALLEL=3 runs three trainings at a time, spread over the GPUs (12 GB each); in `quantized`, W4A3 single runs alone.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} PARALLEL=${PARALLEL:-1}
export PYTHONUNBUFFERED=1

side_by_side() {        # runs the shell command "$1" once for each line of stdin, whose words are $0 $1 ..
    local where= gpus
    gpus=$($PYTHON -c 'import torch; print(torch.cuda.device_count())')
    [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || where="CUDA_VISIBLE_DEVICES=\$((SLOT % $gpus))"
    xargs -P "$PARALLEL" -L 1 --process-slot-var=SLOT sh -c "$where $1"
}

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
    $PYTHON train.py --wbits 4 --abits 3 --rotation single --out runs/w4a3-single
    printf '%s\n' "4 3 none" "4 3 double" "4 4 single" |
        side_by_side "$PYTHON train.py --wbits \$0 --abits \$1 --rotation \$2 --out runs/w\$0a\$1-\$2"
    for name in w4a3-none w4a3-double w4a3-single w4a4-single; do
        cp runs/$name/metrics.json experiments/$name.json
    done
    for name in w4a3-none w4a3-single; do cp runs/$name/model.pt checkpoints/$name.pt; done
}

scores() {
    $PYTHON sample.py checkpoints/teacher.pt checkpoints/w4a3-none.pt runs/w4a3-double/model.pt \
        checkpoints/w4a3-single.pt runs/w4a4-single/model.pt --score -n 5000 --out experiments/scores.png
    $PYTHON sample.py checkpoints/teacher.pt --steps 200 --score -n 5000 --out experiments/scores-200.png
    $PYTHON experiments/spacing.py -n 5000
    for device in cuda cpu; do
        $PYTHON experiments/exact.py checkpoints/w4a3-none.pt checkpoints/w4a3-single.pt runs/w4a3-double/model.pt \
            -n 16 --device $device --out experiments/exact-$device.json
    done
    $PYTHON experiments/table.py --write
}

curve() {
    local train="$PYTHON train.py --wbits 4 --abits 3" models=checkpoints/teacher.pt
    for run in "trajectory 500" "mixed 300" "mixed 100" "mixed 30" "mixed 1"; do
        for rotation in none double single; do echo "$rotation $run"; done
    done | side_by_side "$train --rotation \$0 --order \$1 --steps \$2 --out runs/curve/\$0-\$1-\$2"
    for rotation in none double single; do
        for run in mixed-{1,30,100,300} trajectory-500; do models+=" runs/curve/$rotation-$run/model.pt"; done
        models+=" runs/w4a3-$rotation/model.pt"
    done
    $PYTHON sample.py $models --score -n 2000 --out runs/curve/scores.png
    $PYTHON experiments/curve.py
}

pictures() {
    $PYTHON experiments/pictures.py
}

[ $# -gt 0 ] || { sed -n '2,16p' "$0"; exit 2; }
for stage in "$@"; do
    case $stage in
        pictures) ;;
        judge|options|teacher|quantized|scores|curve)
            $PYTHON -c 'import torch; exit(not torch.cuda.is_available())' ||
                { echo "error: stage $stage needs a GPU" >&2; exit 2; } ;;
        *) echo "error: no stage $stage" >&2; exit 2 ;;
    esac
    $stage
done
