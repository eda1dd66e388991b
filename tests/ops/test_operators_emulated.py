"""The CUDA kernels on the CPU through `emulator/cuda_runtime.h`, which tests their logic without a GPU.

Results are compared with the compiled CPU operators, also with blocks and threads in reverse order. An emulator cannot
show device memory errors, races within a warp, or speed; `benchmarks/gpu.sh` covers these.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jitaccel import build, ops
from jitaccel.ops.schema import SCHEMAS, num_tokens_of
from tests.support.operators import ARGUMENTS, Fields, call, compiled, fields

EMULATOR = Path(__file__).parent / "emulator"
LIBRARIES = Path(__file__).resolve().parents[2] / "build" / "emulator"
GRIDS = [(1, 1), (1, 13), (5, 7), (12, 70), (3, 4, 5), (2, 9, 20)]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def _library() -> Path:
    """Returns the library of the emulated operators, built if these sources have none yet."""
    digest = hashlib.sha256((EMULATOR / "cuda_runtime.h").read_bytes() + str(build.source_hash("cuda")).encode())
    out = LIBRARIES / f"{digest.hexdigest()[:16]}.so"
    if out.is_file():
        return out
    root, unfinished = build.find_torch(), out.with_suffix(f".{os.getpid()}.tmp")
    LIBRARIES.mkdir(parents=True, exist_ok=True)
    files = [file for file in build.sources("cuda") if file.stem != "library"]
    # -fno-extern-tls-init: shared memory has no constructor to call first.
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-extern-tls-init", "-DUSE_CUDA"]
    options += [f"-DTORCH_TARGET_VERSION={build.TARGET_VERSION}", "-I", EMULATOR, "-isystem", root / "include"]
    link = ["-x", "none", "-L", root / "lib", "-ltorch_cpu", "-Xlinker"]
    link += [f"--version-script={build.source_folder() / 'exports.map'}"]
    subprocess.run(["g++", *options, "-x", "c++", *files, *link, "-o", unfinished], check=True)
    unfinished.replace(out)
    return out


@pytest.fixture(scope="module")
def emulated() -> Iterator[Any]:
    """Returns the operators by name."""
    definitions = torch.library.Library("jitaccel_emulated", "DEF")
    for name, signature in SCHEMAS.items():
        definitions.define(name + signature)
    torch.ops.load_library(str(_library()))
    yield lambda name: getattr(torch.ops.jitaccel_emulated, name)
    del definitions


def _check(emulated: Any, name: str, f: Fields, arguments: tuple[Any, ...] | None = None) -> None:
    """Compares with the CPU operator: integers and copies bit for bit, sums within the rounding of another order."""
    found = call(emulated(name), name, arguments or ARGUMENTS[name](f))
    expected = call(compiled(name), name, arguments or ARGUMENTS[name](f))
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    rounding = torch.finfo(found.dtype).eps + 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_kernel_computes_what_the_cpu_operator_does(
    emulated: Any, name: str, grid: tuple[int, ...], dtype: torch.dtype
) -> None:
    num_tokens = num_tokens_of(grid)
    for count, channels in ((1, 5), (max(1, num_tokens // 3), 16), (max(1, num_tokens // 2), 72), (num_tokens, 1)):
        _check(emulated, name, fields(grid, count, channels, dtype=dtype))


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_order_of_blocks_and_threads_changes_no_bit(emulated: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for grid, channels in (((12, 70), 72), ((2, 9, 20), 5)):
        f = fields(grid, num_tokens_of(grid) // 3, channels)
        found = []
        for order in "01":
            monkeypatch.setenv("JITACCEL_EMULATOR_REVERSED", order)
            found.append(call(emulated(name), name, ARGUMENTS[name](f)))
        assert torch.equal(*found)


@pytest.mark.parametrize("scale", [0.75, 3.0])
@pytest.mark.parametrize("name", ["lift", "micro_flow_into"])
def test_lift_blurs_nine_wide_and_any_width(emulated: Any, name: str, scale: float) -> None:
    for grid in ((12, 33), (2, 5, 3)):
        f = fields(grid, num_tokens_of(grid) // 3, 16, blur_scale=scale)
        assert len(f.weights) == 9 if scale == 0.75 else len(f.weights) > 9
        _check(emulated, name, f)


@pytest.mark.parametrize(("patch", "factor"), [(2, 2), (1, 2), (2, 4), (1, 3), (3, 2)])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_pooling_of_any_size(emulated: Any, dtype: torch.dtype, patch: int, factor: int) -> None:
    for grid in ((6, 9), (2, 5, 7)):
        f = fields(grid, 9, 4 * patch**2, dtype=dtype)
        level = f.levels[0]
        arguments = (f.state, grid, patch, factor, level)
        _check(emulated, "pool", f, arguments)
        pooled = ops.pool(*arguments)
        _check(emulated, "lift_pooled", f, (torch.randn_like(pooled), pooled, *arguments))


def test_activation_of_many_blocks_breaks_ties_by_place(emulated: Any) -> None:
    f = fields((90, 70), 2000, 1)
    scores = (f.importance * 40).floor() - 3
    for count in (1, 700, 4300):
        chosen = emulated("activate")(scores, f.anchors, count)
        assert torch.equal(chosen, ops.activate(scores, f.anchors, count))


def test_index_beyond_the_grid_is_skipped(emulated: Any) -> None:
    """What the CUDA kernels do with wrong indices, which they do not check; the CPU operators refuse them."""
    f = fields((6, 8), 12, 8)
    wrong = f.anchors.clone()
    wrong[:, -1] = 48 + 10**6
    nearest = emulated("nearest_anchor")(wrong, f.grid)
    assert int(nearest.min()) >= 0 and int(nearest.max()) < 11
    assert emulated("activate")(f.importance, wrong, 3).shape == (2, 3)
    tokens, state = f.tokens.clone(), f.state.clone()
    tokens[0, 0], tokens[1, -1] = -5, 48
    arguments = (f.previous, f.velocity, f.noise, tokens, f.nearest, f.anchors, f.grid, f.weights, f.levels, 1.0)
    emulated("micro_flow_into")(state, *arguments)
    moved = (state != f.state).any(dim=2)
    assert moved.sum() == f.tokens.numel() - 2
    assert not moved[0, f.tokens[0, 0]] and not moved[1, f.tokens[1, -1]]
