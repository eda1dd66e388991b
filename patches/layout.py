"""ComfyUI's latents as tokens: patches of a picture that is padded as ComfyUI's own FLUX pads it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def to_tokens(x: Tensor, patch: int) -> Tensor:
    """Returns the tokens (B, N, C * patch * patch) of a picture (B, C, H, W), padded around to whole patches."""
    short = (-x.shape[3] % patch, -x.shape[2] % patch)
    if any(short):
        x = F.pad(x, (0, short[0], 0, short[1]), mode="circular")
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def to_picture(tokens: Tensor, grid: tuple[int, int], patch: int, size: tuple[int, ...]) -> Tensor:
    """Returns the picture (B, C, H, W) of tokens (B, N, D) of a grid; size: (H, W), without padding."""
    parts = tokens.reshape(tokens.shape[0], *grid, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(tokens.shape[0], -1, grid[0] * patch, grid[1] * patch)[:, :, : size[0], : size[1]]
