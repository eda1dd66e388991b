"""Whole numbers of tokens and steps."""

import math
from collections.abc import Sequence
from itertools import pairwise


def whole_part(fraction: float, count: int) -> int:
    """Returns the whole part of `fraction * count`, correcting a product that rounding left just below an integer."""
    return int(fraction * count + 1e-9)


def pooled_count(grid: Sequence[int], factor: int) -> int:
    """Returns the tokens of a grid (h, w) or (t, h, w) after dividing its last two sides by `factor`, rounded up."""
    *frames, rows, columns = grid
    return math.prod(frames) * -(-rows // factor) * -(-columns // factor)


def with_side(grid: Sequence[int], axis: int, side: int) -> tuple[int, ...]:
    """Returns a grid with the side of one axis replaced."""
    sides = list(grid)
    sides[axis] = side
    return tuple(sides)


def has_empty_stage(ends: tuple[int, ...]) -> bool:
    """Returns whether some stage has no step, given the step after which each stage ends."""
    return any(end <= start for start, end in pairwise((0, *ends)))
