"""Solvers: compute the velocity whose Euler step, which every sampler takes, ends where the solver's step would.

`Euler` keeps the velocity. `Multistep` is the second-order DPM-Solver++(2M) (arXiv:2211.01095). In flow matching, an
Euler step goes towards the clean estimate `x0 = y - level * v`. DPM-Solver++(2M) goes towards an estimate that is
extrapolated from the previous step, linearly in the logarithm of the signal-to-noise ratio: `x0 + w * (x0 -
x0_before)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .steps import Step

_MOST = 2.0  # presets reach 1.7; without a bound, closely spaced levels followed by a large fall would extrapolate far


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanEstimate:
    """The clean estimate (B, N, D) float32 of a step.

    anchors: (B, M), the tokens that were computed; None if all were. A pooled stage computes all, in a smaller picture.
    """

    step: Step
    clean: Tensor
    anchors: Tensor | None


def extrapolation_weight(before: float, level: float, next_level: float) -> float:
    """Returns w for a step from `level` to `next_level` after one from `before`.

    0, an Euler step, if the ratio is 0 or infinite at an end: in the step after the one that starts from pure noise,
    and in the step that ends at the picture. At most 2, which departs from the paper.
    """
    if not 0.0 < next_level < level < before < 1.0:
        return 0.0
    made, due = _log_ratio(level) - _log_ratio(before), _log_ratio(next_level) - _log_ratio(level)
    return min(due / (2.0 * made), _MOST)


def _log_ratio(level: float) -> float:
    return math.log((1.0 - level) / level)


class Solver(Protocol):
    """The solver of one generation; `correct` turns the network's velocity into the one to step along.

    needs_every_step: whether every step, not only the first of a stage, depends on the velocity of the previous one.
    """

    @property
    def needs_every_step(self) -> bool: ...

    def correct(self, step: Step, state: Tensor, velocity: Tensor, anchors: Tensor | None) -> Tensor:
        """Returns the velocity (B, N, D), in its dtype, that an Euler step is to take.

        state: the one the network saw. anchors: (B, M) of this step; None for every token.
        """
        ...

    def uncorrect(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        """Inverts `correct` at the step it saw last: returns its input when it returned `velocity`."""
        ...

    def weight(self, before: float, level: float, next_level: float) -> float:
        """Returns w, the weight of the extrapolation in a step from `level` to `next_level` after one from `before`."""
        ...


class Euler:
    """Steps along the unchanged velocity."""

    needs_every_step = False

    def correct(self, step: Step, state: Tensor, velocity: Tensor, anchors: Tensor | None) -> Tensor:
        return velocity

    def uncorrect(self, step: Step, state: Tensor, velocity: Tensor) -> Tensor:
        return velocity

    def weight(self, before: float, level: float, next_level: float) -> float:
        return 0.0


class Multistep:
    """DPM-Solver++(2M): steps towards a clean estimate that is extrapolated from the previous step.

    Where a stage begins, some tokens take an Euler step: those that were lifted in the step before, and those that are
    lifted in a stage after a pooled one. Their estimate was, or has become, an interpolation between anchors. The
    estimate of a pooled stage does count: extrapolating from it gives two to four times less error (docs/exact-lab.md).
    """

    needs_every_step = True

    def __init__(self) -> None:
        self._before: CleanEstimate | None = None
        self._now: CleanEstimate | None = None

    def correct(self, step: Step, state: Tensor, velocity: Tensor, anchors: Tensor | None) -> Tensor:
        """Returns the velocity (B, N, D), in its dtype, that an Euler step is to take; `velocity` itself if w = 0.

        May be called several times for a step, for each branch of guidance and for their combination; the last call
        counts for the next step.

        Args:
            step: The step.
            state: (B, N, D), the one the network saw.
            velocity: (B, N, D).
            anchors: (B, M) of this step; None for every token.
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
        """Inverts `correct` at the step it saw last: returns its input when it returned `velocity`."""
        weight = self._weight(step, state)
        if self._before is None or weight is None:
            return velocity
        change = weight * (state.float() - self._before.clean)
        return ((velocity.float() + change / step.noise_level) / (1.0 + weight)).to(velocity.dtype)

    def weight(self, before: float, level: float, next_level: float) -> float:
        return extrapolation_weight(before, level, next_level)

    def _weight(self, step: Step, like: Tensor) -> Tensor | float | None:
        """Returns w, or w per token (B, N, 1) in the first step of a stage; None if it is 0 for all."""
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
    """Returns a new solver for one generation; "caller" adds no correction to the solver of the sampler."""
    return Multistep() if name == "dpmpp_2m" else Euler()
