"""Pooled stages by hand: the smaller picture made in plain torch, without Run, operators or patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from jitaccel import JiTConfig
from tests.support.reference import clean_estimate, multistep
from tests.support.smaller import PATCH, Grid, SmallVelocity, dense_velocity, half
from tests.support.subjects import Subject
from tests.support.tiny import GRID, TEXT_TOKENS

POOLED = JiTConfig(densities=(0.25, 1.0), boundaries=(0.5, 1.0), steps=5, pooling=(2, 1), lifter="clean")
"""Two pooled steps, then three dense ones."""

def denoise_pooled(
    small: SmallVelocity, whole: Callable[[Tensor, float], Tensor], config: JiTConfig, state: Tensor,
    levels: Sequence[float], grid: Grid = GRID, patch: int = PATCH,
) -> Tensor:  # fmt: skip
    """Returns the final state of a generation with a pooled first stage followed by dense steps."""
    steps = len(levels) - 1
    estimated: Tensor | None = None
    for i, (level, after) in enumerate(pairwise(levels)):
        stage = config.stage_of_step(i, steps)
        velocity = dense_velocity(small, grid, state, level, patch) if stage == 0 else whole(state, level)
        before, state = state, state + (after - level) * velocity
        clean = clean_estimate(before, velocity, level)
        is_multistep = config.solver == "dpmpp_2m" and i > 0 and after > 0.0 and levels[i - 1] < 1.0
        if is_multistep and estimated is not None:
            state = multistep(before, clean, estimated, (levels[i - 1], level, after), None)
        estimated = clean
    return state


def small_velocity(subject: Subject) -> SmallVelocity:
    """Returns the velocity function of a subject's model for the smaller picture, with all inputs at half size."""

    def velocity(tokens: Tensor, grid: Grid, level: float) -> Tensor:
        count = tokens.shape[1]
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
        ids = torch.zeros(count, subject.ids.shape[1], dtype=subject.ids.dtype)
        ids[:, 1], ids[:, 2] = rows.flatten(), columns.flatten()
        hidden = tokens
        if subject.extra is not None:
            hidden = torch.cat([hidden, half(subject.extra[None], GRID)], dim=2)
        if subject.references is not None and subject.reference_ids is not None:
            hidden = torch.cat([hidden, subject.references[None]], dim=1)
            ids = torch.cat([ids, subject.reference_ids])
        first = torch.arange(GRID[0] * GRID[1]).view(GRID)[::2, ::2].flatten()
        text = torch.arange(TEXT_TOKENS)
        out = subject.model(
            hidden_states=hidden,
            img_ids=ids,
            timestep=torch.tensor([level]),
            **{name: mask[torch.cat([text, TEXT_TOKENS + first])][None] for name, mask in subject.masks.items()},
            **{name: [half(x[None], GRID, 1) for x in several] for name, several in subject.residuals.items()},
            **subject.arguments,
            return_dict=False,
        )[0]
        return out[:, :count]

    return velocity


def whole_velocity(subject: Subject) -> Callable[[Tensor, float], Tensor]:
    """Returns a subject's dense velocity function."""
    every = torch.arange(GRID[0] * GRID[1])
    return lambda state, level: subject.velocity(state, every, level)
