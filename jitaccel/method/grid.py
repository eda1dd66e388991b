"""Token grids: (h, w), or (t, h, w) for the frames of a video or the layers of a picture.

The method works along the last two axes: lattice, nearest anchor, blur and importance window stay within a frame. Only
activation ranks all frames together. Neighbours along t are not treated as near: where something moves or appears, the
rest of a token's own frame predicts it better than the adjacent frames do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.schema import num_tokens_of

__all__ = ["lattice", "name_of", "num_frames", "num_tokens_of"]


def name_of(grid: Sequence[int]) -> str:
    """Returns a grid as text, such as "64x64" or "21x30x52"."""
    return "x".join(map(str, grid))


def num_frames(grid: Sequence[int]) -> int:
    """Returns the number of frames: 1 for (h, w)."""
    return num_tokens_of(grid[:-2])


def lattice(grid: Sequence[int]) -> Tensor:
    """Returns the regular places of the first anchors, (N,) bool: in each frame even rows, even columns, the border."""
    regular = torch.zeros(*grid, dtype=torch.bool, device="cpu")
    regular[..., ::2, ::2] = True
    regular[..., [0, -1], :] = True
    regular[..., :, [0, -1]] = True
    return regular.flatten()
