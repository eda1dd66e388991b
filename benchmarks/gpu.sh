#!/usr/bin/env bash
# Everything that only a GPU can tell: builds the operators, runs the tests marked `cuda`, then the benchmarks.
#
#   benchmarks/gpu.sh OUT [STEP ...]
#
# Each step writes OUT/STEP.log, and rows to OUT/rows.jsonl; one that is done is left out when the script runs again, so
# that a run cut off by a time limit goes on where it was. Steps: build tests kernels packing denoise startup.
# Needs Python with torch; jitaccel runs from this checkout. Where diffusers is missing, its wheel is taken from
# $WHEELS (pip download --no-deps diffusers), since such machines often reach no index.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [STEP ...]}
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(build tests kernels packing denoise startup)
python=${PYTHON:-python3}
mkdir -p "$out"

if ! "$python" -c 'import diffusers' 2>/dev/null; then
    "$python" -m pip install --quiet --no-deps --no-index --find-links "${WHEELS:-wheels}" diffusers || exit 2
fi

run() {
    local step=$1
    shift
    if [ -e "$out/$step.done" ]; then
        echo "$step: done before"
        return
    fi
    local started=$SECONDS
    if "$@" >"$out/$step.log" 2>&1; then
        touch "$out/$step.done"
        echo "$step: done in $((SECONDS - started)) s"
    else
        echo "$step: failed after $((SECONDS - started)) s, see $out/$step.log"
        tail -n 3 "$out/$step.log"
        failed=1
    fi
}

bench() {
    "$python" -m benchmarks "$@" --device cuda --json "$out/rows.jsonl"
}

failed=0
for step in "${steps[@]}"; do
    case $step in
        build) run build "$python" -m jitaccel.build cpu cuda --if-stale ;;
        tests) run tests "$python" -m pytest -q -m cuda ;;
        kernels) run kernels bench kernels ;;
        packing) run packing bench packing --size flux --repeat 3 ;;
        denoise) run denoise bench denoise --size flux --repeat 2 ;;
        startup) run startup bench startup --repeat 3 ;;
        *) echo "unknown step $step; known: build tests kernels packing denoise startup" >&2; exit 2 ;;
    esac
done
for step in packing denoise startup; do
    [ -e "$out/$step.log" ] && { echo; cat "$out/$step.log"; }
done
exit $failed
