"""Arguments for every operator, so that one test can walk all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitaccel.method.lift import blur_weights
from jitaccel.ops import reference
from jitaccel.ops.schema import num_tokens_of

WRITTEN = {"micro_flow_into": 0}
"""Operators that write to an argument, with the index of that argument."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """All inputs that operators need, for one grid. `tokens` is empty if every token is an anchor."""

    grid: tuple[int, ...]
    state: Tensor
    previous: Tensor
    velocity: Tensor
    noise: Tensor
    values: Tensor
    anchors: Tensor
    nearest: Tensor
    tokens: Tensor
    importance: Tensor
    weights: Tensor
    levels: Tensor

    def double(self) -> Fields:
        """Returns the same fields in float64, except for weights, levels and importance."""
        kept = ("weights", "levels", "importance")
        wide = {n: x.double() if n not in kept and _is_float(x) else x for n, x in vars(self).items()}
        return Fields(**wide)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def fields(
    grid: Sequence[int] = (5, 7),
    count: int = 9,
    channels: int = 5,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    blur_scale: float = 0.4,
) -> Fields:
    """Returns random fields with `count` different anchors per image; half of the other tokens are activated."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_tokens_of(grid)
    orders = [torch.randperm(num_tokens, generator=generator) for _ in range(batch)]
    middle = count + (num_tokens - count) // 2
    anchors = torch.stack([order[:count].sort().values for order in orders]) if batch else _no_rows(count)
    tokens = torch.stack([order[count:middle].sort().values for order in orders]) if batch else _no_rows(middle - count)
    whole = [torch.randn(batch, num_tokens, channels, generator=generator).to(dtype) for _ in range(4)]
    return Fields(
        grid=tuple(grid),
        state=whole[0],
        previous=whole[1],
        velocity=whole[2],
        noise=whole[3],
        values=torch.randn(batch, count, channels, generator=generator).to(dtype),
        anchors=anchors,
        nearest=reference.nearest_anchor(anchors, grid),
        tokens=tokens,
        importance=torch.rand(batch, num_tokens, generator=generator),
        weights=blur_weights(count / num_tokens, blur_scale).float(),
        levels=torch.tensor([0.7, 0.4]),
    )


def _no_rows(width: int) -> Tensor:
    return torch.zeros(0, width, dtype=torch.int64)


def _lift(f: Fields) -> tuple[Any, ...]:
    return f.values, f.nearest, f.anchors, f.grid, f.weights


def _lift_pooled(f: Fields) -> tuple[Any, ...]:
    pooled, values = (reference.pool(x, f.grid, 1, 2) for x in (f.state, f.velocity))
    return values, pooled, f.state, f.grid, 1, 2, f.levels[0]


ARGUMENTS: dict[str, Callable[[Fields], tuple[Any, ...]]] = {
    "nearest_anchor": lambda f: (f.anchors, f.grid),
    "lift": _lift,
    "importance": lambda f: (f.velocity, f.grid, 3),
    "activate": lambda f: (f.importance, f.anchors, f.tokens.shape[1]),
    "micro_flow_into": lambda f: (
        f.state.clone(), f.previous, f.velocity, f.noise, f.tokens, f.nearest, f.anchors, f.grid, f.weights, f.levels,
        0.25,
    ),
    "pool": lambda f: (f.state, f.grid, 1, 2, f.levels[0]),
    "lift_pooled": _lift_pooled,
}  # fmt: skip
"""One call of each operator. Arguments that are written are new."""


def call(function: Callable[..., Any], name: str, arguments: tuple[Any, ...]) -> Tensor:
    """Returns an operator's result, or the argument that it writes."""
    result = function(*arguments)
    return arguments[WRITTEN[name]] if name in WRITTEN else result


def compiled(name: str) -> Callable[..., Any]:
    """Returns the operator itself, bypassing the functions of `jitaccel.ops`, which may choose the reference."""
    return getattr(torch.ops.jitaccel, name).default


def plain(name: str) -> Callable[..., Any]:
    """Returns the plain-torch reference of an operator."""
    return getattr(reference, name)
