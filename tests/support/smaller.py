"""The picture of half the size, made in plain torch without operators or plans."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 2
Grid = tuple[int, ...]
SmallVelocity = Callable[[Tensor, Grid, float], Tensor]
"""(tokens (1, M, D), their grid, noise level) -> velocity (1, M, D) of a picture of that size."""


def latents_of(tokens: Tensor, grid: Grid, patch: int = PATCH) -> Tensor:
    """Returns the latents (B, C, h * patch, w * patch) of tokens."""
    parts = tokens.unflatten(1, grid).unflatten(3, (-1, patch, patch))
    return torch.einsum("bhwcpq->bchpwq", parts).flatten(4, 5).flatten(2, 3)


def tokens_of(latents: Tensor, patch: int = PATCH) -> Tensor:
    """Returns the tokens (B, N, D) of latents."""
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def half(tokens: Tensor, grid: Grid, patch: int = PATCH) -> Tensor:
    """Returns the tokens of the half-size picture."""
    return tokens_of(F.avg_pool2d(latents_of(tokens, grid, patch), 2), patch)


def dense_velocity(small: SmallVelocity, grid: Grid, state: Tensor, level: float, patch: int = PATCH) -> Tensor:
    """Returns the velocity at every token from the network's velocity of the half-size picture."""
    small_grid = (grid[0] // 2, grid[1] // 2)
    shown, shown_level = half(state, grid, patch) / (1 - level / 2), (level / 2) / (1 - level / 2)
    clean = shown - shown_level * small(shown, small_grid, shown_level)
    large = F.interpolate(latents_of(clean, small_grid, patch), scale_factor=2, mode="bilinear")
    return (state - tokens_of(large, patch)) / level
