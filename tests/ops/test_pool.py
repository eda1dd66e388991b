"""pool and lift_pooled, compiled and plain: any patch, factor, side and dtype; other inputs are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jitaccel import ops
from jitaccel.ops import reference, schema

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif("cuda" not in ops.compiled(), reason="no CUDA device or library")],
    ),
]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_as_exact(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice as far from float64 as plain torch in the same dtype, plus the rounding of a float32 sum."""
    assert actual.shape == exact.shape and actual.dtype == plain.dtype
    error, allowed = (float((x.cpu().double() - exact).abs().max()) for x in (actual, plain))
    assert error <= 2 * allowed + 2e-6 * float(exact.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(
    grid=st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 7)] * 3)),
    patch=st.sampled_from([1, 2, 3]),
    factor=st.sampled_from([1, 2, 3, 4, 8]),
    channels=st.integers(1, 5),
    batch=st.integers(0, 3),
    dtypes=st.tuples(*[st.sampled_from(schema.DTYPES)] * 2),
    level=st.sampled_from([1.0, 0.7, 0.05]),
)
def test_kernels_mean_what_the_reference_does(
    device: str,
    grid: tuple[int, ...],
    patch: int,
    factor: int,
    channels: int,
    batch: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    level: float,
) -> None:
    width = channels * patch**2
    state = randn(batch, schema.num_tokens_of(grid), width, seed=1, dtype=dtypes[0])
    values = randn(
        batch, schema.num_tokens_of(schema.pooled_grid(grid, factor)), width, seed=2, dtype=dtypes[1]
    )
    s = torch.tensor(level)
    pooled = ops.pool(state.to(device), grid, patch, factor, s.to(device))
    lifted = ops.lift_pooled(values.to(device), pooled, state.to(device), grid, patch, factor, s.to(device))
    if not batch:
        assert pooled.shape[0] == lifted.shape[0] == 0
        return
    exact = reference.pool(state.double(), grid, patch, factor, s)
    assert_as_exact(pooled, reference.pool(state, grid, patch, factor, s), exact)
    mean = ops.pool(state.to(device), grid, patch, factor)
    exact = reference.pool(state.double(), grid, patch, factor)
    assert_as_exact(mean, reference.pool(state, grid, patch, factor), exact)
    seen = pooled.cpu()
    exact = reference.lift_pooled(values.double(), seen.double(), state.double(), grid, patch, factor, s)
    assert_as_exact(lifted, reference.lift_pooled(values, seen, state, grid, patch, factor, s), exact)


def test_a_number_serves_as_a_level_and_float64_takes_the_reference() -> None:
    state = randn(1, 12, 8, seed=0).double()
    pooled = ops.pool(state, (3, 4), 2, 2, 0.3)
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled, ops.pool(state.float(), (3, 4), 2, 2, 0.3).double())


def test_gradients_flow_through_both() -> None:
    state = randn(1, 6, 4, seed=0).double().requires_grad_()
    values = randn(1, 2, 4, seed=1).double().requires_grad_()

    def both(state: Tensor, values: Tensor) -> Tensor:
        return ops.lift_pooled(values, ops.pool(state, (2, 3), 2, 2, 0.6), state, (2, 3), 2, 2, 0.6)

    assert torch.autograd.gradcheck(both, (state, values))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": 0}, "patch must be in 1..8"),
        ({"factor": 9}, "factor must be in 1..8"),
        ({"grid": (2, 2)}, r"x must be float.*\(B, 4, D\)"),
        ({"grid": (0, 6)}, "grid must be"),
        ({"grid": (2**32, 2**32)}, r"grid must .*2\^40 tokens at most"),
        ({"patch": 3}, "D a multiple of 9"),
        ({"level": torch.tensor([0.5])}, "level must be a float32"),
        ({"level": torch.tensor(0.5).bfloat16()}, "level must be a float32"),
    ],
)
@pytest.mark.parametrize("function", [ops.pool, torch.ops.jitaccel.pool])
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], said: str, function: Any) -> None:
    given = {"x": torch.randn(1, 6, 8), "grid": (2, 3), "patch": 2, "factor": 2, "level": torch.tensor(0.5), **changes}
    with pytest.raises((ValueError, RuntimeError), match=f"pool: .*{said}"):
        function(*given.values())


@pytest.mark.parametrize("function", [ops.lift_pooled, torch.ops.jitaccel.lift_pooled])
def test_values_that_are_not_the_smaller_pictures_are_refused(function: Any) -> None:
    state, pooled, level = torch.randn(1, 6, 8), torch.randn(1, 2, 8), torch.tensor(0.5)
    with pytest.raises((ValueError, RuntimeError), match="lift_pooled: values must be"):
        function(torch.randn(1, 3, 8), pooled, state, (2, 3), 2, 2, level)
    with pytest.raises((ValueError, RuntimeError), match="lift_pooled: pooled must be"):
        function(pooled, pooled[:, :1], state, (2, 3), 2, 2, level)
    with pytest.raises((ValueError, RuntimeError), match=r"lift_pooled: pooled must .*the state's dtype"):
        function(pooled, pooled.bfloat16(), state, (2, 3), 2, 2, level)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_time(device: str) -> None:
    state, values = randn(2, 35, 16, seed=0, device=device), randn(2, 12, 16, seed=1, device=device)
    pooled = [ops.pool(state, (5, 7), 2, 2, 0.7) for _ in range(3)]
    lifted = [ops.lift_pooled(values, pooled[0], state, (5, 7), 2, 2, 0.7) for _ in range(3)]
    assert all(torch.equal(x, pooled[0]) for x in pooled) and all(torch.equal(x, lifted[0]) for x in lifted)
