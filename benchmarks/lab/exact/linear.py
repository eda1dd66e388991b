"""Runs of pooled and dense stages as linear maps of the start noise, in closed form.

With the optimal network, a stage with one pooling factor is `y -> shrink * y + up(gain * down(y))` on each aliasing
block. All of its steps average the same areas, so only scalars change from step to step. A dense stage is the same
without `down` and `up`. The run is the product of its stages, and the end of the exact ODE is `sqrt(power) * noise`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from jitaccel.method.solver import extrapolation_weight

from .field import Array, Blocks, Field, Pooling, make_blocks, make_pooling
from .plan import Plan

Solver = Literal["euler", "dpmpp_2m", "dpmpp_2m_across"]
"""The solver, as in `JiTConfig.solver`. "dpmpp_2m" begins each stage with a first-order step; "dpmpp_2m_across"
extrapolates there too, from the clean estimate of the previous stage."""


@dataclass(frozen=True)
class Distances:
    """Distances between the end of a run and the exact end.

    Attributes:
        relative_mse: Mean squared error against the end of the exact ODE from the same noise, relative to the mean
            square of that end.
        wasserstein_2: Wasserstein-2 distance between the distributions of the ends, relative to the field's root mean
            square; None if noise was sampled.
    """

    relative_mse: float
    wasserstein_2: float | None


@dataclass(frozen=True, eq=False)
class Laboratory:
    """A field in blocks for a cell, with the poolings by all factors that divide the cell."""

    blocks: Blocks
    poolings: dict[int, Pooling]

    def end(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> Array:
        """Returns the end of a run as a map of the start noise, (Q, n, n): the state at frequency i from noise at j.

        Args:
            plan: Pooled and dense stages.
            levels: Noise levels, one more than steps.
            solver: Solver of the steps.

        Raises:
            ValueError: If levels and steps do not match.
        """
        if len(levels) != plan.steps + 1:
            raise ValueError(
                f"end: levels must be one more than {plan.steps} steps, got {len(levels)}; add or drop some"
            )
        n = self.blocks.cell**2
        state: Array = np.broadcast_to(np.eye(n), (len(self.blocks.count), n, n))
        before: tuple[float, Array] | None = None
        first = 0
        for stage in plan.stages:
            part, pooling = levels[first : first + stage.steps + 1], self.poolings[stage.factor]
            gains = stage_gains(part, pooling, solver, None if before is None else before[0])
            seen = [pooling.averaged(each) for each in ((state,) if before is None else (state, before[1]))]
            moved = pooling.brought_up(_weighted(gains.state, seen))
            state = part[-1] / part[0] * state + moved
            if before is not None:
                state = state + gains.carried * before[1]
            first += stage.steps
            is_needed = solver == "dpmpp_2m_across" and first < plan.steps
            before = (part[-2], pooling.brought_up(_weighted(gains.clean, seen))) if is_needed else None
        return state

    def distances(self, end: Array) -> Distances:
        """Returns the distances of an end (Q, n, n) from that of the exact ODE."""
        return Distances(self.relative_mse(end), self.wasserstein_2(end))

    def relative_mse(self, end: Array) -> float:
        """Returns the relative mean squared error of an end (Q, n, n); see `Distances`."""
        missed = end - np.sqrt(self.blocks.power)[:, :, None] * np.eye(end.shape[-1])
        return float(self.blocks.count @ (missed**2).sum(axis=(1, 2))) / self.blocks.total

    def wasserstein_2(self, end: Array) -> float:
        """Returns the Wasserstein-2 distance of an end (Q, n, n); see `Distances`.

        Its square, between centred Gaussians with covariances A = E E^T and B, is
        `tr A + tr B - 2 tr (B^1/2 A B^1/2)^1/2`; the last trace is the sum of the singular values of `B^1/2 E`.
        """
        power = self.blocks.power
        shared = np.linalg.svd(np.sqrt(power)[:, :, None] * end, compute_uv=False).sum(axis=1)
        squares = (end**2).sum(axis=(1, 2)) + power.sum(axis=1) - 2.0 * shared
        return math.sqrt(max(float(self.blocks.count @ squares), 0.0) / self.blocks.total)


def make_laboratory(field: Field, cell: int, trained_on: Field | None = None) -> Laboratory:
    """Returns the laboratory of a field, for pooling by all powers of two up to `cell`.

    Args:
        field: The field that is sampled and that the dense network knows.
        cell: Largest factor.
        trained_on: The field that the network assumes when it sees averages; None is the field itself.
    """
    blocks = make_blocks(field, cell)
    known = blocks if trained_on is None else make_blocks(trained_on, cell)
    factors = [2**k for k in range(cell.bit_length())]
    return Laboratory(blocks, {factor: make_pooling(blocks if factor == 1 else known, factor) for factor in factors})


@dataclass(frozen=True, eq=False)
class Gains:
    """A stage as a linear map of the state y that it starts from and, with c = 2, the clean estimate x before it.

    Its end is `shrink * y + up @ (state[0] * (down @ y) + state[1] * (down @ x)) + carried * x`, where shrink is its
    last level over its first; its last clean estimate is `up @ (clean[0] * (down @ y) + clean[1] * (down @ x))`.

    Attributes:
        state, clean: (c, Q, r).
        carried: Gain of x in addition to its part seen in averages.
    """

    state: Array
    clean: Array
    carried: float


def stage_gains(levels: Sequence[float], pooling: Pooling, solver: Solver, before: float | None = None) -> Gains:
    """Returns the gains of a stage.

    The network returns the mean of the averaged clean field given the averaged state, which is a gain times `down @ y`.
    A step keeps the share `following / level` of y. The rest is that mean, extrapolated from the previous step and
    interpolated to full size.

    Args:
        levels: Levels from the start of the first step to the end of the last one.
        pooling: The pooling of the stage.
        solver: Solver of the steps.
        before: Level of the step before the stage, from which the first step extrapolates; None makes it first order.
    """
    one = np.ones_like(pooling.power)
    seen = one[None] if before is None else np.stack([one, 0.0 * one])  # down @ state, from y and from x
    gain = clean = earlier = np.zeros_like(seen)
    carried, last = 0.0, before
    for step, (level, following) in enumerate(pairwise(levels)):
        clean = posterior_gain(pooling.power, level) * seen
        weight = 0.0 if solver == "euler" or last is None else extrapolation_weight(last, level, following)
        kept = following / level
        aim = (1.0 + weight) * clean - weight * earlier
        gain = kept * gain + (1.0 - kept) * aim
        seen = kept * seen + (1.0 - kept) * pooling.coupling * aim
        carried *= kept
        if step == 0 and before is not None:  # the first step extrapolates from x, which need not be an average
            carried = -(1.0 - kept) * weight
            seen[1] += carried
        earlier, last = clean, level
    return Gains(gain, clean, carried)


def posterior_gain(power: Array, level: float) -> Array:
    """Returns the gain of the conditional mean: `E[x | y] = gain * y` for `y = (1 - level) x + level e`."""
    signal = 1.0 - level
    return signal * power / (signal**2 * power + level**2)


def _weighted(gains: Array, seen: Sequence[Array]) -> Array:
    """Returns the sum of (Q, r, n) maps, each multiplied by its gain (Q, r)."""
    parts = [gain[:, :, None] * each for gain, each in zip(gains, seen, strict=True)]
    return functools.reduce(np.add, parts)
