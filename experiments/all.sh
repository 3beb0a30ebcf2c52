#!/usr/bin/env bash
# Everything behind the README's numbers, in stages; each can be run alone, from the repository's root:
#
#   bash experiments/all.sh judge teacher quantized scores
#
# judge       experiments/judge.py -> checkpoints/judge.pt, experiments/judge.json (needs data/)
# teacher     train.py -> checkpoints/teacher.pt, experiments/teacher.json (needs data/)
# quantized   train.py --wbits .. -> runs/NAME, two of them bundled; experiments/NAME.json
# scores      sample.py --score, exact.py, table.py
#
# PARALLEL=4 runs the quantized trainings side by side (12 GB of GPU memory each); the default is one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} PARALLEL=${PARALLEL:-1}
export PYTHONUNBUFFERED=1

judge() { $PYTHON experiments/judge.py --data data; }

teacher() {
    $PYTHON train.py --out runs/teacher
    cp runs/teacher/model.pt checkpoints/teacher.pt
    cp runs/teacher/metrics.json experiments/teacher.json
}

quantized() {
    printf '%s\n' "4 3 none" "4 3 double" "4 3 single" "4 4 single" |
        xargs -P "$PARALLEL" -L 1 sh -c "$PYTHON train.py --wbits \$0 --abits \$1 --rotation \$2 --out runs/w\$0a\$1-\$2"
    for name in w4a3-none w4a3-double w4a3-single w4a4-single; do cp runs/$name/metrics.json experiments/$name.json; done
    for name in w4a3-none w4a3-single; do cp runs/$name/model.pt checkpoints/$name.pt; done
}

scores() {
    $PYTHON sample.py checkpoints/teacher.pt checkpoints/w4a3-none.pt runs/w4a3-double/model.pt checkpoints/w4a3-single.pt \
        runs/w4a4-single/model.pt --score -n 5000 --out experiments/scores.png
    $PYTHON experiments/exact.py checkpoints/w4a3-none.pt checkpoints/w4a3-single.pt -n 200
    $PYTHON experiments/table.py --write
}

[ $# -gt 0 ] || { sed -n '2,12p' "$0"; exit 2; }
for stage in "$@"; do
    case $stage in judge|teacher|quantized|scores) $stage ;; *) echo "error: no stage $stage" >&2; exit 2 ;; esac
done
