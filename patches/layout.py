"""How a sampler's latents hold the tokens of a grid: patches of a picture or video, or the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(Protocol):
    """How the latents of a sampler, which are also a model's input, hold the generated tokens."""

    @property
    def side(self) -> int:
        """Number of latents along a token's side, the same for rows and columns."""
        ...

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Returns the tokens (B, N, D) of latents."""
        ...

    def to_latents(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Returns the latents of tokens (B, N, D), in the shape of `like` but for its channels."""
        ...

    def generated(self, given: Tensor, num_tokens: int, channels: int) -> Tensor:
        """Returns the generated latents of a model's input; the same tensor if the input holds nothing else."""
        ...

    def put_generated(self, latents: Tensor, given: Tensor) -> Tensor:
        """Returns a model's input `given` with its generated latents replaced by `latents`."""
        ...

    def smaller(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        given: Tensor,
        num_tokens: int,
        pool: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns a model's input for a smaller picture: its generated tokens and the conditions next to them.

        Args:
            tokens: (B, M, D), the tokens of the smaller picture.
            grid: The grid of those M tokens.
            given: The model's input for the whole picture.
            num_tokens: N, the number of generated tokens in `given`.
            pool: Averages the latents of conditions, (B, N, C) -> (B, M, C).
        """
        ...


@dataclass(frozen=True)
class PatchLayout:
    """Latents (B, C, *sizes) in which a token is a patch. Conditions are further channels after the generated ones.

    Attributes:
        patch: The patch's sides, one for each of `sizes`: (1, 2, 2) for a video (B, C, T, H, W).
    """

    patch: tuple[int, ...]

    @property
    def side(self) -> int:
        """Number of latents along a token's side."""
        return self.patch[-1]

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the token grid of latents with the shape (B, C, *sizes).

        Raises:
            ValueError: If there is not one size for each side of the patch, or a size is not a multiple of its side.
        """
        sizes = tuple(shape[2:])
        if len(sizes) != len(self.patch) or any(size % side for size, side in zip(sizes, self.patch, strict=True)):
            raise ValueError(
                f"jitaccel: latents must be (B, C, ...) of whole patches of {self.patch}, got shape {tuple(shape)}; "
                f"use a size that is a multiple of the patch"
            )
        return tuple(size // side for size, side in zip(sizes, self.patch, strict=True))

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Returns the tokens (B, N, C * patch) of latents (B, C, *sizes)."""
        return patchify(latents, self.patch)

    def to_latents(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Returns the latents (B, C, *sizes) of tokens (B, N, C * patch), with the sizes of `like`."""
        return unpatchify(tokens, self.grid(like.shape), self.patch)

    def generated(self, given: Tensor, num_tokens: int, channels: int) -> Tensor:
        """Returns the first `channels` channels of a model's input."""
        return given if given.shape[1] == channels else given[:, :channels]

    def put_generated(self, latents: Tensor, given: Tensor) -> Tensor:
        """Returns `latents` followed by the further channels of a model's input."""
        return _followed(latents, given[:, latents.shape[1] :])

    def smaller(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        given: Tensor,
        num_tokens: int,
        pool: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns the latents of a smaller picture or video, followed by its further channels."""
        latents = unpatchify(tokens, grid, self.patch)
        further = patchify(given[:, latents.shape[1] :], self.patch)
        return _followed(latents, unpatchify(pool(further), grid, self.patch)) if further.shape[2] else latents


@dataclass(frozen=True)
class TokenLayout:
    """Latents that are already tokens, (B, N, D). References are further tokens after the generated ones.

    Attributes:
        side: Number of latents along a token's side.
    """

    side: int = 2

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Returns the latents themselves."""
        return latents

    def to_latents(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Returns tokens (B, N, D), followed by zeros for the references of `like`, which nobody reads."""
        further = like.shape[1] - tokens.shape[1]
        return F.pad(tokens, (0, 0, 0, further)) if further else tokens

    def generated(self, given: Tensor, num_tokens: int, channels: int) -> Tensor:
        """Returns the first `num_tokens` tokens of a model's input."""
        return given if given.shape[1] == num_tokens else given[:, :num_tokens]

    def put_generated(self, latents: Tensor, given: Tensor) -> Tensor:
        """Returns `latents` (B, N, D) followed by the references of a model's input."""
        return _followed(latents, given[:, latents.shape[1] :])

    def smaller(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        given: Tensor,
        num_tokens: int,
        pool: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns the tokens of a smaller picture followed by the references of a model's input."""
        return _followed(tokens, given[:, num_tokens:])


def _followed(first: Tensor, further: Tensor) -> Tensor:
    """Returns both, joined along axis 1; `first` itself if `further` is empty."""
    return torch.cat([first, further], dim=1) if further.shape[1] else first


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Returns the tokens (B, N, C * patch) of `x` (B, C, *sizes), in raster order; sizes are multiples of the patch.

    Within a token, channels vary slowest, then the positions in the patch in raster order.
    """
    batch, channels, *sizes = x.shape
    axes = len(patch)
    split = [side for size, step in zip(sizes, patch, strict=True) for side in (size // step, step)]
    grid_axes, patch_axes = [2 + 2 * k for k in range(axes)], [3 + 2 * k for k in range(axes)]
    parts = x.reshape(batch, channels, *split).permute(0, *grid_axes, 1, *patch_axes)
    return parts.flatten(1 + axes).flatten(1, axes)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Returns `x` (B, C, *sizes) from its tokens (B, N, C * patch), the inverse of `patchify`."""
    axes = len(patch)
    parts = tokens.unflatten(1, tuple(grid)).unflatten(-1, (-1, *patch))  # (B, *grid, C, *patch)
    pairs = [axis for k in range(axes) for axis in (1 + k, 2 + axes + k)]
    sizes = [side * step for side, step in zip(grid, patch, strict=True)]
    return parts.permute(0, 1 + axes, *pairs).reshape(len(tokens), -1, *sizes)


def to_tokens(x: Tensor, patch: int) -> Tensor:
    """Returns the tokens (B, N, C * patch * patch) of a picture (B, C, H, W), padded as ComfyUI's own FLUX pads it."""
    short = (-x.shape[3] % patch, -x.shape[2] % patch)
    if any(short):
        x = F.pad(x, (0, short[0], 0, short[1]), mode="circular")
    return patchify(x, (patch, patch))


def to_picture(tokens: Tensor, grid: tuple[int, int], patch: int, size: tuple[int, ...]) -> Tensor:
    """Returns the picture (B, C, H, W) of the tokens (B, N, D) on a grid; `size` is (H, W), without padding."""
    return unpatchify(tokens, grid, (patch, patch))[:, :, : size[0], : size[1]]
