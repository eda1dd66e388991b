"""Variants of the method, with another lifter or importance than the product's: a `Run` that overrides its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitaccel.method.config import JiTConfig
from jitaccel.method.importance import importance
from jitaccel.method.lift import LiftPlan
from jitaccel.method.run import Left, Run
from jitaccel.method.steps import Step
from jitaccel.tokens import gather_tokens, put_tokens_

from .lifters import Lifter

Scores = Callable[["VariantRun", Left], Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration, and what replaces the product's own parts; None keeps them.

    stale_keys: inactive tokens stay visible to attention with the keys and values of their last evaluation; the first
    step is dense then. cache_threshold: of a first-block cache inside each stage.
    """

    config: JiTConfig
    lifter: Lifter | None = None
    scores: Scores | None = None
    stale_keys: bool = False
    cache_threshold: float | None = None


class VariantRun(Run):
    """A generation of a variant. `words_seen`: how much attention each token pays to the words, (B, N), or None."""

    def __init__(self, variant: Variant, grid: tuple[int, int], step: Step, state: Tensor) -> None:
        self._variant = variant
        self._weights: Tensor | None = None
        self.words_seen: Tensor | None = None
        super().__init__(variant.config, grid, step, state)

    @property
    def generators(self) -> list[torch.Generator]:
        """One generator for each image, from which its random choices come."""
        return self._generators

    def _plan(self, anchors: Tensor) -> None:
        super()._plan(anchors)
        lifter = self._variant.lifter
        if lifter is not None and not self.is_dense:
            self._weights = torch.stack([lifter(row, self.grid) for row in anchors])

    def scores(self, left: Left) -> Tensor:
        return super().scores(left) if self._variant.scores is None else self._variant.scores(self, left)

    def lift(self, step: Step, state: Tensor, values: Tensor) -> Tensor:
        if self._weights is None or self.is_dense:
            return super().lift(step, state, values)
        if self.config.lifter == "velocity":
            lifted = self._weights @ values
        else:
            clean = self.gather(state) - step.noise_level * values
            lifted = (state - self._weights @ clean) / step.noise_level
        return put_tokens_(lifted, values, self.anchors)

    def move(self, step: Step, state: Tensor, left: Left, tokens: Tensor, old: LiftPlan) -> Tensor:
        if self._variant.lifter is None:
            return super().move(step, state, left, tokens, old)
        weights = torch.stack([self._variant.lifter(row, self.grid) for row in old.anchors])
        lifted = weights @ gather_tokens(clean_of(left), old.anchors)
        target = (1.0 - step.noise_level) * lifted + step.noise_level * self._target_noise(state)
        now, goal = gather_tokens(state, tokens), gather_tokens(target, tokens)
        return put_tokens_(state.clone(), torch.lerp(now, goal, self.config.move_weight), tokens)


def clean_of(left: Left) -> Tensor:
    """Returns the clean estimate (B, N, D) at the end of a stage."""
    return left.state - left.noise_level * left.velocity


def clean_variance(run: VariantRun, left: Left) -> Tensor:
    """Returns the local variance of the clean estimate."""
    return importance(clean_of(left), run.grid, run.config.importance_window)


def gradient(run: VariantRun, left: Left) -> Tensor:
    """Returns the squared gradient of the clean estimate, by central differences, mean over channels."""
    field = clean_of(left).unflatten(1, run.grid)
    down, right = torch.gradient(field, dim=(1, 2))
    return (down.square() + right.square()).mean(dim=-1).flatten(1)


def left_out_error(run: VariantRun, left: Left) -> Tensor:
    """Returns by how much the lifter misses each anchor's velocity when it is left out, as the nearest anchor's."""
    found = []
    for anchors, nearest, velocity in zip(run.anchors, run.plan.nearest, left.velocity, strict=True):
        weights = _own_weights(run, anchors)
        values = velocity[anchors]
        own = weights[anchors].diagonal()[:, None].clamp(max=0.99)
        guessed = (weights[anchors] @ values - own * values) / (1.0 - own)
        found.append((guessed - values).square().mean(dim=-1)[nearest])
    return torch.stack(found)


def random_scores(run: VariantRun, left: Left) -> Tensor:
    """Returns noise: tokens are activated at random."""
    size = left.velocity.shape[1]
    return torch.stack([torch.rand(size, generator=generator) for generator in run.generators])


def fixed_grid(run: VariantRun, left: Left) -> Tensor:
    """Returns the same for every picture: first every other token of a checkerboard, then the rest, spread evenly."""
    height, width = run.grid
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    even = ((row + column) % 2 == 0).float()
    spread = (row * 0.7548776662 + column * 0.5698402910) % 1.0  # a low-discrepancy order
    return (even + spread).flatten().expand(left.velocity.shape[0], -1)


def words_attended(run: VariantRun, left: Left) -> Tensor:
    """Returns how much attention each token pays to the words; inactive tokens as the nearest anchor."""
    if run.words_seen is None:
        raise RuntimeError("words_attended: the network must have noted the attention to words, got none")
    return run.words_seen


def _own_weights(run: VariantRun, anchors: Tensor) -> Tensor:
    from .lifters import blurred

    lifter: Callable[..., Any] = run._variant.lifter or functools.partial(blurred, sigma=1.0)
    weights: Tensor = lifter(anchors, run.grid)
    return weights
