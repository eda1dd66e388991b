"""The optimal network on a subset of many tokens, from normal equations solved with preconditioned conjugate gradients.

The covariance of a periodic field is a multiplication between two Fourier transforms, also when restricted to the
anchors. Nothing larger than the picture is therefore stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import fft  # type: ignore[import-untyped]

from .field import Array

_MOST = 1000  # limit of iterations; a few dozen are usual


def posterior_mean(
    seen: Array, places: NDArray[np.int64], power: Array, level: float, tolerance: float = 1e-9
) -> Array:
    """Returns the conditional mean of clean latents given noisy ones, at the same places, (K, n).

    Args:
        seen: Noisy latents `(1 - level) x + level e`, (K, n).
        places: Their raster indices in the picture, (n,).
        power: Power of the field at the frequencies of the whole picture, (h, w).
        level: Noise level in (0, 1].
        tolerance: Limit of each residual, relative to the norm of `seen`.

    Raises:
        RuntimeError: If it does not converge.
    """
    signal = 1.0 - level
    covariance = _at(places, power)
    noisy = _at(places, signal**2 * power + level**2)
    nearly_inverse = _at(places, 1.0 / (signal**2 * power + level**2))
    return signal * covariance(solve(noisy, nearly_inverse, seen, tolerance))


def solve(
    matrix: Callable[[Array], Array], nearly_inverse: Callable[[Array], Array], right: Array, tolerance: float
) -> Array:
    """Returns x with `matrix(x) = right`, (K, n), for each of K right sides.

    Args:
        matrix: A symmetric and positive map.
        nearly_inverse: The preconditioner, also symmetric and positive; a better inverse needs fewer iterations.
        right: Right sides, (K, n).
        tolerance: Limit of each residual, relative to the norm of its right side.

    Raises:
        RuntimeError: If it does not converge.
    """
    found, residual = np.zeros_like(right), right
    direction = ready = nearly_inverse(residual)
    product = _dot(residual, ready)
    limit = tolerance**2 * _dot(right, right)
    for _ in range(_MOST):
        if (_dot(residual, residual) <= limit).all():
            return found
        image = matrix(direction)
        length = product / np.maximum(_dot(direction, image), np.finfo(np.float64).tiny)
        found, residual = found + length * direction, residual - length * image
        ready = nearly_inverse(residual)
        before, product = product, _dot(residual, ready)
        direction = ready + product / np.maximum(before, np.finfo(np.float64).tiny) * direction
    raise RuntimeError(f"solve: residuals must fall below {tolerance:g} within {_MOST} steps, and did not")


def _dot(left: Array, right: Array) -> Array:
    return np.asarray(np.einsum("kn, kn -> k", left, right)[:, None])


def _at(places: NDArray[np.int64], gain: Array) -> Callable[[Array], Array]:
    """Returns a map (K, n) -> (K, n) that multiplies frequencies by `gain` (h, w), restricted to some places."""
    height, width = gain.shape
    half = gain[:, : width // 2 + 1]

    def apply(values: Array) -> Array:
        pictures = np.zeros((len(values), height * width))
        pictures[:, places] = values
        spectra = fft.rfft2(pictures.reshape(-1, height, width))
        filtered = fft.irfft2(spectra * half, s=(height, width))
        return np.asarray(filtered.reshape(len(values), -1)[:, places])

    return apply
