"""Uncertainty of a mean, ratio or distance over prompts, and paired tests of two methods on the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals overlap."""
        return self.low <= other.high and other.low <= self.high


def bootstrap(
    count: int, statistic: Callable[[Array], float], *, seed: int = 0, resamples: int = _RESAMPLES
) -> Estimate:
    """Returns a statistic of `count` prompts with its percentile bootstrap interval.

    statistic: computes it for an array of prompt indices, which may repeat.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=statistic(np.arange(count)), low=float(low), high=float(high))


def mean_of(values: Array, *, seed: int = 0) -> Estimate:
    """Returns the mean of values (n,) with its interval."""
    values = np.asarray(values, np.float64)
    return bootstrap(len(values), lambda chosen: float(values[chosen].mean()), seed=seed)


def share_of(parts: Array, wholes: Array, *, seed: int = 0) -> Estimate:
    """Returns the sum of parts (n,) over the sum of wholes (n,) with its interval, such as attributes over prompts."""
    parts, wholes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)

    def share(chosen: Array) -> float:
        return float(parts[chosen].sum() / max(wholes[chosen].sum(), 1e-12))

    return bootstrap(len(parts), share, seed=seed)


def paired_p_value(values: Array, others: Array, *, seed: int = 0, resamples: int = 10_000) -> float:
    """Returns the probability, by chance, of a mean difference as large as that of two methods on the same prompts.

    Two-sided sign-flip permutation test; at least 1 / (resamples + 1).
    """
    difference = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (resamples, len(difference)), dtype=np.int8) * 2 - 1
    as_large = np.abs((signs * difference).mean(axis=1)) >= abs(difference.mean()) - 1e-12
    return float((as_large.sum() + 1) / (resamples + 1))
