"""Checks the arguments of a warm-up: sizes and batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError


def checked_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns sizes as a list of pairs. Raises ConfigError for anything else, such as a single size."""
    pairs = _listed(sizes)
    if pairs is None or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_count(side) for side in pair) for pair in pairs
    ):
        raise ConfigError(
            f"Handle.warmup: sizes must be a list of (height, width) in pixels, got {sizes!r}; "
            f"give for example [(1024, 1024)]"
        )
    return [(height, width) for height, width in pairs]


def checked_batches(batch_sizes: Sequence[int]) -> list[int]:
    """Returns numbers of pictures as a list. Raises ConfigError for anything but a list of whole numbers above 0."""
    batches = _listed(batch_sizes)
    if batches is None or not all(_is_count(batch) for batch in batches):
        raise ConfigError(
            f"Handle.warmup: batch_sizes must be a list of whole numbers above 0, got {batch_sizes!r}; "
            f"give for example (1, 2)"
        )
    return batches


def _listed(value: Any) -> list[Any] | None:
    """Returns the items of an iterable; None for a string and for anything that has no items."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        return None
    try:
        return list(value)
    except TypeError:  # a tensor without dimensions claims to be iterable
        return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
