"""Comparisons of operators with their references."""

from __future__ import annotations

import torch
from torch import Tensor

from jitaccel.ops import reference
from tests.support.operators import ARGUMENTS, Fields, call, compiled, plain

NAMES = sorted(ARGUMENTS)
FLOATING = ["lift", "importance", "micro_flow_into", "pool", "lift_pooled"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [(1, 1), (1, 13), (9, 1), (5, 7), (16, 16), (12, 31), (3, 4, 5), (1, 6, 2), (4, 1, 1)]
COUNTS = {"one": lambda n: 1, "third": lambda n: max(1, n // 3), "all": lambda n: n}


def same(actual: Tensor, expected: Tensor, exact: Tensor | None = None, plain_error: float | None = None) -> None:
    """Checks equal shapes, dtypes and integers; floats may be twice as far from float64 as plain torch."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not actual.is_floating_point() or actual.numel() == 0:
        assert torch.equal(actual, expected)
        return
    exact = expected.double() if exact is None else exact.double()
    if bool(exact.isnan().all()):  # the mean over no channels
        assert bool(actual.isnan().all())
        return
    allowed = float((expected.double() - exact).abs().max()) if plain_error is None else plain_error
    # Where plain torch happens to be exact (one anchor, say), sums of up to 61 weights may still be rounded.
    floor = 16 * torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=0.1)
    assert float((actual.double() - exact).abs().max()) <= 2 * allowed + floor


def check(name: str, f: Fields) -> None:
    """Compares one operator with its reference, in the fields' dtype and in float64."""
    actual = call(compiled(name), name, ARGUMENTS[name](f))
    expected = call(plain(name), name, ARGUMENTS[name](f))
    exact = call(plain(name), name, ARGUMENTS[name](f.double())) if name in FLOATING else None
    plain_error = moments_error(f.velocity, f.grid, 3) if name == "importance" else None
    same(actual, expected, exact, plain_error)


def moments_error(velocity: Tensor, grid: tuple[int, ...], window: int) -> float:
    """Returns the error of the two moments against float64 if they are computed in float32, as in plain torch."""
    field, size = velocity.float().reshape(len(velocity), *grid, -1), window ** len(grid)
    first, second = (reference._window_sum(x, window) / size for x in (field, field.square()))
    moments = (second - first.square()).mean(dim=-1).flatten(1)
    exact = plain("importance")(velocity.double(), grid, window).double()
    return float((moments.double() - exact).abs().max()) if moments.numel() else 0.0


def strided(x: Tensor) -> Tensor:
    """Returns equal values with a stride of two along the last axis; a single element stays as it is."""
    if x.ndim == 0:
        return x
    wide = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    assert x.numel() < 2 or not wide.is_contiguous()
    return wide
