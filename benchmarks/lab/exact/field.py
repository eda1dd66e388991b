"""Gaussian random fields of known spectrum, and the aliasing blocks on which averages over areas act.

A stage that averages areas of f x f latents only mixes frequencies that differ by multiples of side / f. Along an
axis, with the basis `exp(2 pi i k (x + 1/2) / side)`, the mean over an area maps `k = q + m side / f` to the frequency
q of the smaller picture, with the real gain `(-1)^m sin(pi f k / side) / (f sin(pi k / side))`. The offset of half a
sample in the basis makes the areas symmetric, so all gains are real, and frequencies q and -q behave alike.
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
        exponent: Decay of the power with frequency; 2 to 2.6 for natural pictures.
    """

    shape: tuple[int, ...]
    exponent: float

    def power(self, *frequencies: Array) -> Array:
        """Returns the power at frequencies in cycles per picture, with one array for each axis, 0 <= k < side."""
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
    """The frequencies of a field in blocks that are not mixed by averaging over areas of up to `cell` x `cell` latents.

    Within a block, frequencies that are mixed by a smaller power of two are neighbours.

    Attributes:
        cell: The largest pooling factor, a power of two.
        power: (Q, n), power of the clean field, with n = cell^2 frequencies in a block.
        count: (Q,), number of blocks that behave like this one.
        rows, columns: (Q, n), frequency along the last two axes, in [0, side).
        sides: Numbers of latents along the last two axes.
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
    """Returns the blocks of a field for factors that divide `cell`; blocks that mirror each other are merged.

    Raises:
        ValueError: If `cell` is not a power of two, or a side is not a multiple of it.
    """
    height, width = field.shape[-2:]
    if cell < 1 or cell & (cell - 1) or height % cell or width % cell:
        raise ValueError(f"make_blocks: cell must be a power of two that divides {height}x{width}, got {cell}")
    axes = [*field.shape[:-2], height // cell, width // cell]
    kept = [np.arange(count // 2 + 1, dtype=np.float64) for count in axes]
    counts = [np.where((k == 0) | (2 * k == count), 1.0, 2.0) for k, count in zip(kept, axes, strict=True)]
    bases = [grid.ravel()[:, None] for grid in np.meshgrid(*kept, indexing="ij")]
    count = functools.reduce(np.multiply, np.meshgrid(*counts, indexing="ij")).ravel()
    if height == width:  # rows and columns are interchangeable
        above, below = bases[-2] < bases[-1], bases[-2] > bases[-1]
        count = count * (1.0 + above[:, 0])
        bases, count = [base[~below[:, 0]] for base in bases], count[~below[:, 0]]
    row, column = _aliases(cell)
    rows, columns = bases[-2] + row * (height // cell), bases[-1] + column * (width // cell)
    leading = [np.broadcast_to(base, rows.shape) for base in bases[:-2]]
    return Blocks(cell, field.power(*leading, rows, columns), count, rows, columns, (height, width))


def _aliases(cell: int) -> tuple[Array, Array]:
    """Returns the multiples of side / cell that form a block's frequencies, (n,) for rows and for columns.

    Averaging by f mixes those that are equal modulo cell / f on both axes; these are adjacent.
    """
    row, column = (grid.ravel() for grid in np.meshgrid(np.arange(cell), np.arange(cell), indexing="ij"))
    moduli = [2**k for k in range(cell.bit_length())]  # the last distinguishes all, and sorts last
    keys = [each % modulus for modulus in reversed(moduli) for each in (column, row)]
    order = np.lexsort(keys)
    return row[order].astype(np.float64), column[order].astype(np.float64)


@dataclass(frozen=True, eq=False)
class Pooling:
    """The effect on a field's blocks of averaging over f x f latents and of interpolating the result.

    Attributes:
        factor: f; 1 changes nothing.
        power: (Q, r), power of the averaged field, in units in which its noise has variance level^2; r = n / f^2.
        coupling: (Q, r), gain of interpolating and averaging again.
        down: (Q, n), gains of averaging; the squares of each f^2 neighbours sum to 1.
        up: (Q, n), gains of bilinear interpolation.
    """

    factor: int
    power: Array
    coupling: Array
    down: Array
    up: Array

    def averaged(self, state: Array) -> Array:
        """Returns the averages (Q, r, m) of a state (Q, n, m)."""
        if self.factor == 1:
            return state
        blocks, size, width = state.shape
        grouped = (blocks, size // self.factor**2, self.factor**2)
        return (self.down.reshape(*grouped)[:, :, None] @ state.reshape(*grouped, width))[:, :, 0]

    def brought_up(self, averages: Array) -> Array:
        """Returns averages (Q, r, m) interpolated to all latents, (Q, n, m)."""
        if self.factor == 1:
            return averages
        blocks, size, width = averages.shape
        up = self.up.reshape(blocks, size, self.factor**2, 1)
        return (up * averages[:, :, None]).reshape(blocks, -1, width)


def make_pooling(blocks: Blocks, factor: int) -> Pooling:
    """Returns the pooling by a factor that divides `blocks.cell`, with arithmetic means and bilinear interpolation."""
    axes = zip((blocks.rows, blocks.columns), blocks.sides, strict=True)
    (down_rows, up_rows), (down_columns, up_columns) = (_gains(k, side, factor) for k, side in axes)
    down, up = down_rows * down_columns, up_rows * up_columns
    power, coupling = _summed(down**2 * blocks.power, factor), _summed(down * up, factor)
    return Pooling(factor=factor, power=power, coupling=coupling, down=down, up=up)


def _gains(frequency: Array, side: int, factor: int) -> tuple[Array, Array]:
    """Returns the gains of averaging and of interpolation along an axis."""
    sign = np.where(frequency // (side // factor) % 2 == 0, 1.0, -1.0)
    phase = 2.0 * math.pi * frequency[..., None] / side
    down = np.cos(phase * (np.arange(factor) - (factor - 1) / 2.0)).mean(axis=-1)
    # Triangle of half width f around the centre of an area, sampled at the centres of latents.
    places = np.arange(2 * factor) - (2 * factor - 1) / 2.0 if factor > 1 else np.zeros(1)
    up = ((1.0 - np.abs(places) / factor) * np.cos(phase * places)).sum(axis=-1) / factor
    return sign * down, sign * up


def _summed(values: Array, factor: int) -> Array:
    """Returns the sums over groups of factor^2 neighbours along axis 1."""
    return np.asarray(values.reshape(len(values), -1, factor**2).sum(axis=2))
