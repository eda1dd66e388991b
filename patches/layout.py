"""How a sampler's latents hold the tokens of a grid: patches of a picture or video, or the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(Protocol):
    """How the latents that a sampler moves, and that a model is given, hold the tokens that are generated."""

    @property
    def side(self) -> int:
        """How many latents lie along a token's side, rows and columns alike."""
        ...

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Returns the tokens (B, N, D) of latents."""
        ...

    def to_latents(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Returns the latents of tokens (B, N, D), in the shape of `like` but for its channels."""
        ...

    def generated(self, given: Tensor, num_tokens: int, channels: int) -> Tensor:
        """Returns of all that a model is given the latents that are generated; the very tensor where that is all."""
        ...

    def put_generated(self, latents: Tensor, given: Tensor) -> Tensor:
        """Returns what a model is given, with other latents in the place of those that are generated."""
        ...

    def smaller(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        given: Tensor,
        num_tokens: int,
        pool: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns what a model is given of a smaller picture: its tokens (B, M, D) on `grid`, and what is beside them.

        given, num_tokens: what it is given of the whole picture, and N of that. pool: (B, N, C) of latents beside those
        that are generated -> (B, M, C).
        """
        ...


@dataclass(frozen=True)
class PatchLayout:
    """Latents (B, C, *sizes), of which a token is a patch; conditions are further channels, after the generated ones.

    Attributes:
        patch: The patch's sides, as many as `sizes`: (1, 2, 2) for a video (B, C, T, H, W).
    """

    patch: tuple[int, ...]

    @property
    def side(self) -> int:
        """How many latents lie along a token's side."""
        return self.patch[-1]

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the token grid of latents of a shape (B, C, *sizes).

        Raises:
            ValueError: For sizes that are not as many as the patch's sides, or no multiples of them.
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
        """Returns the latents (B, C, *sizes) of tokens (B, N, C * patch); sizes: those of `like`."""
        return unpatchify(tokens, self.grid(like.shape), self.patch)

    def generated(self, given: Tensor, num_tokens: int, channels: int) -> Tensor:
        """Returns the first `channels` of what a model is given."""
        return given if given.shape[1] == channels else given[:, :channels]

    def put_generated(self, latents: Tensor, given: Tensor) -> Tensor:
        """Returns `latents` with the further channels that a model is given."""
        return _followed(latents, given[:, latents.shape[1] :])

    def smaller(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        given: Tensor,
        num_tokens: int,
        pool: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns the latents of a smaller picture or video, with the further channels of it."""
        latents = unpatchify(tokens, grid, self.patch)
        further = patchify(given[:, latents.shape[1] :], self.patch)
        return _followed(latents, unpatchify(pool(further), grid, self.patch)) if further.shape[2] else latents


@dataclass(frozen=True)
class TokenLayout:
    """Latents that are tokens already, (B, N, D); references are further tokens, after the generated ones.

    Attributes:
        side: How many latents lie along a token's side.
    """

    side: int = 2

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Returns the latents themselves."""
        return latents

    def to_latents(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Returns tokens (B, N, D) with zeros for the references of `like`, which nobody reads."""
        further = like.shape[1] - tokens.shape[1]
        return F.pad(tokens, (0, 0, 0, further)) if further else tokens

    def generated(self, given: Tensor, num_tokens: int, channels: int) -> Tensor:
        """Returns the first `num_tokens` of what a model is given."""
        return given if given.shape[1] == num_tokens else given[:, :num_tokens]

    def put_generated(self, latents: Tensor, given: Tensor) -> Tensor:
        """Returns `latents` (B, N, D) with the references that a model is given."""
        return _followed(latents, given[:, latents.shape[1] :])

    def smaller(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        given: Tensor,
        num_tokens: int,
        pool: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Returns the tokens of a smaller picture with the references that a model is given."""
        return _followed(tokens, given[:, num_tokens:])


def _followed(first: Tensor, further: Tensor) -> Tensor:
    """Returns both along axis 1; `first` itself where there is nothing further."""
    return torch.cat([first, further], dim=1) if further.shape[1] else first


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Returns the tokens (B, N, C * patch) of `x` (B, C, *sizes), in raster order; sizes are multiples of the patch.

    Within a token channels come first, then the patch's places in raster order.
    """
    batch, channels, *sizes = x.shape
    axes = len(patch)
    split = [side for size, step in zip(sizes, patch, strict=True) for side in (size // step, step)]
    grid_axes, patch_axes = [2 + 2 * k for k in range(axes)], [3 + 2 * k for k in range(axes)]
    parts = x.reshape(batch, channels, *split).permute(0, *grid_axes, 1, *patch_axes)
    return parts.flatten(1 + axes).flatten(1, axes)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Returns `x` (B, C, *sizes) of its tokens (B, N, C * patch), the reverse of `patchify`."""
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
    """Returns the picture (B, C, H, W) of tokens (B, N, D) of a grid; size: (H, W), without padding."""
    return unpatchify(tokens, grid, (patch, patch))[:, :, : size[0], : size[1]]
