"""Pictures of latents without an autoencoder, with their three main directions as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_REACH = 2.5  # standard deviations on either side of the mean that the colours span
_SMALLEST_PX = 128  # the picture is enlarged to at most this side, one block per token


@dataclass(frozen=True, eq=False, kw_only=True)
class Axes:
    """The mapping to colours: mean (D,), three directions (D, 3), and the spread along each, (3,)."""

    mean: Tensor
    directions: Tensor
    spread: Tensor


def main_axes(tokens: Tensor) -> Axes:
    """Returns the three directions along which tokens (N, D) float32 vary most."""
    mean = tokens.nan_to_num().mean(dim=0)
    centred = tokens.nan_to_num() - mean
    directions = torch.zeros(tokens.shape[1], 3)
    found = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T  # fewer if tokens have one or two channels
    directions[:, : found.shape[1]] = found
    spread = (centred @ directions).std(dim=0, correction=0)
    return Axes(mean=mean, directions=directions, spread=spread.clamp(min=1e-6))


def false_colours(tokens: Tensor, axes: Axes, grid: tuple[int, ...]) -> Tensor:
    """Returns frames (T, H, W, 3) float32 in [0, 1] of tokens (N, D) on a grid, one block of pixels per token."""
    values = (tokens - axes.mean) @ axes.directions / (2.0 * _REACH * axes.spread) + 0.5
    frames = values.clamp(0.0, 1.0).view(-1, *grid[-2:], 3)
    block = max(1, _SMALLEST_PX // max(grid[-2:]))
    return frames.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
