"""Whole numbers of tokens and steps."""

import math
from collections.abc import Sequence
from itertools import pairwise


def whole_part(fraction: float, count: int) -> int:
    """Returns the whole part of a share of a count; a product that rounding left a hair below a whole number is it."""
    return int(fraction * count + 1e-9)


def pooled_count(grid: Sequence[int], factor: int) -> int:
    """Returns the tokens of a grid (h, w) or (t, h, w) whose last two sides are pooled by a factor, rounded up."""
    *frames, rows, columns = grid
    return math.prod(frames) * -(-rows // factor) * -(-columns // factor)


def with_side(grid: Sequence[int], axis: int, side: int) -> tuple[int, ...]:
    """Returns a grid with another side along one axis."""
    sides = list(grid)
    sides[axis] = side
    return tuple(sides)


def has_empty_stage(ends: tuple[int, ...]) -> bool:
    """Tells whether a stage, of those that end after so many steps, has no step."""
    return any(end <= start for start, end in pairwise((0, *ends)))
