#!/usr/bin/env bash
# The whole suite in other versions than CI's, each in an environment of its own, which goes afterwards:
#
#   bash tests/versions.sh 3.10:2.4.0 3.13:2.14.1        # Python:torch; both ends of what requirements.txt promises
#
# Needs python3.10, python3.13 .. on the path. numpy 2 wants torch 2.3 or later. More options for pip: PIP_ARGS.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,6p' "$0"; exit 2; }
where=$(mktemp -d) failed=0
trap 'rm -rf "$where"' EXIT
for pair in "$@"; do
    python=${pair%%:*} torch=${pair##*:} env=$where/$torch
    "python$python" -m venv "$env"
    # shellcheck disable=SC2086
    "$env/bin/pip" install -q ${PIP_ARGS:-} "torch==$torch" -r requirements.txt
    start=$SECONDS
    "$env/bin/python" -m pytest -q -p no:cacheprovider || failed=1
    echo "Python $python, torch $torch: $((SECONDS - start)) s"
done
exit $failed
