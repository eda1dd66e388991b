"""Noise levels of a plan: the model's own, and families with two parameters for the search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from jitaccel.errors import ConfigError
from jitaccel.method.schedule import beta_levels

FLUX_SHIFT = 1.15  # diffusers' `calculate_shift` at 4096 tokens: levels are shifted by its exponential


def native_levels(steps: int, shift: float = FLUX_SHIFT) -> tuple[float, ...]:
    """Returns the levels of FLUX.1-dev's pipeline: evenly from 1 to 1 / steps, shifted by exp(shift), then 0."""
    factor = math.exp(shift)
    even = (1.0 - step / steps for step in range(steps))
    return (*(factor * level / (1.0 + (factor - 1.0) * level) for level in even), 0.0)


def log_ratio_levels(steps: int, first: float, last: float) -> tuple[float, ...]:
    """Returns 1, then levels evenly spaced in the log signal-to-noise ratio `log((1 - s) / s)`, then 0.

    A multistep solver extrapolates linearly in that logarithm, and DPM-Solver spaces its steps in this way
    (arXiv:2206.00927).

    Args:
        steps: Number of steps, 3 or more.
        first, last: The logarithm at the start of the second and of the last step.

    Raises:
        ConfigError: If the levels do not fall.
    """
    if steps < 3 or not first < last:
        raise ConfigError(
            f"log_ratio_levels: first must be below last, of 3 steps or more, got {steps}, {first}, {last}"
        )
    ratios = (first + (last - first) * step / (steps - 2) for step in range(steps - 1))
    return (1.0, *(1.0 / (1.0 + math.exp(ratio)) for ratio in ratios), 0.0)


@dataclass(frozen=True)
class Family:
    """A family of levels with two parameters.

    Attributes:
        name: Its name in rows.
        levels: Maps (steps, parameter, parameter) to levels; raises ConfigError for invalid parameters.
        starts: Parameters that a search tries first.
        is_positive: Whether parameters are above 0 and searched on a logarithmic scale.
    """

    name: str
    levels: Callable[[int, float, float], tuple[float, ...]]
    starts: tuple[tuple[float, float], ...]
    is_positive: bool


BETA = Family(
    "beta",
    beta_levels,
    tuple(itertools.product((0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8), (0.1, 0.15, 0.22, 0.32, 0.47, 0.7))),
    is_positive=True,
)
LEAST_GAP = 2.0**-9


def spaced_beta_levels(steps: int, alpha: float, beta: float) -> tuple[float, ...]:
    """Returns Beta levels that are at least `LEAST_GAP` apart.

    In bfloat16, whose spacing below 1 is 2^-8, closer timesteps round to the same number, and a step between them has
    no effect.

    Raises:
        ConfigError: If two levels are closer.
    """
    levels = beta_levels(steps, alpha, beta)
    if min(level - after for level, after in pairwise(levels)) < LEAST_GAP:
        raise ConfigError(
            f"spaced_beta_levels: levels must be at least {LEAST_GAP:g} apart, got {levels}; choose larger parameters"
        )
    return levels


SPACED_BETA = Family(
    "spaced beta",
    spaced_beta_levels,
    tuple(itertools.product((0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8), (0.22, 0.32, 0.47, 0.6, 0.7, 0.85))),
    is_positive=True,
)
LOG_RATIO = Family(
    "log ratio",
    log_ratio_levels,
    tuple(itertools.product((-9.0, -7.5, -6.0, -5.0, -4.0, -3.0), (0.5, 1.5, 2.5, 3.5, 4.5, 5.5))),
    is_positive=False,
)
