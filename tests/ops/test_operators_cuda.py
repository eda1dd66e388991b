"""The CUDA operators against the plain-torch reference.

Expected values come from the CPU. Sums may have twice the error of plain torch in the same dtype against float64;
indices, copies and repetitions must be bitwise equal.
"""

from __future__ import annotations

import math

import pytest
import torch

from jitaccel import ops
from jitaccel.ops import reference
from tests.support.cuda_operators import (
    DEVICE,
    assert_as_exact,
    assert_same_bits,
    counts_of,
    lift_there,
    on_device,
    plan_of,
    randn,
    rows_of,
    size_of,
    values_at,
    weights_of,
)

DTYPES = ops.DTYPES
GRIDS = [(1, 1), (1, 100), (100, 1), (13, 9), (33, 65), (64, 64), (2, 3, 4), (3, 1, 5), (4, 5, 33), (5, 16, 12)]
CHANNELS = [1, 3, 16, 20, 64, 128]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in ops.compiled(), reason="the CUDA operators are not built"),
]


@pytest.mark.parametrize("grid", [*GRIDS, (1, 3000), (3000, 1)])
def test_nearest_anchor_equals_the_reference(grid: tuple[int, ...]) -> None:
    for count in counts_of(size_of(grid)):
        anchors = rows_of(3, size_of(grid), count, seed=count)
        result = ops.nearest_anchor(anchors.to(DEVICE), grid)
        assert torch.equal(result.cpu(), reference.nearest_anchor(anchors, grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_lift_is_as_exact_as_plain_torch(grid: tuple[int, ...], channels: int) -> None:
    for count in counts_of(size_of(grid)):
        nearest, anchors, weights = plan_of(grid, count)
        for dtype in DTYPES:
            values = randn(2, count, channels, dtype=dtype)
            exact = reference.lift(values.double(), nearest, anchors, grid, weights)
            plain = reference.lift(values, nearest, anchors, grid, weights)
            result = lift_there(values, nearest, anchors, grid, weights)
            assert_as_exact(result, exact, plain)
            assert_same_bits(values_at(result, anchors), values)


@pytest.mark.parametrize("radius", [0, 1, 10, 30, 100])
@pytest.mark.parametrize("grid", [(2, 300), (300, 2), (40, 40), (4, 6, 20)])
def test_lift_takes_any_radius(grid: tuple[int, ...], radius: int) -> None:
    count = size_of(grid) // 3
    nearest, anchors, weights = plan_of(grid, count, radius=radius)
    for dtype in (torch.float32, torch.bfloat16):
        values = randn(2, count, 24, dtype=dtype)
        exact = reference.lift(values.double(), nearest, anchors, grid, weights)
        plain = reference.lift(values, nearest, anchors, grid, weights)
        assert_as_exact(lift_there(values, nearest, anchors, grid, weights), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_takes_thousands_of_channels(dtype: torch.dtype) -> None:
    grid = (9, 14)
    nearest, anchors, weights = plan_of(grid, 40)
    values = randn(2, 40, 3072, dtype=dtype)
    exact = reference.lift(values.double(), nearest, anchors, grid, weights)
    plain = reference.lift(values, nearest, anchors, grid, weights)
    assert_as_exact(lift_there(values, nearest, anchors, grid, weights), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_keeps_the_bits_of_nan_and_infinity_at_anchors(dtype: torch.dtype) -> None:
    grid = (6, 7)
    nearest, anchors, weights = plan_of(grid, 12)
    values = randn(2, 12, 16, dtype=dtype)
    values[0, 3, 2], values[1, 4, 3] = math.nan, math.inf
    assert_same_bits(values_at(lift_there(values, nearest, anchors, grid, weights), anchors), values)


def test_inputs_need_not_be_contiguous() -> None:
    grid = (6, 7)
    nearest, anchors, weights = on_device(*plan_of(grid, 12))
    values, velocity = on_device(randn(2, 16, 12).transpose(1, 2), randn(2, 42, 32)[:, :, ::2])
    sparse = torch.stack([nearest, nearest], dim=2)[:, :, 0]
    lifted = ops.lift(values, sparse, anchors.T.contiguous().T, grid, weights.repeat_interleave(2)[::2])
    assert_same_bits(lifted, ops.lift(values.contiguous(), nearest, anchors, grid, weights))
    assert_same_bits(ops.importance(velocity, grid), ops.importance(velocity.contiguous(), grid))


@pytest.mark.parametrize("grid", [*GRIDS, (8, 24)])
@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_importance_equals_the_reference(grid: tuple[int, ...], window: int) -> None:
    for channels in CHANNELS:
        for dtype in DTYPES:
            velocity = (randn(2, size_of(grid), channels) + 3).to(dtype)
            expected = reference.importance(velocity.double(), grid, window)
            result = ops.importance(velocity.to(DEVICE), grid, window)
            torch.testing.assert_close(result.cpu(), expected, rtol=3e-5, atol=1e-6)


def test_importance_keeps_small_variances_beside_a_large_mean() -> None:
    velocity = 1000 + 0.1 * randn(1, 30 * 30, 64)
    expected = reference.importance(velocity.double(), (30, 30))
    result = ops.importance(velocity.to(DEVICE), (30, 30)).cpu()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_importance_without_channels_is_the_mean_of_nothing() -> None:
    assert ops.importance(torch.zeros(2, 6, 0, device=DEVICE), (2, 3)).isnan().all()


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 1023, 1024, 1025, 4096, 70_001])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "wide"])
def test_activate_equals_the_reference(num_tokens: int, kind: str) -> None:
    importance = randn(3, num_tokens)
    if kind == "ties":
        importance = (importance * 2).round()
    elif kind == "equal":
        importance = torch.full_like(importance, 0.25)
    elif kind == "zeros":  # of both signs, which tie
        importance = importance.sign() * 0.0
    elif kind == "wide":
        importance = importance.sign() * torch.exp2(60 * importance.abs() - 140)
    for num_anchors in counts_of(num_tokens):
        anchors = rows_of(3, num_tokens, num_anchors)
        inactive = num_tokens - num_anchors
        for count in sorted({0, min(1, inactive), inactive // 3, inactive}):
            result = ops.activate(*on_device(importance, anchors), count)
            assert torch.equal(result.cpu(), reference.activate(importance, anchors, count))


def test_activate_never_takes_anchors_whatever_is_not_finite() -> None:
    importance = randn(2, 2000)
    importance[:, ::3], importance[:, 1::7], importance[:, 2::5] = math.nan, -math.nan, -math.inf
    anchors = rows_of(2, 2000, 600)
    for row, taken in zip(anchors, ops.activate(*on_device(importance, anchors), 1400).cpu(), strict=True):
        assert torch.equal(torch.cat([row, taken]).sort().values, torch.arange(2000))


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("grid", [(1, 9), (13, 9), (33, 65), (4, 5, 33)])
def test_micro_flow_is_as_exact_as_plain_torch(grid: tuple[int, ...], weight: float) -> None:
    num_tokens = size_of(grid)
    nearest, anchors, weights = plan_of(grid, num_tokens // 3)
    levels = torch.tensor([0.9, 0.7])
    tokens = rows_of(2, num_tokens, num_tokens // 4, seed=1)  # some are anchors, which are their own prior
    others = torch.ones(2, num_tokens, dtype=torch.bool).scatter(1, tokens, False)
    for channels in (1, 16, 20):
        for shift in range(3):
            dtypes = (*DTYPES[shift:], *DTYPES[:shift], DTYPES[shift])
            fields = [randn(2, num_tokens, channels, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
            rest = (tokens, nearest, anchors)
            plain, exact, result = fields[0].clone(), fields[0].double(), fields[0].to(DEVICE)
            reference.micro_flow_into(plain, *fields[1:], *rest, grid, weights, levels, weight)
            wide = [x.double() for x in fields[1:]]
            reference.micro_flow_into(exact, *wide, *rest, grid, weights, levels.double(), weight)
            ops.micro_flow_into(result, *on_device(*fields[1:], *rest), grid, *on_device(weights, levels), weight)
            assert_as_exact(result, exact, plain)
            assert_same_bits(result.cpu()[others], fields[0][others])


def test_micro_flow_of_weight_one_forgets_the_state() -> None:
    grid = (6, 7)
    nearest, anchors, weights = on_device(*plan_of(grid, 12))
    tokens = rows_of(2, 42, 9, seed=1)
    state = torch.full((2, 42, 16), math.inf, device=DEVICE)
    fields = on_device(*(randn(2, 42, 16, seed=i) for i in range(3)))
    levels = torch.tensor([0.9, 0.7], device=DEVICE)
    ops.micro_flow_into(state, *fields, tokens.to(DEVICE), nearest, anchors, grid, weights, levels, 1.0)
    assert values_at(state, tokens).isfinite().all()
    assert int(state.isfinite().sum()) == 2 * 9 * 16


@pytest.mark.parametrize("grid", [(3, 5, 7), (4, 1, 9), (2, 33, 65), (5, 16, 12)])
def test_stack_keeps_to_each_frame_as_the_reference_does(grid: tuple[int, ...]) -> None:
    num_tokens, size = size_of(grid), size_of(grid[1:])
    is_anchor = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(0)) < 0.3
    is_anchor[:, ::size] = True
    count = int(is_anchor.sum(dim=1).max())
    anchors = is_anchor.float().topk(count, dim=1).indices.sort(dim=1).values
    nearest, weights, levels = reference.nearest_anchor(anchors, grid, True), weights_of(3), torch.tensor([0.9, 0.7])
    plan = (nearest, anchors, grid, weights)
    there = (*on_device(nearest, anchors), grid, weights.to(DEVICE))
    assert torch.equal(ops.nearest_anchor(anchors.to(DEVICE), grid, True).cpu(), nearest)
    tokens = rows_of(2, num_tokens, num_tokens // 4, seed=1)
    for dtype in DTYPES:
        values, fields = randn(2, count, 16, dtype=dtype), [randn(2, num_tokens, 16, seed=i) for i in range(4)]
        exact, plain = (reference.lift(x, *plan, True) for x in (values.double(), values))
        assert_as_exact(ops.lift(values.to(DEVICE), *there, True), exact, plain)
        velocity = randn(2, num_tokens, 16, dtype=dtype)
        expected = reference.importance(velocity.double(), grid, 3, True)
        found = ops.importance(velocity.to(DEVICE), grid, 3, True)
        torch.testing.assert_close(found.cpu(), expected, rtol=3e-5, atol=1e-6)
        moved, result = fields[0].clone(), fields[0].to(DEVICE)
        reference.micro_flow_into(moved, *fields[1:], tokens, *plan, levels, 0.5, True)
        ops.micro_flow_into(result, *on_device(*fields[1:], tokens), *there, levels.to(DEVICE), 0.5, True)
        torch.testing.assert_close(result.cpu(), moved, rtol=1e-5, atol=1e-5)


def test_frame_without_an_anchor_leads_nowhere_out_of_memory() -> None:
    anchors = torch.tensor([[0, 7, 12], [0, 1, 13]], device=DEVICE)
    nearest = ops.nearest_anchor(anchors, (3, 2, 3), True)
    assert int(nearest.min()) >= 0 and int(nearest.max()) < 3


def test_empty_batches_give_empty_results() -> None:
    none = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    weights, levels = on_device(weights_of(3), torch.tensor([0.9, 0.7]))
    values, field = torch.zeros(0, 2, 4, device=DEVICE), torch.zeros(0, 6, 4, device=DEVICE)
    nearest = ops.nearest_anchor(none, (2, 3))
    assert nearest.shape == (0, 6)
    assert ops.lift(values, nearest, none, (2, 3), weights).shape == (0, 6, 4)
    assert ops.importance(field, (2, 3)).shape == (0, 6)
    assert ops.activate(field[:, :, 0], none, 2).shape == (0, 2)
    ops.micro_flow_into(field, field, field, field, none, nearest, none, (2, 3), weights, levels, 1.0)
