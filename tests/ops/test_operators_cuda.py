"""The CUDA operators against the plain-torch reference, and GPU-only behaviour: graphs, streams, synchronisation.

Expected values come from the CPU. Sums may have twice the error of plain torch in the same dtype against float64;
indices, copies and repetitions must be bitwise equal.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jitaccel import ops
from jitaccel.ops import reference

DEVICE = "cuda"
DTYPES = ops.DTYPES
GRIDS = [(1, 1), (1, 100), (100, 1), (13, 9), (33, 65), (64, 64), (2, 3, 4), (3, 1, 5), (4, 5, 33), (5, 16, 12)]
CHANNELS = [1, 3, 16, 20, 64, 128]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in ops.compiled(), reason="the CUDA operators are not built"),
]


def _size(grid: tuple[int, ...]) -> int:
    return math.prod(grid)


def _counts(num_tokens: int) -> list[int]:
    return sorted({1, max(1, num_tokens // 3), max(1, num_tokens - 1), num_tokens})


def _rows(batch: int, num_tokens: int, count: int, seed: int = 0) -> Tensor:
    """Returns `count` rising tokens for each image."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _weights(radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / max(radius / 3, 1.0)).square())
    return weights / weights.sum()


def _plan(grid: tuple[int, ...], count: int, batch: int = 2, radius: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Returns nearest, anchors and weights, on the CPU."""
    anchors = _rows(batch, _size(grid), count)
    return reference.nearest_anchor(anchors, grid), anchors, _weights(radius)


def _there(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in tensors)


def _lift(values: Tensor, nearest: Tensor, anchors: Tensor, grid: tuple[int, ...], weights: Tensor) -> Tensor:
    """Returns the lift of CPU tensors, taken on the GPU."""
    values, nearest, anchors, weights = _there(values, nearest, anchors, weights)
    return ops.lift(values, nearest, anchors, grid, weights)


def _assert_as_exact(result: Tensor, exact: Tensor, plain: Tensor) -> None:
    """`exact` in float64, `plain`: plain torch's, of the dtype of `result`."""
    assert result.dtype == plain.dtype
    error, allowed = ((x.cpu().double() - exact).abs().max().item() for x in (result, plain))
    assert error <= 2 * allowed + 1e-6 * max(1.0, exact.abs().max().item())


def _assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def _at(x: Tensor, tokens: Tensor) -> Tensor:
    """Returns the tokens' values without touching their bits, on the CPU."""
    return torch.stack([image[row] for image, row in zip(x.cpu(), tokens.cpu(), strict=True)])


@pytest.mark.parametrize("grid", [*GRIDS, (1, 3000), (3000, 1)])
def test_nearest_anchor_equals_the_reference(grid: tuple[int, ...]) -> None:
    for count in _counts(_size(grid)):
        anchors = _rows(3, _size(grid), count, seed=count)
        result = ops.nearest_anchor(anchors.to(DEVICE), grid)
        assert torch.equal(result.cpu(), reference.nearest_anchor(anchors, grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_lift_is_as_exact_as_plain_torch(grid: tuple[int, ...], channels: int) -> None:
    for count in _counts(_size(grid)):
        nearest, anchors, weights = _plan(grid, count)
        for dtype in DTYPES:
            values = _randn(2, count, channels, dtype=dtype)
            exact = reference.lift(values.double(), nearest, anchors, grid, weights)
            plain = reference.lift(values, nearest, anchors, grid, weights)
            result = _lift(values, nearest, anchors, grid, weights)
            _assert_as_exact(result, exact, plain)
            _assert_same_bits(_at(result, anchors), values)


@pytest.mark.parametrize("radius", [0, 1, 10, 30, 100])
@pytest.mark.parametrize("grid", [(2, 300), (300, 2), (40, 40), (4, 6, 20)])
def test_lift_takes_any_radius(grid: tuple[int, ...], radius: int) -> None:
    count = _size(grid) // 3
    nearest, anchors, weights = _plan(grid, count, radius=radius)
    for dtype in (torch.float32, torch.bfloat16):
        values = _randn(2, count, 24, dtype=dtype)
        exact = reference.lift(values.double(), nearest, anchors, grid, weights)
        plain = reference.lift(values, nearest, anchors, grid, weights)
        _assert_as_exact(_lift(values, nearest, anchors, grid, weights), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_takes_thousands_of_channels(dtype: torch.dtype) -> None:
    grid = (9, 14)
    nearest, anchors, weights = _plan(grid, 40)
    values = _randn(2, 40, 3072, dtype=dtype)
    exact = reference.lift(values.double(), nearest, anchors, grid, weights)
    plain = reference.lift(values, nearest, anchors, grid, weights)
    _assert_as_exact(_lift(values, nearest, anchors, grid, weights), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_keeps_the_bits_of_nan_and_infinity_at_anchors(dtype: torch.dtype) -> None:
    grid = (6, 7)
    nearest, anchors, weights = _plan(grid, 12)
    values = _randn(2, 12, 16, dtype=dtype)
    values[0, 3, 2], values[1, 4, 3] = math.nan, math.inf
    _assert_same_bits(_at(_lift(values, nearest, anchors, grid, weights), anchors), values)


def test_inputs_need_not_be_contiguous() -> None:
    grid = (6, 7)
    nearest, anchors, weights = _there(*_plan(grid, 12))
    values, velocity = _there(_randn(2, 16, 12).transpose(1, 2), _randn(2, 42, 32)[:, :, ::2])
    sparse = torch.stack([nearest, nearest], dim=2)[:, :, 0]
    lifted = ops.lift(values, sparse, anchors.T.contiguous().T, grid, weights.repeat_interleave(2)[::2])
    _assert_same_bits(lifted, ops.lift(values.contiguous(), nearest, anchors, grid, weights))
    _assert_same_bits(ops.importance(velocity, grid), ops.importance(velocity.contiguous(), grid))


@pytest.mark.parametrize("grid", [*GRIDS, (8, 24)])
@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_importance_equals_the_reference(grid: tuple[int, ...], window: int) -> None:
    for channels in CHANNELS:
        for dtype in DTYPES:
            velocity = (_randn(2, _size(grid), channels) + 3).to(dtype)
            expected = reference.importance(velocity.double(), grid, window)
            result = ops.importance(velocity.to(DEVICE), grid, window)
            torch.testing.assert_close(result.cpu(), expected, rtol=3e-5, atol=1e-6)


def test_importance_keeps_small_variances_beside_a_large_mean() -> None:
    velocity = 1000 + 0.1 * _randn(1, 30 * 30, 64)
    expected = reference.importance(velocity.double(), (30, 30))
    result = ops.importance(velocity.to(DEVICE), (30, 30)).cpu()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_importance_without_channels_is_the_mean_of_nothing() -> None:
    assert ops.importance(torch.zeros(2, 6, 0, device=DEVICE), (2, 3)).isnan().all()


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 1023, 1024, 1025, 4096, 70_001])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "wide"])
def test_activate_equals_the_reference(num_tokens: int, kind: str) -> None:
    importance = _randn(3, num_tokens)
    if kind == "ties":
        importance = (importance * 2).round()
    elif kind == "equal":
        importance = torch.full_like(importance, 0.25)
    elif kind == "zeros":  # of both signs, which tie
        importance = importance.sign() * 0.0
    elif kind == "wide":
        importance = importance.sign() * torch.exp2(60 * importance.abs() - 140)
    for num_anchors in _counts(num_tokens):
        anchors = _rows(3, num_tokens, num_anchors)
        inactive = num_tokens - num_anchors
        for count in sorted({0, min(1, inactive), inactive // 3, inactive}):
            result = ops.activate(*_there(importance, anchors), count)
            assert torch.equal(result.cpu(), reference.activate(importance, anchors, count))


def test_activate_never_takes_anchors_whatever_is_not_finite() -> None:
    importance = _randn(2, 2000)
    importance[:, ::3], importance[:, 1::7], importance[:, 2::5] = math.nan, -math.nan, -math.inf
    anchors = _rows(2, 2000, 600)
    for row, taken in zip(anchors, ops.activate(*_there(importance, anchors), 1400).cpu(), strict=True):
        assert torch.equal(torch.cat([row, taken]).sort().values, torch.arange(2000))


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("grid", [(1, 9), (13, 9), (33, 65), (4, 5, 33)])
def test_micro_flow_is_as_exact_as_plain_torch(grid: tuple[int, ...], weight: float) -> None:
    num_tokens = _size(grid)
    nearest, anchors, weights = _plan(grid, num_tokens // 3)
    levels = torch.tensor([0.9, 0.7])
    tokens = _rows(2, num_tokens, num_tokens // 4, seed=1)  # some are anchors, which are their own prior
    others = torch.ones(2, num_tokens, dtype=torch.bool).scatter(1, tokens, False)
    for channels in (1, 16, 20):
        for shift in range(3):
            dtypes = (*DTYPES[shift:], *DTYPES[:shift], DTYPES[shift])
            fields = [_randn(2, num_tokens, channels, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
            rest = (tokens, nearest, anchors)
            plain, exact, result = fields[0].clone(), fields[0].double(), fields[0].to(DEVICE)
            reference.micro_flow_into(plain, *fields[1:], *rest, grid, weights, levels, weight)
            wide = [x.double() for x in fields[1:]]
            reference.micro_flow_into(exact, *wide, *rest, grid, weights, levels.double(), weight)
            ops.micro_flow_into(result, *_there(*fields[1:], *rest), grid, *_there(weights, levels), weight)
            _assert_as_exact(result, exact, plain)
            _assert_same_bits(result.cpu()[others], fields[0][others])


def test_micro_flow_of_weight_one_forgets_the_state() -> None:
    grid = (6, 7)
    nearest, anchors, weights = _there(*_plan(grid, 12))
    tokens = _rows(2, 42, 9, seed=1)
    state = torch.full((2, 42, 16), math.inf, device=DEVICE)
    fields = _there(*(_randn(2, 42, 16, seed=i) for i in range(3)))
    levels = torch.tensor([0.9, 0.7], device=DEVICE)
    ops.micro_flow_into(state, *fields, tokens.to(DEVICE), nearest, anchors, grid, weights, levels, 1.0)
    assert _at(state, tokens).isfinite().all()
    assert int(state.isfinite().sum()) == 2 * 9 * 16


@pytest.mark.parametrize("grid", [(3, 5, 7), (4, 1, 9), (2, 33, 65), (5, 16, 12)])
def test_stack_keeps_to_each_frame_as_the_reference_does(grid: tuple[int, ...]) -> None:
    num_tokens, size = _size(grid), _size(grid[1:])
    is_anchor = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(0)) < 0.3
    is_anchor[:, ::size] = True
    count = int(is_anchor.sum(dim=1).max())
    anchors = is_anchor.float().topk(count, dim=1).indices.sort(dim=1).values
    nearest, weights, levels = reference.nearest_anchor(anchors, grid, True), _weights(3), torch.tensor([0.9, 0.7])
    plan = (nearest, anchors, grid, weights)
    there = (*_there(nearest, anchors), grid, weights.to(DEVICE))
    assert torch.equal(ops.nearest_anchor(anchors.to(DEVICE), grid, True).cpu(), nearest)
    tokens = _rows(2, num_tokens, num_tokens // 4, seed=1)
    for dtype in DTYPES:
        values, fields = _randn(2, count, 16, dtype=dtype), [_randn(2, num_tokens, 16, seed=i) for i in range(4)]
        exact, plain = (reference.lift(x, *plan, True) for x in (values.double(), values))
        _assert_as_exact(ops.lift(values.to(DEVICE), *there, True), exact, plain)
        velocity = _randn(2, num_tokens, 16, dtype=dtype)
        expected = reference.importance(velocity.double(), grid, 3, True)
        found = ops.importance(velocity.to(DEVICE), grid, 3, True)
        torch.testing.assert_close(found.cpu(), expected, rtol=3e-5, atol=1e-6)
        moved, result = fields[0].clone(), fields[0].to(DEVICE)
        reference.micro_flow_into(moved, *fields[1:], tokens, *plan, levels, 0.5, True)
        ops.micro_flow_into(result, *_there(*fields[1:], tokens), *there, levels.to(DEVICE), 0.5, True)
        torch.testing.assert_close(result.cpu(), moved, rtol=1e-5, atol=1e-5)


def test_frame_without_an_anchor_leads_nowhere_out_of_memory() -> None:
    anchors = torch.tensor([[0, 7, 12], [0, 1, 13]], device=DEVICE)
    nearest = ops.nearest_anchor(anchors, (3, 2, 3), True)
    assert int(nearest.min()) >= 0 and int(nearest.max()) < 3


def test_empty_batches_give_empty_results() -> None:
    none = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    weights, levels = _there(_weights(3), torch.tensor([0.9, 0.7]))
    values, field = torch.zeros(0, 2, 4, device=DEVICE), torch.zeros(0, 6, 4, device=DEVICE)
    nearest = ops.nearest_anchor(none, (2, 3))
    assert nearest.shape == (0, 6)
    assert ops.lift(values, nearest, none, (2, 3), weights).shape == (0, 6, 4)
    assert ops.importance(field, (2, 3)).shape == (0, 6)
    assert ops.activate(field[:, :, 0], none, 2).shape == (0, 2)
    ops.micro_flow_into(field, field, field, field, none, nearest, none, (2, 3), weights, levels, 1.0)


class _Scene:
    """A picture of 32 x 32 tokens on the GPU, and the operators' calls on it."""

    grid = (32, 32)

    def __init__(self, seed: int = 0) -> None:
        self.nearest, self.anchors, self.weights = _there(*_plan(self.grid, 330))
        self.values, self.state, self.previous, self.velocity, self.noise = _there(
            _randn(2, 330, 64, dtype=torch.bfloat16, seed=seed),
            *(_randn(2, 1024, 64, seed=seed + i) for i in range(1, 5)),
        )
        self.levels = torch.tensor([0.9, 0.7], device=DEVICE)

    def transition(self) -> tuple[Tensor, ...]:
        """Runs a stage boundary into `state` and returns the result of each operator."""
        importance = ops.importance(self.velocity, self.grid)
        tokens = ops.activate(importance, self.anchors, 200)
        nearest = ops.nearest_anchor(self.anchors, self.grid)
        fields = (self.state, self.previous, self.velocity, self.noise)
        plan = (nearest, self.anchors, self.grid, self.weights)
        ops.micro_flow_into(*fields, tokens, *plan, self.levels, 1 / 3)
        return importance, tokens, nearest, ops.lift(self.values, *plan), self.state


def test_runs_repeat_bit_for_bit() -> None:
    first = [x.clone() for x in _Scene().transition()]
    for _ in range(20):
        for a, b in zip(first, _Scene().transition(), strict=True):
            _assert_same_bits(a, b)


def test_operators_do_not_wait_for_the_device() -> None:
    _Scene().transition()  # kernels are loaded and memory is reserved once, which may wait
    scene = _Scene()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second or so: an operator that waits returns after it
        scene.transition()
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Returns the graph of `run`, after one run outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation within is an error
        run()
    return graph


def test_a_captured_transition_replays_on_other_fields_and_levels() -> None:
    captured, results = _Scene(), []
    graph = _capture(lambda: results.append(captured.transition()))
    for seed, levels in ((1, (0.8, 0.6)), (2, (0.0909, 0.0))):
        fresh = _Scene(seed)
        fresh.levels.copy_(torch.tensor(levels))
        for name in ("values", "state", "previous", "velocity", "noise", "levels"):
            getattr(captured, name).copy_(getattr(fresh, name))
        graph.replay()
        for a, b in zip(results[-1], fresh.transition(), strict=True):
            _assert_same_bits(a, b)


def test_operators_run_on_the_current_stream() -> None:
    expected = [x.clone() for x in _Scene().transition()]
    scene = _Scene()
    inputs = {name: getattr(scene, name).clone() for name in ("values", "state", "velocity")}
    for name in inputs:
        getattr(scene, name).zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would find zeros
        for name, value in inputs.items():
            getattr(scene, name).copy_(value)
        results = scene.transition()
    stream.synchronize()
    for a, b in zip(expected, results, strict=True):
        _assert_same_bits(a, b)


def test_tensors_on_other_devices_are_refused_by_name() -> None:
    nearest, anchors, weights = _plan((6, 7), 12)
    values = torch.zeros(2, 12, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="lift: nearest must be on the device of the other arguments"):
        torch.ops.jitaccel.lift(values, nearest, anchors.to(DEVICE), [6, 7], weights.to(DEVICE))


_WRONG_INDICES = """
import torch
from jitaccel import ops

def wrong(run, *words):
    try:
        run()
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

def on_gpu(*rows):
    return torch.tensor(rows, device="cuda")

anchors, weights, grid = on_gpu([0, 4], [1, 5]), torch.ones(1, device="cuda"), (2, 3)
values, field, levels = torch.ones(2, 2, 4, device="cuda"), torch.ones(2, 6, 4, device="cuda"), on_gpu(0.9, 0.7)
nearest = ops.nearest_anchor(anchors, grid)
unsorted, beyond = on_gpu([0, 4], [5, 1]), on_gpu([0, 4], [1, 6])
rising = "anchors must rise strictly within 0..5, got "
wrong(lambda: ops.nearest_anchor(unsorted, grid), "nearest_anchor: " + rising + "1 after 5 in image 1; ")
wrong(lambda: ops.nearest_anchor(beyond, grid), "nearest_anchor: " + rising + "6 after 1 in image 1; ")
stacked = on_gpu([0, 4], [0, 1])
wrong(lambda: ops.nearest_anchor(stacked, (2, 1, 3), True), "every frame, got none in frame 1 of image 1; ")
wrong(lambda: ops.lift(values, nearest, unsorted, grid, weights), "lift: " + rising)
wrong(lambda: ops.lift(values, nearest + 1, anchors, grid, weights), "lift: nearest must lie in 0..1, got 2; ")
wrong(lambda: ops.activate(field[:, :, 0], unsorted, 1), "activate: " + rising)
tokens = on_gpu([2, 3], [3, 3])
move = lambda: ops.micro_flow_into(
    field, field, field, field, tokens, nearest, anchors, grid, weights, levels, 1.0
)
wrong(move, "micro_flow_into: tokens must rise strictly within 0..5, got 3 after 3 in image 1; ")
ops.lift(values, nearest, anchors, grid, weights)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ops.lift(values, nearest, anchors, grid, weights)
graph.replay()
torch.cuda.synchronize()
print("all found")
"""


def test_wrong_indices_are_found_where_the_environment_asks_for_it() -> None:
    environment = {**os.environ, "JITACCEL_CHECK_INDICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WRONG_INDICES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "all found", done.stderr
