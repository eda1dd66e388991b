"""A second, plain implementation of the method for one image, without Run, clock or patches.

It shares with the package only the pure functions, which have their own tests, and the random generator of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from jitaccel import JiTConfig
from jitaccel.method.anchors import activate, first_anchors, merge_anchors
from jitaccel.method.grid import num_tokens_of
from jitaccel.method.importance import importance
from jitaccel.method.lift import LiftPlan, lift, lift_velocity, make_lift_plan
from jitaccel.method.run import image_generators
from jitaccel.tokens import gather_tokens, put_tokens_
from tests.support.smaller import dense_velocity

Velocity = Callable[[Tensor, Tensor, float], Tensor]
"""(tokens (1, M, D), their raster indices (M,), noise level) -> velocity (1, M, D), guided if guidance is used."""


def clean_estimate(state: Tensor, velocity: Tensor, level: float) -> Tensor:
    """Returns `x0 = y - level * v`, Tweedie's formula."""
    return state - level * velocity


def target_state(clean_at_anchors: Tensor, plan: LiftPlan, noise: Tensor, level: float) -> Tensor:
    """Returns the target of every token at `level`, `(1 - level) * Phi(x0) + level * e`."""
    return (1.0 - level) * lift(clean_at_anchors, plan) + level * noise


def move(state: Tensor, target: Tensor, tokens: Tensor, weight: float) -> Tensor:
    """Returns `state` with `tokens` at `(1 - weight) * y + weight * target`."""
    values = (1.0 - weight) * gather_tokens(state, tokens) + weight * gather_tokens(target, tokens)
    return put_tokens_(state.clone(), values, tokens)


def multistep(
    state: Tensor, clean: Tensor, before: Tensor, levels: tuple[float, float, float], where: Tensor | None
) -> Tensor:
    """Returns the state after a step of DPM-Solver++(2M), as in arXiv:2211.01095, Algorithm 2.

    `levels` are those of the previous, the current and the next step; `where` are the tokens whose previous estimate
    was not interpolated.
    """
    (half, h), (sigma, next_sigma) = _log_ratios(levels), levels[1:]
    ratio = half / h
    estimate = (1.0 + 0.5 / ratio) * clean - 0.5 / ratio * before
    if where is not None:
        estimate = put_tokens_(clean.clone(), gather_tokens(estimate, where), where)
    return next_sigma / sigma * state - (1.0 - next_sigma) * math.expm1(-h) * estimate


def _log_ratios(levels: tuple[float, float, float]) -> list[float]:
    logs = [math.log(1.0 - level) - math.log(level) for level in levels]
    return [after - before for before, after in pairwise(logs)]


@dataclass
class Trajectory:
    """The `states` after each step and its following move, and the `anchors` of each step."""

    states: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)


def denoise(
    velocity_of: Velocity,
    config: JiTConfig,
    grid: tuple[int, ...],
    state: Tensor,
    levels: Sequence[float],
    *,
    stages: Sequence[int] | None = None,
    edit: Callable[[Tensor], Tensor] = lambda state: state,
    forced: Tensor | None = None,
) -> Trajectory:
    """Returns one generation.

    `stages` are those of each step, by default the configuration's; `edit` acts like a callback's edit of the state;
    `forced` (N,) bool are tokens that are always anchors.
    """
    steps = len(levels) - 1
    stages = [config.stage_of_step(i, steps) for i in range(steps)] if stages is None else stages
    counts = config.token_counts(num_tokens_of(grid), 0 if forced is None else int(forced.sum()))
    generator = image_generators(state)[0]
    raster = torch.arange(num_tokens_of(grid)).view(grid)
    if config.pooling_of(stages[0]) == 1:
        plan = make_lift_plan(first_anchors(grid, counts[stages[0]], generator, forced)[None], grid, config.blur_scale)
    else:  # pooled by 2, then dense
        assert config.pooling == (2, 1)
        plan = make_lift_plan(raster.view(1, -1), grid, config.blur_scale)

    def small(tokens: Tensor, small_grid: tuple[int, ...], level: float) -> Tensor:
        return velocity_of(tokens, raster[..., : small_grid[-2], : small_grid[-1]].flatten(), level)

    noise = state.clone() if config.noise == "own" else None
    done = Trajectory()
    estimated: Tensor | None = None
    computed = plan.anchors
    for i, (level, next_level) in enumerate(pairwise(levels)):
        if config.pooling_of(stages[i]) == 2:
            velocity = dense_velocity(small, grid, state, level)
            done.anchors.append(raster[..., ::2, ::2].flatten())
        else:
            values = velocity_of(gather_tokens(state, plan.anchors), plan.anchors[0], level)
            velocity = lift_velocity(values, state, level, plan, config.lifter)
            done.anchors.append(plan.anchors[0])
        before, state = state, state + (next_level - level) * velocity
        clean = clean_estimate(before, velocity, level)
        if config.solver == "dpmpp_2m" and estimated is not None and next_level > 0.0 and levels[i - 1] < 1.0:
            is_new = stages[i] != stages[i - 1] and config.pooling_of(stages[i - 1]) == 1
            where = computed if is_new else None
            state = multistep(before, clean, estimated, (levels[i - 1], level, next_level), where)
        estimated, computed = clean, plan.anchors
        if i + 1 < steps and stages[i + 1] > stages[i] and config.pooling_of(stages[i]) == 1:
            scores = importance(velocity, grid, config.importance_window)
            tokens = activate(scores, plan.anchors, counts[stages[i + 1]] - plan.anchors.shape[1])
            if config.micro_flow != "none":
                if noise is None:
                    noise = torch.randn(state.shape[1:], generator=generator)[None]
                target = target_state(gather_tokens(clean, plan.anchors), plan, noise, next_level)
                state = move(state, target, tokens, config.move_weight)
            plan = make_lift_plan(merge_anchors(plan.anchors, tokens), grid, config.blur_scale)
        state = edit(state)
        done.states.append(state)
    return done
