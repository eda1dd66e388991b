"""Smooth random fields that are the same at every size of the picture."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
REACH = 1.5  # fields are known for x in [-REACH, REACH], y in [0, 1]; lengths are in heights of the picture
_SPLINE_STD = 0.479  # standard deviation of a 2-D cubic spline through white noise: the variance along one axis


def field(
    rng: np.random.Generator,
    x: Field,
    y: Field,
    wavelength: float,
    *,
    octaves: int = 4,
    stretch: float = 1.0,
    gain: float = 0.5,
) -> Field:
    """Returns fractal noise of mean 0 and standard deviation 1, `(len(y), len(x))`.

    Octaves too fine for the pixels are left out, so a small picture is a large one reduced. The generator advances by
    the same amount whatever the size.

    Args:
        rng: Random generator.
        x: Positions of the columns, in [-REACH, REACH].
        y: Positions of the rows, in [0, 1].
        wavelength: Spacing of the points of the first octave.
        octaves: Number of octaves, each with half the wavelength of the previous one.
        stretch: Factor by which the spacing is larger along x.
        gain: Amplitude of an octave relative to the previous one.
    """
    pixel = min(abs(float(axis[-1] - axis[0])) / (len(axis) - 1) for axis in (x, y) if len(axis) > 1)
    total: Field = np.zeros((len(y), len(x)), np.float32)
    for octave in range(octaves):
        step = wavelength * 0.5**octave
        rows, columns = math.ceil(1 / step) + 4, math.ceil(2 * REACH / (step * stretch)) + 4
        values = rng.standard_normal((rows, columns), np.float32)
        visible = min(1.0, max(0.0, step / pixel - 1.0))
        if visible > 0:
            down = _weights(y, step, rows)
            across = _weights(x + np.float32(REACH), step * stretch, columns)
            total += np.float32(visible * gain**octave / _SPLINE_STD) * (down @ values @ across.T)
    return total / np.float32(math.sqrt(sum(gain ** (2 * octave) for octave in range(octaves))))


def line(rng: np.random.Generator, x: Field, wavelength: float, *, octaves: int, gain: float, smooth: bool) -> Field:
    """Returns fractal noise along x, of mean 0 and standard deviation about 1; piecewise linear unless `smooth`."""
    total: Field = np.zeros(len(x), np.float32)
    for octave in range(octaves):
        step = wavelength * 0.5**octave
        count = math.ceil(2 * REACH / step) + 4
        values = rng.standard_normal(count).astype(np.float32)
        if smooth:
            total += gain**octave * 1.45 * (_weights(x + np.float32(REACH), step, count) @ values)
        else:
            total += gain**octave * np.interp((x + REACH) / step, np.arange(count), values).astype(np.float32)
    return total / np.float32(math.sqrt(sum(gain ** (2 * octave) for octave in range(octaves))))


def _weights(places: Field, step: float, count: int) -> Field:
    """Returns the weights `(len(places), count)` of a cubic spline's points, the first of which is at `-step`."""
    return _cached_weights(np.ascontiguousarray(places, np.float32).tobytes(), step, count)


@functools.lru_cache(maxsize=256)
def _cached_weights(places: bytes, step: float, count: int) -> Field:
    at = np.frombuffer(places, np.float32) / np.float32(step)
    first = np.clip(np.floor(at).astype(int), 0, count - 4)
    t = np.clip(at - first, 0, 1)
    weights: Field = np.zeros((len(at), count), np.float32)
    rows = np.arange(len(at))
    parts = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for k, part in enumerate(parts):
        weights[rows, first + k] = part / 6
    return weights
