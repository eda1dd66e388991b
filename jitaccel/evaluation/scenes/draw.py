"""Draws a landscape at any size: sky, mountains and water here, the foreground and objects in `foreground`.

Only the finest octaves of noise depend on the size, so a small picture is the large one reduced.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, mix, smooth_step
from .foreground import paint_ground, paint_thing
from .noise import Field, field, line
from .palette import CLOUDS, LAND_LIGHT, LIGHT_COLOURS, MOUNTAIN_COLOURS, SKY_COLOURS, WATER_COLOURS
from .scene import NONE, PLACES, Landscape

_SNOW, _GOLD = (1.12, 1.16, 1.22), (0.90, 0.60, 0.16)
_CLOUDS_ABOVE, _LEAST_CLOUDY, _LEAST_PUFF = 0.3, 0.15, 0.2  # height, cloudy share of it, density of clouds
_NUM_LAYERS = 7  # each has its own stream of random numbers


def draw(landscape: Landscape, width: int = 256, height: int | None = None) -> NDArray[np.uint8]:
    """Returns the picture `(height, width, 3)`; square without `height`."""
    return finish(_painted(landscape, width, height or width, with_regions=False))


def draw_regions(landscape: Landscape, width: int = 256, height: int | None = None) -> NDArray[np.float32]:
    """Returns the share of each pixel that each of `canvas.REGIONS` covers, `(len(REGIONS), height, width)`."""
    regions = _painted(landscape, width, height or width, with_regions=True).regions
    assert regions is not None
    return regions


def finish(canvas: Canvas) -> NDArray[np.uint8]:
    """Returns the canvas's pixels as bytes."""
    return (np.clip(canvas.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)


def _painted(landscape: Landscape, width: int, height: int, with_regions: bool) -> Canvas:
    if not 0.4 <= width / height <= 2.5:
        raise ValueError(f"draw: width / height must lie in [0.4, 2.5], got {width}x{height}; choose another size")
    canvas = Canvas(width, height, with_regions)
    streams = [np.random.default_rng([landscape.seed, k]) for k in range(_NUM_LAYERS)]
    horizon = 0.60 if landscape.water != NONE else 0.66
    _paint_sky(canvas, landscape, horizon, streams[0])
    _paint_clouds(canvas, landscape, horizon, streams[1])
    for number in range(landscape.ranges):
        _paint_range(canvas, landscape, horizon, landscape.ranges - 1 - number, streams[2 + number])
    shore = horizon
    if landscape.water != NONE:
        shore = horizon + (0.17 if landscape.water == "lake" else 0.20)
        _paint_water(canvas, landscape, horizon, shore, streams[4])
    paint_ground(canvas, landscape, shore, streams[5])
    paint_thing(canvas, landscape, horizon, shore, streams[6])
    return canvas


def _sun(canvas: Canvas, landscape: Landscape, rng: np.random.Generator) -> tuple[float, float, float]:
    """Returns x, y and radius of sun or moon; the height is random, the place is the landscape's."""
    x = canvas.column_of(PLACES[landscape.light_place] + 0.05 * rng.uniform(-1, 1))
    return x, 0.11 + 0.13 * float(rng.random()), 0.048


def _paint_sky(canvas: Canvas, landscape: Landscape, horizon: float, rng: np.random.Generator) -> None:
    zenith, middle, low = SKY_COLOURS[landscape.time]
    down = np.clip(canvas.y / horizon, 0, 1)
    column = np.where(
        down[:, None] < 0.55, mix(zenith, middle, down / 0.55), mix(middle, low, (down - 0.55).clip(0) / 0.45)
    )
    alpha = np.ones((len(canvas.y), len(canvas.x)), np.float32)
    canvas.paint("sky", alpha, np.broadcast_to(column[:, None, :], canvas.pixels.shape))
    if landscape.sky == "starry":
        for x, y, size, shine in rng.random((150, 4)):
            radius = 0.0016 + 0.0028 * size**4
            star = mix(zenith, (1.0, 0.98, 0.92), 0.45 + 0.55 * shine)
            canvas.ellipse("sky", (x - 0.5) * 2.4, 0.95 * y * horizon, radius, radius, star)
    if landscape.light != NONE:
        cx, cy, radius = _sun(canvas, landscape, np.random.default_rng([landscape.seed, 99]))
        colour = LIGHT_COLOURS[landscape.light]
        distance = np.hypot(canvas.x[None, :] - cx, canvas.y[:, None] - cy)
        strength = 0.30 if landscape.time == "night" else 0.60
        wide, near = np.exp(-distance / 0.16), np.exp(-np.maximum(distance - radius, 0) / 0.03)
        glow = strength * (0.6 * wide + 0.4 * near)
        canvas.paint("sky", glow.astype(np.float32), colour)
        disk = np.clip((radius - distance) / canvas.pixel + 0.5, 0, 1).astype(np.float32)
        canvas.paint("light", disk, mix(colour, (1.0, 1.0, 1.0), 0.25 * smooth_step(0.0, radius, radius - distance)))


def _paint_clouds(canvas: Canvas, landscape: Landscape, horizon: float, rng: np.random.Generator) -> None:
    if landscape.sky != "cloudy":
        return
    rows = canvas.rows(0, horizon)
    y = canvas.y[rows]
    puffs = field(rng, canvas.x, y, 0.24, octaves=6, stretch=1.9, gain=0.52)
    seen = puffs[y < _CLOUDS_ABOVE]  # a cloudy sky always has a cloud above the mountains
    puffs = puffs + max(0.0, _LEAST_PUFF - float(np.quantile(seen, 1 - _LEAST_CLOUDY)))
    cover = smooth_step(-0.05, 0.95, puffs + 0.05) * np.clip(1.15 - y / horizon, 0, 1)[:, None] ** 0.5
    if landscape.light != NONE:
        cx, cy, _ = _sun(canvas, landscape, np.random.default_rng([landscape.seed, 99]))
        distance = np.hypot(canvas.x[None, :] - cx, y[:, None] - cy)
        cover = cover * (1 - 0.92 * np.exp(-((distance / 0.085) ** 2)))
    bright, shaded = CLOUDS[landscape.time]
    below = np.vstack([puffs[1:], puffs[-1:]]) - puffs  # clouds are lit from above where they thin out downwards
    lit = np.clip(0.55 - 0.035 * below / canvas.pixel + 0.12 * (1.2 - puffs), 0, 1)
    canvas.paint("cloud", 0.95 * cover, mix(shaded, bright, lit), rows)


def _paint_range(canvas: Canvas, landscape: Landscape, horizon: float, far: int, rng: np.random.Generator) -> None:
    """Paints one range; `far` is the number of ranges in front of it."""
    rounded = landscape.mountains in ("green", "autumn")
    wavelength, gain = (0.42, 0.36) if rounded else (0.30, 0.52)
    profile = line(rng, canvas.x, wavelength, octaves=4 if rounded else 7, gain=gain, smooth=rounded)
    swell = 0.5 + 0.5 * np.tanh(0.75 * profile)
    # The nearer of two ranges is lower, so that both are visible.
    low, high = (0.17, 0.22) if far else (0.05, 0.24 if landscape.ranges == 1 else 0.14)
    top = horizon - low - high * swell
    rows = canvas.rows(float(top.min()) - canvas.pixel, horizon + canvas.pixel)
    y = canvas.y[rows][:, None]
    slope = np.gradient(top) / canvas.pixel
    alpha = np.clip((y - top) / (canvas.pixel * np.sqrt(1 + slope**2)) + 0.5, 0, 1)
    alpha *= y < horizon + canvas.pixel  # water and ground cover the last row
    bumps = field(rng, canvas.x, canvas.y[rows], 0.11, octaves=5, gain=0.55)
    relief: Field = bumps if rounded else (1.2 - 1.6 * np.abs(bumps)).astype(np.float32)
    towards = np.gradient(relief, axis=1) / canvas.pixel
    shade = 0.86 + 0.30 * np.tanh((0.030 if rounded else 0.045) * (towards - 5 * slope)) + 0.05 * relief
    depth = (y - top) / (low + high)
    colour = _mountain_colour(canvas, landscape, rows, 0.50 - depth + 0.13 * relief, rng)
    light = np.asarray(LAND_LIGHT[landscape.time], np.float32)
    colour = colour * shade[..., None] * light
    haze = (0.38 if far else 0.06) + 0.14 * np.clip(depth, 0, 1)
    canvas.paint("mountains", alpha.astype(np.float32), mix(colour, SKY_COLOURS[landscape.time][2], haze), rows)


def _mountain_colour(
    canvas: Canvas, landscape: Landscape, rows: slice, snow: NDArray[np.floating], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Returns the colour of each pixel in daylight; snow lies where `snow` is above 0."""
    colour: NDArray[np.float32] = np.broadcast_to(
        np.asarray(MOUNTAIN_COLOURS[landscape.mountains], np.float32), (*snow.shape, 3)
    )
    if landscape.mountains == "snowy":
        colour = mix(colour, _SNOW, smooth_step(-0.06, 0.10, snow))
    if landscape.mountains == "autumn":
        colour = mix(colour, _GOLD, 0.8 * smooth_step(0.1, 1.2, field(rng, canvas.x, canvas.y[rows], 0.05, octaves=3)))
    if landscape.mountains == "green":
        colour = mix(
            colour, (0.16, 0.30, 0.17), 0.7 * smooth_step(0.2, 1.2, field(rng, canvas.x, canvas.y[rows], 0.04))
        )
    return colour


def _paint_water(canvas: Canvas, landscape: Landscape, horizon: float, shore: float, rng: np.random.Generator) -> None:
    rows = canvas.rows(horizon, shore + 0.06)
    y = canvas.y[rows]
    near = ((y - horizon) / (shore + 0.06 - horizon)).clip(0, 1)  # 0 at the horizon
    far = (1 / (0.25 + near) - 0.8) / 3.2  # waves are closer together far away; in [0, 1]
    calm = landscape.water == "lake"
    ripple = field(rng, canvas.x, far.astype(np.float32), 0.05, octaves=3, stretch=5.0)
    mirror = _mirrored(canvas, horizon, y, ripple * (0.004 + 0.012 * near)[:, None] * (1.0 if calm else 2.5))
    light = np.asarray(LAND_LIGHT[landscape.time], np.float32)
    tint = np.asarray(WATER_COLOURS[landscape.water], np.float32) * light
    share = np.broadcast_to((0.25 + 0.12 * near if calm else 0.66 + 0.16 * near)[:, None], ripple.shape)
    colour = mix(mirror, tint, share) * (1 + (0.035 if calm else 0.10) * ripple)[..., None]
    if not calm:
        waves = field(rng, canvas.x, far.astype(np.float32), 0.07, octaves=4, stretch=6.0, gain=0.6)
        foam = smooth_step(0.7, 1.5, waves) * (0.25 + 0.75 * near)[:, None]
        colour = mix(colour, np.asarray((0.93, 0.96, 0.97)) * light, foam)
    if landscape.light != NONE:
        cx, _, _ = _sun(canvas, landscape, np.random.default_rng([landscape.seed, 99]))
        width = (0.035 + 0.05 * near)[:, None]
        glitter = np.exp(-(((canvas.x[None, :] - cx) / width) ** 2)) * smooth_step(-0.2, 1.2, ripple)
        colour = mix(colour, LIGHT_COLOURS[landscape.light], 0.75 * glitter)
    alpha = np.clip((y - horizon) / canvas.pixel + 0.5, 0, 1)[:, None] * np.ones_like(ripple)
    canvas.paint("water", alpha.astype(np.float32), colour, rows)


def _mirrored(canvas: Canvas, horizon: float, y: Field, bend: NDArray[np.floating]) -> NDArray[np.float32]:
    """Returns the picture above the horizon, mirrored vertically, with rows displaced by the ripples."""
    at = (2 * horizon - y[:, None] - 0.002 - np.abs(bend)) / canvas.pixel - 0.5
    at = np.clip(at, 0, len(canvas.y) - 2)
    low = at.astype(int)
    across = np.arange(len(canvas.x))[None, :]
    share = (at - low)[..., None].astype(np.float32)
    above, below = canvas.pixels[low, across], canvas.pixels[low + 1, across]
    return above + share * (below - above)
