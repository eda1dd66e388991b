"""Metrics of pictures (H, W, 3) in [0, 1], and of a network's features of them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from .statistics import Array

_SIGMA, _C1, _C2 = 1.5, 0.01**2, 0.03**2  # constants of SSIM
_TINY = 1e-12


def psnr_db(picture: Array, reference: Array) -> float:
    """Returns the peak signal-to-noise ratio of pictures in [0, 1]; infinite if they are equal."""
    error = float(np.mean((np.asarray(picture, np.float64) - np.asarray(reference, np.float64)) ** 2))
    return float("inf") if error == 0 else -10.0 * float(np.log10(error))


def ssim(picture: Array, reference: Array) -> float:
    """Returns the structural similarity of two pictures, 1 if they are equal (Wang et al. 2004).

    Mean over pixels and colours; Gaussian windows of standard deviation 1.5 pixels, population variances.
    """
    x, y = (np.asarray(each, np.float64) for each in (picture, reference))

    def blur(values: Array) -> Array:
        blurred: Array = ndimage.gaussian_filter(values, (_SIGMA, _SIGMA, 0.0), truncate=3.5)
        return blurred

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float(np.mean(similarity / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))))


def spectrum_error_db(picture: Array, reference: Array) -> float:
    """Returns the difference in the power of fine detail in dB: the mean over frequency rings above half Nyquist.

    Positive if the picture has more detail than the reference, negative if it is smoother.
    """
    powers = [_ring_powers(np.asarray(each, np.float64).mean(axis=2)) for each in (picture, reference)]
    rings = slice(len(powers[0]) // 2, None)
    ratio = (powers[0][rings] + _TINY) / (powers[1][rings] + _TINY)
    return float(np.mean(10.0 * np.log10(ratio)))


def _ring_powers(luminance: Array) -> Array:
    """Returns the mean power of each ring of frequencies, from the lowest to the Nyquist frequency."""
    height, width = luminance.shape
    power = np.abs(np.fft.fft2(luminance - luminance.mean())) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * min(height, width)
    ring = np.minimum(radius.round().astype(int), min(height, width) // 2 + 1)
    sums, counts = np.bincount(ring.ravel(), power.ravel()), np.bincount(ring.ravel())
    return (sums / np.maximum(counts, 1))[1 : min(height, width) // 2 + 1]


def seam_ratio(picture: Array, stages: Array) -> float:
    """Returns the mean pixel step at borders between tokens of different stages, relative to that within a stage.

    1 if stages leave no trace, more if they are visible. The step is the absolute difference of the pixels on both
    sides. 1 if all tokens have the same stage.

    stages: (grid_h, grid_w), the stage in which each token was activated.
    """
    pixels = np.asarray(picture, np.float64)
    cell_h, cell_w = pixels.shape[0] // stages.shape[0], pixels.shape[1] // stages.shape[1]
    across: list[Array] = []
    is_seam: list[Array] = []
    for axis, cell in ((0, cell_h), (1, cell_w)):
        turned, grid = (np.swapaxes(each, 0, axis) for each in (pixels, stages))
        other = turned.shape[1] // grid.shape[1]
        step = np.abs(np.diff(turned, axis=0)).mean(axis=2)[cell - 1 :: cell][: grid.shape[0] - 1]
        across.append(step.reshape(len(step), -1, other).mean(axis=2).ravel())
        is_seam.append((grid[1:] != grid[:-1]).ravel())
    steps, seams = np.concatenate(across), np.concatenate(is_seam)
    if seams.all() or not seams.any():
        return 1.0
    return float((steps[seams].mean() + _TINY) / (steps[~seams].mean() + _TINY))


def perceptual_distance(features: Array, reference: Array) -> float:
    """Returns the distance of two feature maps (C, h, w), in [0, 2], 0 if equal; similar to LPIPS (Zhang et al. 2018).

    The squared distance of the channels at each place, normalised to length 1, averaged over places; no learnt weights.
    """
    unit = [each / (np.linalg.norm(each, axis=0, keepdims=True) + _TINY) for each in (features, reference)]
    return float(np.mean(((unit[0] - unit[1]) ** 2).sum(axis=0)) / 2.0)


def frechet_distance(features: Array, reference: Array) -> float:
    """Returns the squared Frechet distance of two normal distributions fitted to features (n, F) and (m, F).

    As in Heusel et al. 2017, but for any features; 0 if they are equal. n and m must be at least 2.
    """
    if len(features) < 2 or len(reference) < 2:
        raise ValueError(
            f"frechet_distance: needs 2 pictures or more, got {len(features)} and {len(reference)}; add some"
        )
    means = [each.mean(axis=0) for each in (features, reference)]
    # For centred features x, y: traces of the covariances, and the singular values of x y^T for the root of their
    # product. The triangular factors of the QR decompositions give the same, and are small if there are many pictures.
    both = zip((features, reference), means, strict=True)
    x, y = (_triangle((each - mean) / np.sqrt(len(each) - 1)) for each, mean in both)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = ((means[0] - means[1]) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2.0 * root
    return float(max(distance, 0.0))


def _triangle(x: Array) -> Array:
    return np.asarray(np.linalg.qr(x, mode="r"))
