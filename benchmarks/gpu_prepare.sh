#!/usr/bin/env bash
# Fills .gpu/ with operators for the architecture of the GPU machine, and with wheels that it lacks. See gpu.sh.
#
#   benchmarks/gpu_prepare.sh      $ARCH: 9.0 (H100, H200); $PYTHON: one with torch; $WHEEL_PYTHON: the GPU machine's, 3.12
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p .gpu/lib .gpu/wheels
TORCH_CUDA_ARCH_LIST=${ARCH:-9.0} "$python" -m jitaccel.build cpu cuda --if-stale --out .gpu/lib
for package in diffusers torchao; do
    version=$("$python" -c "import importlib.metadata as m; print('==' + m.version('$package'))" 2>/dev/null || true)
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${WHEEL_PYTHON:-3.12}" \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest .gpu/wheels \
        --constraint requirements/quantised.txt \
        "$package$version" || echo "gpu_prepare: no wheel of $package$version, the steps that need it will say so" >&2
done
du --summarize --human-readable .gpu
