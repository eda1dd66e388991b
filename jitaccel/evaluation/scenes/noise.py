"""Smooth random fields that are the same at every size of the picture."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
REACH = 1.5  # fields are known for x in [-REACH, REACH], y in [0, 1]; lengths are in heights of the picture
_SPLINE_STD = 0.479  # of white noise between the points of a cubic spline, for each axis: its variance


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
    """Returns fractal noise of mean 0 and deviation 1, `(len(y), len(x))`.

    Octaves too fine for the pixels are left out, so that a small picture shows what a large one does, shrunk. The
    generator advances by the same amount whatever the size.

    Args:
        rng: Source of the values.
        x: Places of the columns, in [-REACH, REACH].
        y: Places of the rows, in [0, 1].
        wavelength: Distance of the points of the first octave.
        octaves: How many, each of half the wavelength.
        stretch: How much longer the points' distance is along x.
        gain: Amplitude of an octave relative to the one before.
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
    """Returns fractal noise along x, of mean 0 and deviation about 1; straight between its points unless `smooth`."""
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
    """Returns the weights `(len(places), count)` of a cubic spline's points, the first of them at `-step`."""
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
