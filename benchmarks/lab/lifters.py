"""Linear maps from the anchors to every token: (anchors (M,), grid) -> weights (N, M) float32, each row of sum 1."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage, spatial  # type: ignore[import-untyped]
from torch import Tensor

Lifter = Callable[[Tensor, tuple[int, ...]], Tensor]


def places(indices: Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """Returns row and column of raster indices (n,), as (n, 2) float64."""
    return np.stack(np.unravel_index(indices.numpy(), grid), axis=1).astype(np.float64)


def nearest(anchors: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Returns the weights of the nearest anchor; the lowest raster index wins ties."""
    squared = _squared_distances(anchors, grid)
    return torch.nn.functional.one_hot(torch.from_numpy(squared.argmin(axis=1)), len(anchors)).float()


def blurred(anchors: Tensor, grid: tuple[int, ...], sigma: float = 1.0) -> Tensor:
    """Returns the paper's lifter: nearest fill, then a Gaussian blur of `sigma` tokens with reflect padding."""
    filled = nearest(anchors, grid).numpy().reshape(*grid, len(anchors))
    blur = functools.partial(ndimage.gaussian_filter1d, sigma=sigma, mode="mirror", radius=int(np.ceil(3 * sigma)))
    return torch.from_numpy(blur(blur(filled, axis=0), axis=1).reshape(-1, len(anchors)))


def weighted(anchors: Tensor, grid: tuple[int, ...], sigma: float = 1.0) -> Tensor:
    """Returns a Gaussian-weighted mean over the anchors themselves (Nadaraya-Watson), `sigma` in tokens."""
    squared = _squared_distances(anchors, grid)
    exponent = -0.5 * (squared - squared.min(axis=1, keepdims=True)) / sigma**2
    weights = np.exp(exponent)
    return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def linear(anchors: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Returns barycentric weights in each token's Delaunay triangle; the nearest anchor outside of all triangles."""
    where = places(torch.arange(grid[0] * grid[1]), grid)
    triangles = spatial.Delaunay(places(anchors, grid))
    found = triangles.find_simplex(where)
    weights = nearest(anchors, grid).numpy()
    inside = np.flatnonzero(found >= 0)
    transform = triangles.transform[found[inside]]
    first = np.einsum("nij,nj->ni", transform[:, :2], where[inside] - transform[:, 2])
    corners = triangles.simplices[found[inside]]
    weights[inside] = 0.0
    weights[inside[:, None], corners] = np.concatenate([first, 1.0 - first.sum(axis=1, keepdims=True)], axis=1)
    return torch.from_numpy(weights)


def _squared_distances(anchors: Tensor, grid: tuple[int, ...]) -> np.ndarray:
    tokens = places(torch.arange(grid[0] * grid[1]), grid)
    difference = tokens[:, None] - places(anchors, grid)[None]
    return np.asarray((difference**2).sum(axis=2))
