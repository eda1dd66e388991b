#!/usr/bin/env bash
# Everything that only a GPU can tell: builds the operators, runs the tests marked `cuda`, then the benchmarks.
#
#   benchmarks/gpu.sh OUT [STEP ...]
#
# Each step writes OUT/STEP.log, and rows to OUT/rows.jsonl. Nothing is begun after $BUDGET seconds (540); run it again to
# go on: a step that is done is left out, and `record` goes on with the cases that OUT/rows.jsonl has not.
# Steps: build tests record kernels packing denoise startup. Copy rows.jsonl to benchmarks/results/WHAT-GPU-DATE.jsonl.
# Where the checkout has no history, JITACCEL_COMMIT names the commit that the rows are of.
# Needs Python with torch; jitaccel runs from this checkout. Where diffusers is missing, its wheel is taken from
# $WHEELS (pip download --no-deps diffusers), since such machines often reach no index; torchao's too, if it is there.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [STEP ...]}
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(build tests record kernels packing denoise startup)
python=${PYTHON:-python3}
budget=${BUDGET:-540}
mkdir -p "$out"

wheel() {
    "$python" -m pip install --quiet --no-deps --no-index --find-links "${WHEELS:-wheels}" "$1"
}
"$python" -c 'import diffusers' 2>/dev/null || wheel diffusers || exit 2
"$python" -c 'import torchao' 2>/dev/null || wheel torchao 2>/dev/null || echo "torchao: not installed, float8 is left out"

run() {
    local step=$1
    shift
    if [ -e "$out/$step.done" ]; then
        echo "$step: done before"
        return
    fi
    if [ $SECONDS -ge "$budget" ]; then
        echo "$step: not begun within $budget s, run the script again"
        return
    fi
    local started=$SECONDS
    if "$@" >"$out/$step.log" 2>&1; then
        if grep -q "cases were not begun within" "$out/$step.log"; then
            echo "$step: begun, run the script again"
        else
            touch "$out/$step.done"
            echo "$step: done in $((SECONDS - started)) s"
        fi
    else
        echo "$step: failed after $((SECONDS - started)) s, see $out/$step.log"
        tail -n 3 "$out/$step.log"
        failed=1
    fi
}

bench() {
    local left=$((budget - SECONDS))
    "$python" -m benchmarks "$@" --device cuda --json "$out/rows.jsonl" --resume --within "$((left > 1 ? left : 1))"
}

failed=0
for step in "${steps[@]}"; do
    case $step in
        build) run build "$python" -m jitaccel.build cpu cuda --if-stale ;;
        tests) run tests "$python" -m pytest -q -m cuda ;;
        record) run record bench record --size flux --repeat 2 ;;
        kernels) run kernels bench kernels ;;
        packing) run packing bench packing --size flux --repeat 3 ;;
        denoise) run denoise bench denoise --size flux --repeat 2 ;;
        startup) run startup bench startup --repeat 1 ;; # twice 12 billion weights, cold and warm
        *) echo "unknown step $step; known: build tests record kernels packing denoise startup" >&2; exit 2 ;;
    esac
done
for step in tests packing denoise startup; do
    [ -e "$out/$step.log" ] && { echo; tail -n 40 "$out/$step.log"; }
done
# Last, a short table of all rows so far.
printf -- '<!-- table: record -->\n<!-- /table -->\n' >"$out/table.md"
"$python" -m benchmarks.table --results "$out" "$out/table.md" && { echo; cut -c1-160 "$out/table.md"; }
exit $failed
