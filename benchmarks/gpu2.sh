#!/usr/bin/env bash
# Continues after gpu.sh, in another ten minutes: float8, batches, 2048 x 2048, operators and a transformer at Wan's shapes,
# the C++ program against Python, all grids of the operators, start-up.
#
#   benchmarks/gpu2.sh [--dry-run] OUT
set -u
options=()
[ "${1:-}" = --dry-run ] && { options+=("$1"); shift; }
exec "$(dirname "$0")/gpu.sh" "${options[@]}" "${1:?usage: benchmarks/gpu2.sh [--dry-run] OUT}" \
    load float8 batches large video wan cpp kernels startup
