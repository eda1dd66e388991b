"""Variants of the method with a different lifter or importance, as parts for a `Run`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jitaccel.method.config import JiTConfig
from jitaccel.method.importance import importance
from jitaccel.method.lift import LiftPlan
from jitaccel.method.run import Left, Parts, Run
from jitaccel.method.steps import Step
from jitaccel.tokens import gather_tokens, put_tokens_

from .lifters import Lifter, blurred

Scores = Callable[["StageEnd"], Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration with replacements of the product's parts; None keeps a part.

    With `stale_keys`, the first step is dense, and inactive tokens stay visible to attention with the keys and values
    of their last evaluation. `cache_threshold` is the threshold of a first-block cache within each stage.
    """

    config: JiTConfig
    lifter: Lifter | None = None
    scores: Scores | None = None
    stale_keys: bool = False
    cache_threshold: float | None = None


@dataclass(kw_only=True)
class Watched:
    """Observations of the network: how much attention each token pays to the words, (B, N), or None."""

    words: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StageEnd:
    """The data from which scores can be computed at the end of a stage."""

    run: Run
    left: Left
    lifter: Lifter | None
    words: Tensor | None


def start(
    variant: Variant, grid: tuple[int, ...], step: Step, state: Tensor, patch: int = 1
) -> tuple[Run, Watched]:
    """Returns a generation of a variant, and the object in which its sampler records observations.

    `patch` is the number of latents along a token's side, which pooled stages average.
    """
    watched = Watched()
    return Run(variant.config, grid, step, state, parts=parts_of(variant, watched), patch=patch), watched


def parts_of(variant: Variant, watched: Watched) -> Parts:
    """Returns the product's parts with the variant's replacements."""
    parts = Parts()
    if variant.scores is not None:
        parts = replace(parts, scores=functools.partial(_scores, variant, watched))
    if variant.lifter is not None:
        weights = _Weights(variant.lifter)
        parts = replace(parts, lift=functools.partial(_lift, weights), move=functools.partial(_move, weights))
    return parts


class _Weights:
    """A lifter's weights for each image's anchors, (B, N, M), computed once per stage."""

    def __init__(self, lifter: Lifter) -> None:
        self._lifter = lifter
        self._made: tuple[Tensor, Tensor] | None = None

    def at(self, plan: LiftPlan) -> Tensor:
        if self._made is None or self._made[0] is not plan.anchors:
            self._made = plan.anchors, torch.stack([self._lifter(row, plan.grid) for row in plan.anchors])
        return self._made[1]


def _scores(variant: Variant, watched: Watched, run: Run, left: Left) -> Tensor:
    assert variant.scores is not None
    return variant.scores(StageEnd(run=run, left=left, lifter=variant.lifter, words=watched.words))


def _lift(weights: _Weights, run: Run, step: Step, state: Tensor, values: Tensor) -> Tensor:
    if run.is_dense:
        return values
    if run.config.lifter == "velocity":
        lifted = weights.at(run.plan) @ values
    else:
        clean = run.gather(state) - step.noise_level * values
        lifted = (state - weights.at(run.plan) @ clean) / step.noise_level
    return put_tokens_(lifted, values, run.anchors)


def _move(weights: _Weights, run: Run, step: Step, state: Tensor, left: Left, tokens: Tensor, old: LiftPlan) -> Tensor:
    lifted = weights.at(old) @ gather_tokens(clean_of(left), old.anchors)
    target = (1.0 - step.noise_level) * lifted + step.noise_level * run.target_noise(state)
    now, goal = gather_tokens(state, tokens), gather_tokens(target, tokens)
    return put_tokens_(state.clone(), torch.lerp(now, goal, run.config.move_weight), tokens)


def clean_of(left: Left) -> Tensor:
    """Returns the clean estimate (B, N, D) at the end of a stage."""
    return left.state - left.noise_level * left.velocity


def clean_variance(end: StageEnd) -> Tensor:
    """Returns the local variance of the clean estimate."""
    return importance(clean_of(end.left), end.run.grid, end.run.config.importance_window)


def gradient(end: StageEnd) -> Tensor:
    """Returns the squared gradient of the clean estimate by central differences, as the mean over channels."""
    field = clean_of(end.left).unflatten(1, end.run.grid)
    down, right = torch.gradient(field, dim=(1, 2))
    return (down.square() + right.square()).mean(dim=-1).flatten(1)


def left_out_error(end: StageEnd) -> Tensor:
    """Returns the lifter's error at each anchor if that anchor is left out; other tokens get their nearest anchor's."""
    lifter, run = end.lifter or functools.partial(blurred, sigma=1.0), end.run
    found = []
    for anchors, nearest, velocity in zip(run.anchors, run.plan.nearest, end.left.velocity, strict=True):
        weights = lifter(anchors, run.grid)
        values = velocity[anchors]
        own = weights[anchors].diagonal()[:, None].clamp(max=0.99)
        guessed = (weights[anchors] @ values - own * values) / (1.0 - own)
        found.append((guessed - values).square().mean(dim=-1)[nearest])
    return torch.stack(found)


def random_scores(end: StageEnd) -> Tensor:
    """Returns noise, which activates tokens at random."""
    size = end.left.velocity.shape[1]
    return torch.stack([torch.rand(size, generator=generator) for generator in end.run.generators])


def fixed_grid(end: StageEnd) -> Tensor:
    """Returns the same scores for every picture: first one colour of a checkerboard, then the rest, evenly spread."""
    height, width = end.run.grid
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    even = ((row + column) % 2 == 0).float()
    spread = (row * 0.7548776662 + column * 0.5698402910) % 1.0  # a low-discrepancy order
    return (even + spread).flatten().expand(end.left.velocity.shape[0], -1)


def words_attended(end: StageEnd) -> Tensor:
    """Returns how much attention each token pays to the words; inactive tokens get their nearest anchor's value."""
    if end.words is None:
        raise RuntimeError("words_attended: the network must have recorded the attention to words, got none")
    return end.words
