"""Draws a scene as an anti-aliased picture. Signed distances are in canvas units, negative inside."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .scene import BACKGROUNDS, COLOURS, Scene, Thing

Field = NDArray[np.floating]
TEXTURE_PERIOD_PX = 13.0


def draw(scene: Scene, size: int = 256) -> Field:
    """Returns the picture `(size, size, 3)`, float32 in [0, 1]. Textures keep their period in pixels at every size."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    slope = (x - 0.5) * math.cos(scene.light) + (y - 0.5) * math.sin(scene.light)
    picture = np.asarray(BACKGROUNDS[scene.background], np.float32) * (1 + 0.45 * slope)[..., None]
    for thing in scene.things:
        box = _box(thing, size)
        picture[box] = _paint(thing, picture[box], x[box], y[box], size)
    return np.clip(picture, 0.0, 1.0).astype(np.float32)


def cover(thing: Thing, size: int) -> NDArray[np.bool_]:
    """Returns which pixels `(size, size)` the thing covers."""
    return cover_local(thing, size)[0]


def cover_local(thing: Thing, size: int) -> tuple[NDArray[np.bool_], Field, Field]:
    """Returns `cover`, and where each pixel lies: right and down of the thing's middle, in radii, turned with it."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = _local(thing, *np.meshgrid(axis, axis))
    return _distance(thing.shape, u, v) < 0, u, v


def _box(thing: Thing, size: int) -> tuple[slice, slice]:
    reach = 1.05 * thing.radius
    low_y, high_y = int((thing.y - reach) * size), math.ceil((thing.y + reach) * size) + 1
    low_x, high_x = int((thing.x - reach) * size), math.ceil((thing.x + reach) * size) + 1
    return slice(max(low_y, 0), high_y), slice(max(low_x, 0), high_x)


def _local(thing: Thing, x: Field, y: Field) -> tuple[Field, Field]:
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    dx, dy = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    return cos * dx + sin * dy, cos * dy - sin * dx


def _paint(thing: Thing, below: Field, x: Field, y: Field, size: int) -> Field:
    u, v = _local(thing, x, y)
    pixel = 1.0 / (size * thing.radius)
    coverage = np.clip(0.5 - _distance(thing.shape, u, v) / pixel, 0, 1)[..., None]
    bright = np.asarray(COLOURS[thing.colour], np.float32)
    dark = 0.25 * bright
    ink = _texture(thing, u, v, size)[..., None]
    light = (1.0 - 0.12 * (x - thing.x + y - thing.y) / thing.radius)[..., None]
    colour = (bright * (1 - ink) + dark * ink) * light
    return (below * (1 - coverage) + colour * coverage).astype(np.float32)


def _texture(thing: Thing, u: Field, v: Field, size: int) -> Field:
    """Returns how much of the second, dark colour covers each pixel, in [0, 1]."""
    if thing.texture == "plain":
        return np.zeros_like(u)
    periods = size * thing.radius / TEXTURE_PERIOD_PX  # per unit of u
    edge = 2.0 * math.pi / TEXTURE_PERIOD_PX  # change of the sine over one pixel where it crosses zero
    a = np.sin(2 * math.pi * (periods * u + thing.phase))
    if thing.texture == "striped":
        return np.clip(0.5 + a / edge, 0, 1)
    if thing.texture == "checkered":
        a = np.sin(math.pi * (1.3 * periods * u + thing.phase))
        b = np.sin(math.pi * (1.3 * periods * v + thing.phase))
        return np.clip(0.5 + a * b / (0.65 * edge), 0, 1)
    du = (periods * u + thing.phase) % 1 - 0.5
    dv = (periods * v + thing.phase) % 1 - 0.5
    return np.clip(0.5 + (0.30 - np.hypot(du, dv)) * TEXTURE_PERIOD_PX, 0, 1)


def _distance(shape: str, u: Field, v: Field) -> Field:
    """Returns the signed distance to the outline of a shape of radius 1 (a bound where the exact one costs more)."""
    radius = np.hypot(u, v)
    if shape == "circle":
        return radius - 0.95
    if shape == "ring":
        return np.abs(radius - 0.72) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.80
    if shape == "triangle":
        return _polygon(u, v, corners=3, inner=0.5) * 0.98
    return _star(u, v)


def _polygon(u: Field, v: Field, corners: int, inner: float) -> Field:
    angle = np.arctan2(u, -v)
    step = 2 * math.pi / corners
    folded = (angle + step / 2) % step - step / 2
    return np.hypot(u, v) * np.cos(np.abs(folded) - step / 2) - inner


def _star(u: Field, v: Field, points: int = 5, inner: float = 0.45) -> Field:
    step = 2 * math.pi / points
    angle = np.abs((np.arctan2(u, -v) + step / 2) % step - step / 2)
    px, py = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip, dent = (1.0, 0.0), (inner * math.cos(step / 2), inner * math.sin(step / 2))
    ex, ey = dent[0] - tip[0], dent[1] - tip[1]
    return ((px - tip[0]) * ey - (py - tip[1]) * ex) / math.hypot(ex, ey)
