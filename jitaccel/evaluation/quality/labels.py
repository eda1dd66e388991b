"""Places the labels of points so that they overlap neither each other nor the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CLEAR_PX, _ANGLES = (8, 13, 20, 30, 42, 56, 72, 90, 112, 136, 164), 16
_FROM_RIGHT = tuple(2 * math.pi * k / _ANGLES for k in sorted(range(_ANGLES), key=lambda k: min(k, _ANGLES - k)))


class Box(NamedTuple):
    """A rectangle, in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def shared_px(self, other: Box) -> float:
        """Returns the area of the intersection of two boxes, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def holds(self, other: Box) -> bool:
        """Whether another box lies inside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """Returns the point of the box nearest to `point`."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.top), self.bottom)

    @property
    def middle(self) -> tuple[float, float]:
        """The centre of the box."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Returns a box for the label of each point, near the point and inside the bounds.

    Points with the most neighbours are placed first. Each gets the nearest place that overlaps no earlier label and
    covers as little as possible of the obstacles. If there is no such place, the overlap with labels is minimised.
    """
    crowd = [sum(math.dist(point, other) < 60 for other in points) for point in points]
    placed: dict[int, Box] = {}
    for index in sorted(range(len(points)), key=lambda k: (-crowd[k], points[k])):
        boxes = _candidates(points[index], sizes[index])
        boxes = [box for box in boxes if bounds.holds(box)] or boxes
        price = 1e6 * _covered(boxes, [*placed.values()]) + 3.0 * _covered(boxes, obstacles)
        price += [1.5 * math.dist(box.middle, points[index]) for box in boxes]
        placed[index] = boxes[int(np.argmin(price))]
    return [placed[index] for index in range(len(points))]


def _covered(boxes: Sequence[Box], things: Sequence[Box]) -> NDArray[Any]:
    """Returns the area of `things` that each box covers, (boxes,)."""
    one, other = np.array(boxes)[:, None], np.array(things).reshape(1, -1, 4)
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    area: NDArray[Any] = np.maximum(sides, 0.0).prod(axis=-1).sum(axis=1)
    return area


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> list[Box]:
    width, height = size
    boxes = []
    for clear in _CLEAR_PX:
        for angle in _FROM_RIGHT:
            x = point[0] + math.cos(angle) * (clear + width / 2)
            y = point[1] - math.sin(angle) * (clear + height / 2)
            boxes.append(Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return boxes
