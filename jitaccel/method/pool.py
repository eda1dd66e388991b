"""Pooled stages: the network sees a smaller picture, while the state keeps its size and every token its own noise.

A state `y = (1 - s) x + s e`, averaged over f x f latents, is `(1 - s) x_mean + (s / f) e'` with e' standard normal.
Divided by `1 - s + s / f`, it is a state of the picture reduced by f, at a lower noise level. The network runs on it as
on any picture of that size, and its clean estimate is upsampled bilinearly. So no token has to be moved, and no noise
drawn, where a pooled stage ends. A variant of ours, not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops.schema import pooled_grid
from .grid import num_tokens_of
from .lift import Level

__all__ = ["PooledPlan", "make_pooled_plan", "pooled_grid", "pooled_level"]


def pooled_level(level: Level, factor: int) -> Level:
    """Returns the noise level of a state at `level` after pooling by `factor` along each side.

    `s' = (s / f) / (1 - s + s / f)`, the shift of levels between picture sizes that SD3 and FLUX are trained with. 1
    stays 1, and 0 stays 0.
    """
    return (level / factor) / (1.0 - level + level / factor)


@dataclass(frozen=True, eq=False)
class PooledPlan:
    """How a pooled stage reduces the picture for the network and brings the answer back; built once per stage.

    Attributes:
        grid: Grid of the state, (h, w) or (t, h, w).
        factor: Reduction of rows and columns.
        patch: Latents along a token's side.
        anchors: (B, M) int64, sorted: the first token of each block that becomes one token. The network's values have
            this place in the full grid.
        positions: (B, M) int64: the tokens of the full grid at the rows and columns of the smaller picture, whose
            position ids it uses.
    """

    grid: tuple[int, ...]
    factor: int
    patch: int
    anchors: Tensor
    positions: Tensor

    is_dense = False

    @property
    def small_grid(self) -> tuple[int, ...]:
        """Grid of the picture that the network sees; M is the product of its sides."""
        return pooled_grid(self.grid, self.factor)

    def show(self, state: Tensor, level: float | Tensor) -> Tensor:
        """Returns the tokens (B, M, D) that the network sees of a state (B, N, D) at `level`: `ops.pool`.

        The state may hold several branches, one after the other: (k * B, N, D).
        """
        return ops.pool(state, self.grid, self.patch, self.factor, level)

    def show_beside(self, x: Tensor) -> Tensor:
        """Returns the means (B, M, C) of other latents in the layout of the state, (B, N, C), such as a mask."""
        return ops.pool(x, self.grid, self.patch, self.factor)

    def show_features(self, x: Tensor) -> Tensor:
        """Returns the means (B, M, C) of features of whole tokens (B, N, C)."""
        return ops.pool(x, self.grid, 1, self.factor)

    def spread(self, x: Tensor) -> Tensor:
        """Returns features (B, M, C) of the network's tokens, each copied to all tokens of its block, (B, N, C)."""
        *_, rows, columns = self.grid
        small = x.unflatten(1, self.small_grid)
        large = small.repeat_interleave(self.factor, dim=-3).repeat_interleave(self.factor, dim=-2)
        return large[..., :rows, :columns, :].flatten(1, -2)

    def show_level(self, level: Level) -> Level:
        """Returns the level at which the network sees a state at `level`."""
        return pooled_level(level, self.factor)

    def lift(
        self,
        values: Tensor,
        state: Tensor,
        level: float | Tensor,
        lifter: str = "clean",
        shown: Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity at every token (B, N, D) from the network's values (B, M, D): `ops.lift_pooled`.

        Args:
            values: (B, M, D).
            state: (B, N, D).
            level: Noise level of the state.
            lifter: Ignored; a pooled stage always lifts the clean estimate.
            shown: (B, M, D), the output of `show` for this state and level, if it was kept.
        """
        pooled = self.show(state, level) if shown is None else shown
        return ops.lift_pooled(values, pooled, state, self.grid, self.patch, self.factor, level)


def make_pooled_plan(batch: int, grid: tuple[int, ...], factor: int, patch: int, device: torch.device) -> PooledPlan:
    """Returns the plan that pools `batch` pictures of a grid by `factor`."""
    raster = torch.arange(num_tokens_of(grid), device=device).view(grid)
    rows, columns = pooled_grid(grid, factor)[-2:]
    anchors, positions = raster[..., ::factor, ::factor], raster[..., :rows, :columns]
    return PooledPlan(
        grid=grid,
        factor=factor,
        patch=patch,
        anchors=anchors.flatten().expand(batch, -1).contiguous(),
        positions=positions.flatten().expand(batch, -1).contiguous(),
    )
