#!/usr/bin/env bash
# Runs everything that needs a GPU within ten minutes: sanitizers, tests, benchmarks.
#
#   benchmarks/gpu.sh [--dry-run] OUT [STEP ...]
#
# First run `make gpu-prepare` on a machine with compilers and a network. It fills .gpu/ with the operators for one
# architecture and with wheels; copy that folder to the GPU machine. Without it, missing operators are built here, and
# diffusers must be installed.
#
# Each step has its own time limit and ends at the total budget ($BUDGET, 570 s) at the latest. A failed step does not stop
# the next. After each step OUT has three files: rows.jsonl (measurements), log.txt (all output) and steps.txt (the result
# of each step). Working files are in .gpu/work: another run in the same tree continues there and skips finished steps and
# closed cases. To continue on another machine, copy OUT's files into .gpu/work first.
# --dry-run runs all steps on the CPU at tiny sizes, to test the script itself. $PYTHON sets another interpreter, and
# $JITACCEL_COMMIT the commit for the rows if the checkout has no history.
set -u
cd "$(dirname "$0")/.."
dry=
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
out=${1:?usage: benchmarks/gpu.sh [--dry-run] OUT [STEP ...]}
shift
# Most important first. gpu2.sh runs those of the second line.
first="load memcheck racecheck operators graphs targets agreement record"
second="float8 batches large video wan cpp kernels startup"
steps=("$@")
[ ${#steps[@]} -gt 0 ] || read -ra steps <<<"$first"
python=${PYTHON:-python3}
budget=${BUDGET:-570}
gpu=$PWD/.gpu
work=$gpu/work
[ -z "$dry" ] || work=$gpu/dry
mkdir -p "$out" "$work"
[ -z "$dry" ] || rm -f "$work"/*

if compgen -G "$gpu/wheels/*.whl" >/dev/null && [ -z "$dry" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$gpu/site" "$gpu"/wheels/*.whl
    export PYTHONPATH=$gpu/site${PYTHONPATH:+:$PYTHONPATH}
fi
if compgen -G "$gpu/lib/_C_*.so" >/dev/null && [ -z "$dry" ]; then
    export JITACCEL_LIBRARIES=$gpu/lib
fi
export PYTHONUNBUFFERED=1

keep() { # saves the results so far, whatever happens to the next step
    cp "$work"/rows.jsonl "$work"/log.txt "$work"/steps.txt "$out"/ 2>/dev/null
    return 0
}

run() { # run STEP LIMIT COMMAND ...
    local step=$1 limit=$2 left=$((budget - SECONDS)) started=$SECONDS what
    shift 2
    if grep -qs "^$step: done" "$work/steps.txt"; then
        echo "$step: done before"
        return
    fi
    if [ "$left" -lt 5 ]; then
        echo "$step: not begun within $budget s, run the script again"
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    printf '\n== %s: %s\n' "$step" "$*" >>"$work/log.txt"
    timeout --kill-after=5 "$limit" "$@" >"$work/step.txt" 2>&1
    case $? in
        0) what=done ;;
        124 | 137) what="cut off" failed=1 ;;
        *) what=failed failed=1 ;;
    esac
    [ "$what" = done ] && grep -q "cases were not begun within" "$work/step.txt" && [ -z "$dry" ] && what=begun
    cat "$work/step.txt" >>"$work/log.txt"
    what="$step: $what after $((SECONDS - started)) s"
    echo "$what" | tee -a "$work/steps.txt"
    case $what in *done*) ;; *) tail -n 3 "$work/step.txt" ;; esac
    keep
}

# A dry run only looks up most cases, because none begins within a nanosecond.
bench() { # bench STEP LIMIT ARGUMENTS ...
    local step=$1 limit=$2 device=cuda within=$((budget - SECONDS))
    shift 2
    [ -z "$dry" ] || { device=cpu within=1e-9; }
    [ -z "$dry" ] || [ "$step" != targets ] || within=60
    [ "$limit" -lt "$within" ] 2>/dev/null && within=$limit
    run "$step" "$limit" "$python" -m benchmarks "$@" --device "$device" --json "$work/rows.jsonl" --resume --within "$within"
}

sanitize() { # sanitize STEP LIMIT TOOL
    if [ -n "$dry" ]; then
        run "$1" "$2" "$python" -m benchmarks.odd_sizes --device cpu --grids 3
    else
        # One allocation per tensor, so that accesses outside a kernel's own tensors are detected.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$1" "$2" compute-sanitizer --tool "$3" --error-exitcode 1 \
            "$python" -m benchmarks.odd_sizes
    fi
}

tests() { # tests STEP LIMIT FILE ...
    local step=$1 limit=$2
    shift 2
    [ -z "$dry" ] || set -- "$@" --collect-only
    run "$step" "$limit" "$python" -m pytest -q -m cuda --numprocesses 8 --dist worksteal "$@"
}

failed=0 size=targets device=cuda
[ -z "$dry" ] || { size=tiny device=cpu; }
for step in "${steps[@]}"; do
    case $step in
        load) run load 60 "$python" -c 'import torch; from jitaccel import ops; print(torch.__version__, ops.compiled(), ops.missing()); raise SystemExit(torch.cuda.is_available() and "cuda" not in ops.compiled())' ;;
        memcheck) sanitize memcheck 75 memcheck ;;
        racecheck) sanitize racecheck 75 racecheck ;;
        operators) tests operators 90 tests/ops ;;
        graphs) tests graphs 60 tests/execution ;;
        targets) bench targets 45 targets --size "$size" --repeat 5 ;;
        agreement) bench agreement 60 agreement ;;
        record) bench record 570 record --size flux --only 1024x1024 --repeat 1 ;;
        kernels) bench kernels 300 kernels ;;
        float8) bench float8 300 record --size flux --only float8 --repeat 2 ;;
        batches) bench batches 300 packing --size flux --repeat 3 ;;
        large) bench large 500 record --size flux --only 2048x2048 --repeat 1 ;;
        video) bench video 200 kernels --size video ;;
        wan) bench wan 200 codebases --size video-480p --repeat 2 ;;
        cpp) run cpp 200 "$python" -m benchmarks.checkout.cpp_program --device "$device" ;;
        startup) bench startup 300 startup --repeat 1 ;;
        *) echo "unknown step $step; known: $first $second" >&2; exit 2 ;;
    esac
done
# Finally, a short table of the record so far.
printf -- '<!-- table: record -->\n<!-- /table -->\n' >"$work/table.md"
"$python" -m benchmarks.table --results "$work" "$work/table.md" >/dev/null 2>&1 && { echo; cut -c1-160 "$work/table.md"; }
exit $failed
