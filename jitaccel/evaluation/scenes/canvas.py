"""A canvas on which layers are painted from back to front, anti-aliased."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .noise import Field

REGIONS = ("sky", "cloud", "light", "mountains", "water", "ground", "plants", "thing")
Paint = Sequence[float] | NDArray[np.floating]


class Canvas:
    """Pixels `(height, width, 3)` in [0, 1]. Lengths are in heights; x is 0 in the middle, y is 0 at the top."""

    def __init__(self, width: int, height: int, with_regions: bool = False) -> None:
        self.pixel = 1.0 / height
        self.y: Field = ((np.arange(height) + 0.5) / height).astype(np.float32)
        self.x: Field = ((np.arange(width) + 0.5 - width / 2) / height).astype(np.float32)
        self.aspect = width / height
        self.pixels: NDArray[np.float32] = np.zeros((height, width, 3), np.float32)
        self.regions = np.zeros((len(REGIONS), height, width), np.float32) if with_regions else None

    def rows(self, top: float, bottom: float) -> slice:
        """Returns the rows between `top` and `bottom`, including partial ones."""
        count = len(self.y)
        first = min(count - 1, max(0, int(top * count)))
        return slice(first, min(count, max(first + 1, int(np.ceil(bottom * count)) + 1)))

    def columns(self, left: float, right: float) -> slice:
        """Returns the columns between `left` and `right`, including partial ones."""
        count = len(self.x)
        first = min(count - 1, max(0, int((left + self.aspect / 2) / self.pixel)))
        return slice(first, min(count, max(first + 1, int(np.ceil((right + self.aspect / 2) / self.pixel)) + 1)))

    def column_of(self, fraction: float) -> float:
        """Returns x at a fraction of the width."""
        return (fraction - 0.5) * self.aspect

    def paint(
        self,
        region: str,
        alpha: Field,
        colour: Paint,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> None:
        """Paints one colour, or a colour per pixel, over a box of the picture with coverage `alpha` in [0, 1]."""
        box = self.pixels[rows, columns]
        box += alpha[..., None] * (np.asarray(colour, np.float32) - box)
        if self.regions is not None:
            self.regions[:, rows, columns] *= 1 - alpha
            self.regions[REGIONS.index(region), rows, columns] += alpha

    def polygon(self, region: str, corners: Sequence[tuple[float, float]], colour: Paint) -> None:
        """Paints a convex polygon; corners `(x, y)` are clockwise on the screen."""
        left, right = min(x for x, _ in corners), max(x for x, _ in corners)
        top, bottom = min(y for _, y in corners), max(y for _, y in corners)
        if right < self.x[0] or left > self.x[-1] or bottom < 0 or top > 1:
            return
        rows, columns = self.rows(top - self.pixel, bottom), self.columns(left - self.pixel, right)
        x, y = self.x[columns][None, :], self.y[rows][:, None]
        inside = np.full((y.shape[0], x.shape[1]), np.inf, np.float32)
        for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
            length = float(np.hypot(bx - ax, by - ay))
            if length > 0:
                inside = np.minimum(inside, ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / length)
        self.paint(region, np.clip(inside / self.pixel + 0.5, 0, 1), colour, rows, columns)

    def ellipse(self, region: str, cx: float, cy: float, rx: float, ry: float, colour: Paint) -> None:
        """Paints an ellipse."""
        rows, columns = self.rows(cy - ry - self.pixel, cy + ry), self.columns(cx - rx - self.pixel, cx + rx)
        x, y = self.x[columns][None, :] - cx, self.y[rows][:, None] - cy
        radius = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
        smaller = min(rx, ry)
        alpha = np.clip((1 - radius) * smaller / self.pixel + 0.5, 0, 1) * min(1.0, (2 * smaller / self.pixel) ** 2)
        self.paint(region, alpha.astype(np.float32), colour, rows, columns)


def smooth_step(low: float, high: float, values: NDArray[np.floating]) -> Field:
    """Returns 0 below `low`, 1 above `high` and a smooth rise between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def mix(first: Paint, second: Paint, share: NDArray[np.floating] | float) -> NDArray[np.float32]:
    """Returns the two colours mixed, with `share` of the second, for each value of `share`."""
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return (a + np.asarray(share, np.float32)[..., None] * (b - a)).astype(np.float32)
