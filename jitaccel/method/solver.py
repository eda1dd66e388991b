"""Solvers: the velocity with which an Euler step, which every sampler takes, ends where the solver's step does.

`Euler` keeps the velocity. `Multistep` is DPM-Solver++(2M), of second order (arXiv:2211.01095). In flow matching an
Euler step goes towards the clean estimate `x0 = y - level * v`. That solver goes towards one that is extrapolated from
the step before, linearly in the logarithm of the signal-to-noise ratio: `x0 + w * (x0 - x0_before)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .steps import Step

_MOST = 2.0  # presets reach 1.7; levels that crowd and then fall would be extrapolated without bound


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanEstimate:
    """The clean estimate (B, N, D) float32 of a step. anchors: tokens that were computed, (B, M); None: all of them.

    A pooled stage computes all of them, in a smaller picture.
    """

    step: Step
    clean: Tensor
    anchors: Tensor | None


def extrapolation_weight(before: float, level: float, next_level: float) -> float:
    """Returns w for a step from `level` to `next_level` after one from `before`.

    0, an Euler step, where the ratio is 0 or infinite at an end: after the step that starts from pure noise, and in the
    one that ends at the picture. At most 2, which departs from the paper.
    """
    if not 0.0 < next_level < level < before < 1.0:
        return 0.0
    made, due = _log_ratio(level) - _log_ratio(before), _log_ratio(next_level) - _log_ratio(level)
    return min(due / (2.0 * made), _MOST)


def _log_ratio(level: float) -> float:
    return math.log((1.0 - level) / level)


class Solver(Protocol):
    """The solver of one generation: `correct` what the network returns, step by step.

    needs_every_step: whether each step depends on the velocity of the one before, not only the first of a stage.
    """

    @property
    def needs_every_step(self) -> bool: ...

    def correct(self, step: Step, state: Tensor, velocity: Tensor, anchors: Tensor | None) -> Tensor:
        """Returns the velocity (B, N, D) that an Euler step is to take, in its dtype.

        state: the one the network saw. anchors: (B, M) of this step; None: every token.
        """
        ...

    def uncorrect(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        """Returns what `correct` got where it returned `velocity`, at a step that was given last."""
        ...

    def weight(self, before: float, level: float, next_level: float) -> float:
        """Returns w: how far a step from `level` to `next_level`, after one from `before`, extrapolates."""
        ...


class Euler:
    """Steps along the velocity as it is."""

    needs_every_step = False

    def correct(self, step: Step, state: Tensor, velocity: Tensor, anchors: Tensor | None) -> Tensor:
        return velocity

    def uncorrect(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        return velocity

    def weight(self, before: float, level: float, next_level: float) -> float:
        return 0.0


class Multistep:
    """DPM-Solver++(2M): steps towards a clean estimate that is extrapolated from the step before.

    Where a stage begins, tokens that were lifted before it, or are after a pooled one, take an Euler step: their
    estimate was an interpolation between anchors, or has become one. That of a pooled stage counts: to extrapolate from
    it has two to four times less error (docs/exact-lab.md).
    """

    needs_every_step = True

    def __init__(self) -> None:
        self._before: CleanEstimate | None = None
        self._now: CleanEstimate | None = None

    def correct(self, step: Step, state: Tensor, velocity: Tensor, anchors: Tensor | None) -> Tensor:
        """Returns the velocity (B, N, D) that an Euler step is to take, in its dtype; `velocity` itself for w = 0.

        A step may be given again, for each branch of a guidance and for what they came to: the last one counts
        for the next step. state: the one the network saw. anchors: (B, M) of this step; None: every token.
        """
        if self._now is not None and self._now.step.index < step.index:
            self._before = self._now
        clean = state.float() - step.noise_level * velocity.float()
        self._now = CleanEstimate(step=step, clean=clean, anchors=anchors)
        weight = self._weight(step, clean)
        if self._before is None or weight is None:
            return velocity
        change = weight * (clean - self._before.clean)
        return (velocity.float() - change / step.noise_level).to(velocity.dtype)

    def uncorrect(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        """Returns what `correct` got where it returned `velocity`, at a step that was given last."""
        weight = self._weight(step, state)
        if self._before is None or weight is None:
            return velocity
        change = weight * (state.float() - self._before.clean)
        return ((velocity.float() + change / step.noise_level) / (1.0 + weight)).to(velocity.dtype)

    def weight(self, before: float, level: float, next_level: float) -> float:
        return extrapolation_weight(before, level, next_level)

    def _weight(self, step: Step, like: Tensor) -> Tensor | float | None:
        """Returns w, of each token (B, N, 1) where a stage has begun; None where it is 0 for all."""
        before = self._before
        if before is None:
            return None
        weight = extrapolation_weight(before.step.noise_level, step.noise_level, step.next_level)
        if weight == 0.0:
            return None
        now = None if self._now is None else self._now.anchors
        computed = now if before.anchors is None else before.anchors
        if before.step.stage == step.stage or computed is None:
            return weight
        each = torch.zeros(like.shape[:2], dtype=torch.float32, device=like.device)
        return each.scatter_(1, computed, weight)[..., None]


def make_solver(name: Literal["euler", "dpmpp_2m", "caller"]) -> Solver:
    """Returns a fresh solver of one generation, by `JiTConfig.solver`; where the sampler has its own, none is added."""
    return Multistep() if name == "dpmpp_2m" else Euler()
