"""Gaussian random fields of known spectrum, and the aliasing blocks on which averages of areas act.

A stage that averages areas of f x f latents mixes only frequencies that differ by multiples of side / f. Along an
axis, with the basis `exp(2 pi i k (x + 1/2) / side)`, the mean over an area maps `k = q + m side / f` to the frequency
q of the smaller picture, with the real gain `(-1)^m sin(pi f k / side) / (f sin(pi k / side))`. The half sample in the
basis makes the areas symmetric: all gains are real, and frequencies q and -q behave alike.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Field:
    """A periodic stationary Gaussian field of unit variance with power `(1 + |k|^2)^(-exponent / 2)`.

    Attributes:
        shape: Latents, (h, w) or (t, h, w).
        exponent: Decay of the power with the frequency; natural pictures have 2 to 2.6.
    """

    shape: tuple[int, ...]
    exponent: float

    def power(self, *frequencies: Array) -> Array:
        """Returns the power at frequencies in cycles per picture, one array an axis, 0 <= k < side."""
        folded = (np.minimum(k, side - k) for k, side in zip(frequencies, self.shape, strict=True))
        square = functools.reduce(np.add, (k**2 for k in folded))
        return np.asarray((1.0 + square) ** (-self.exponent / 2.0)) / self._mean

    @functools.cached_property
    def _mean(self) -> float:
        axes = np.meshgrid(*(np.fft.fftfreq(side) * side for side in self.shape), indexing="ij", sparse=True)
        square = functools.reduce(np.add, (k**2 for k in axes))
        return float(np.mean((1.0 + square) ** (-self.exponent / 2.0)))


@dataclass(frozen=True, eq=False)
class Blocks:
    """The frequencies of a field, in groups that no averaging over areas of up to `cell` x `cell` latents mixes.

    Attributes:
        cell: Largest factor that stages pool by.
        power: (Q, n) power of the clean field, n = cell^2 frequencies a block.
        count: (Q,) how many blocks behave like this one.
        rows, columns: (Q, n) frequency along the last two axes, in [0, side).
        sides: Latents along the last two axes.
    """

    cell: int
    power: Array
    count: Array
    rows: Array
    columns: Array
    sides: tuple[int, int]

    @property
    def total(self) -> float:
        """Sum of the power over all frequencies: the number of latents, for a field of unit variance."""
        return float((self.count[:, None] * self.power).sum())


def make_blocks(field: Field, cell: int) -> Blocks:
    """Returns the blocks of a field for factors that divide `cell`; blocks that mirror each other are counted once.

    Raises:
        ValueError: Where a side is no multiple of `cell`.
    """
    height, width = field.shape[-2:]
    if height % cell or width % cell:
        raise ValueError(f"make_blocks: cell must divide the sides, got {cell} for {height}x{width}; use another size")
    axes = [*field.shape[:-2], height // cell, width // cell]
    kept = [np.arange(count // 2 + 1, dtype=np.float64) for count in axes]
    counts = [np.where((k == 0) | (2 * k == count), 1.0, 2.0) for k, count in zip(kept, axes, strict=True)]
    bases = [grid.ravel()[:, None] for grid in np.meshgrid(*kept, indexing="ij")]
    count = functools.reduce(np.multiply, np.meshgrid(*counts, indexing="ij")).ravel()
    row, column = (grid.ravel() for grid in np.meshgrid(np.arange(cell), np.arange(cell), indexing="ij"))
    rows, columns = bases[-2] + row * (height // cell), bases[-1] + column * (width // cell)
    leading = [np.broadcast_to(base, rows.shape) for base in bases[:-2]]
    return Blocks(cell, field.power(*leading, rows, columns), count, rows, columns, (height, width))


@dataclass(frozen=True, eq=False)
class Pooling:
    """What averaging over f x f latents does to the blocks of a field, and bringing the result up again.

    Attributes:
        factor: f; 1 leaves everything as it is.
        power: (Q, r) power of the averaged field, in units in which its noise has variance level^2; r = n / f^2.
        coupling: (Q, r) gain of bringing up and averaging again.
        down: (Q, r, n) gains of averaging; rows have norm 1.
        up: (Q, n, r) gains of bilinear interpolation.
    """

    factor: int
    power: Array
    coupling: Array
    down: Array
    up: Array


def make_pooling(blocks: Blocks, factor: int) -> Pooling:
    """Returns the pooling of a factor that divides `blocks.cell`: arithmetic means, bilinear interpolation."""
    axes = zip((blocks.rows, blocks.columns), blocks.sides, strict=True)
    downs, ups, coarse = zip(*(_axis(k, side, factor) for k, side in axes), strict=True)
    gain_down, gain_up = downs[0] * downs[1], ups[0] * ups[1]
    # Frequencies of the block with equal coarse frequencies on both axes share a row.
    key = coarse[0] * (blocks.sides[1] // factor) + coarse[1]
    order = np.sort(key, axis=1)[:, :: factor**2]
    member = np.asarray(key[:, None, :] == order[:, :, None], dtype=np.float64)
    down = member * gain_down[:, None, :]
    up = np.swapaxes(member * gain_up[:, None, :], 1, 2)
    return Pooling(
        factor=factor,
        power=(down**2 * blocks.power[:, None, :]).sum(axis=2),
        coupling=(down * np.swapaxes(up, 1, 2)).sum(axis=2),
        down=down,
        up=up,
    )


def _axis(frequency: Array, side: int, factor: int) -> tuple[Array, Array, Array]:
    """Returns the gains down and up along an axis, and the frequency of the smaller picture that they lead to."""
    coarse_side = side // factor
    alias, coarse = np.divmod(frequency, coarse_side)
    sign = np.where(alias % 2 == 0, 1.0, -1.0)
    angle = math.pi * frequency / side
    offsets = np.arange(factor) - (factor - 1) / 2.0
    down = np.cos(2.0 * angle[..., None] * offsets).mean(axis=-1)
    # Triangle of half width f around the middle of an area, at the latents' middles.
    places = np.arange(2 * factor) - (2 * factor - 1) / 2.0 if factor > 1 else np.zeros(1)
    heights = np.maximum(1.0 - np.abs(places) / factor, 0.0)
    up = (heights * np.cos(2.0 * angle[..., None] * places)).sum(axis=-1) / factor
    return sign * down, sign * up, coarse
