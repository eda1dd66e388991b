"""A made-up network, and one generation of it without any model's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitaccel import JiTConfig, noise_levels
from jitaccel.method.run import Run
from jitaccel.method.steps import KnownLevels

GRID = (12, 10)
NUM_TOKENS = GRID[0] * GRID[1]

Network = Callable[[Tensor, Tensor, float], Tensor]


def noise(batch: int = 1, seed: int = 0) -> Tensor:
    images = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    return torch.stack([torch.randn(NUM_TOKENS, 3, generator=image) for image in images])


def network(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
    """A velocity of each token's own value and place."""
    places = torch.stack([anchors // GRID[1], anchors % GRID[1], anchors], dim=-1)
    return tokens.tanh() * level + torch.sin(places * 0.7)


def drive(
    config: JiTConfig,
    state: Tensor,
    network: Network = network,
    visit: Callable[[Run, int, Tensor, Tensor, Tensor], None] = lambda *_: None,
    grid: tuple[int, int] = GRID,
    **given: Any,
) -> list[Tensor]:
    """Returns the state after each step, before the move that follows.

    `visit` sees run, step, state, values and velocity.
    """
    levels = noise_levels(config)
    clock = KnownLevels(config, levels)
    run = Run(config, grid, clock.step(0), state, **given)
    states = []
    for i in range(clock.num_steps):
        state = run.enter(clock.step(i), state)
        values = network(run.gather(state), run.anchors, levels[i])
        velocity = run.leave(clock.step(i), state, values)
        assert run.noise_level == levels[i]
        visit(run, i, state, values, velocity)
        state = state + (levels[i + 1] - levels[i]) * velocity
        states.append(state)
    run.check_finite()
    return states
