"""Paints the foreground: the ground with its plants, and the object."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Paint, mix, smooth_step
from .noise import Field, field, line
from .palette import FLOWER_COLOURS, LAND_LIGHT, PAINT_COLOURS
from .scene import NONE, PLACES, Landscape

_SAND, _SNOW = ((0.70, 0.50, 0.28), (0.96, 0.80, 0.54)), ((0.66, 0.74, 0.88), (0.97, 0.98, 1.0))  # shaded, lit
_HOUSE, _BOAT, _BALLOON = 0.075, 0.075, 0.078  # half widths


def paint_ground(canvas: Canvas, landscape: Landscape, shore: float, rng: np.random.Generator) -> None:
    """Paints the ground from the shore to the lower edge."""
    if landscape.ground in ("dunes", "snow"):
        _paint_hills(canvas, landscape, shore, rng)
        return
    edge = shore + 0.012 * line(rng, canvas.x, 0.35, octaves=3, gain=0.5, smooth=True)
    if landscape.water == NONE:
        edge = np.minimum(edge, shore)  # no sky between mountains and ground
    rows = canvas.rows(float(edge.min()) - canvas.pixel, 1)
    y = canvas.y[rows]
    near = np.clip((y - shore) / (1 - shore), 0, 1)[:, None]
    grass = field(rng, canvas.x, y, 0.05, octaves=4, gain=0.6)
    patches = field(rng, canvas.x, y, 0.20, octaves=2, stretch=2.0)
    dark, bright = (
        ((0.16, 0.30, 0.14), (0.34, 0.50, 0.22))
        if landscape.ground == "pines"
        else ((0.24, 0.42, 0.16), (0.48, 0.66, 0.26))
    )
    colour = mix(dark, bright, np.clip(0.65 - 0.25 * near + 0.12 * grass + 0.16 * patches, 0, 1))
    alpha = np.clip((y[:, None] - edge) / canvas.pixel + 0.5, 0, 1)
    canvas.paint("ground", alpha.astype(np.float32), colour * _light(landscape), rows)
    (_plant_flowers if landscape.ground == "flowers" else _plant_pines)(canvas, landscape, shore, rng)


def paint_thing(canvas: Canvas, landscape: Landscape, horizon: float, shore: float, rng: np.random.Generator) -> None:
    """Paints the house, boat or balloon, if there is one."""
    if landscape.thing == NONE:
        return
    x = thing_column(canvas, landscape)
    paint = np.asarray(PAINT_COLOURS[landscape.paint]) * (0.35 + 0.65 * _light(landscape))
    if landscape.thing == "house":
        _paint_house(canvas, landscape, x, house_floor(shore), paint)
    elif landscape.thing == "boat":
        _paint_boat(canvas, landscape, x, horizon + 0.085 + 0.03 * float(rng.random()), paint)
    else:
        _paint_balloon(canvas, landscape, x, 0.17 + 0.10 * float(rng.random()), paint)


def thing_column(canvas: Canvas, landscape: Landscape) -> float:
    """Returns x of the object's middle, with a small random offset."""
    jitter = np.random.default_rng([landscape.seed, 98]).uniform(-1, 1)
    return canvas.column_of(PLACES[landscape.thing_place] + 0.03 * float(jitter))


def house_floor(shore: float) -> float:
    """Returns y of a house's lower edge."""
    return shore + 0.14


def _light(landscape: Landscape) -> Field:
    return np.asarray(LAND_LIGHT[landscape.time], np.float32)


def _paint_hills(canvas: Canvas, landscape: Landscape, shore: float, rng: np.random.Generator) -> None:
    """Paints dunes or snow: crests in front of each other, each lit from one side and darker towards its foot."""
    shaded, lit = _SAND if landscape.ground == "dunes" else _SNOW
    steep = 0.05 if landscape.ground == "dunes" else 0.03
    side = 1.0 if rng.random() < 0.5 else -1.0
    for number, base in enumerate((0.0, 0.07, 0.17)):
        crest = (
            shore
            + base * (1 - shore) / 0.34
            + steep * (0.35 + 0.35 * number) * line(rng, canvas.x, 0.55, octaves=2, gain=0.35, smooth=True)
        )
        if landscape.water == NONE and number == 0:
            crest = np.minimum(crest, shore)
        slope = np.gradient(crest) / canvas.pixel
        rows = canvas.rows(float(crest.min()) - canvas.pixel, 1)
        y = canvas.y[rows]
        below = y[:, None] - crest
        wind = field(rng, canvas.x, y, 0.06, octaves=4, stretch=4.0)
        shade = (
            0.62 + 0.34 * np.tanh(5 * side * slope) * np.exp(-np.maximum(below, 0) / 0.10) - 1.1 * below + 0.05 * wind
        )
        alpha = np.clip(below / (canvas.pixel * np.sqrt(1 + slope**2)) + 0.5, 0, 1).astype(np.float32)
        canvas.paint("ground", alpha, mix(shaded, lit, np.clip(shade, 0, 1)) * _light(landscape), rows)


def _plant_flowers(canvas: Canvas, landscape: Landscape, shore: float, rng: np.random.Generator) -> None:
    colour = np.asarray(FLOWER_COLOURS[landscape.flowers]) * (0.25 + 0.75 * _light(landscape))
    spots = rng.random((620, 4))
    for x, depth, size, shade in spots[np.argsort(spots[:, 1])]:
        near = depth**0.8
        radius = (0.0028 + 0.0125 * near) * (0.8 + 0.4 * size)
        y = shore + 0.02 + (0.985 - shore) * near
        across = (x - 0.5) * max(1.0, canvas.aspect) * 1.04
        canvas.ellipse("plants", across, y, radius, 0.8 * radius, colour * (0.80 + 0.20 * shade))
        if radius > 0.009:
            canvas.ellipse(
                "plants",
                across,
                y,
                0.3 * radius,
                0.25 * radius,
                colour * (0.55 if landscape.flowers != "white" else (0.95, 0.8, 0.3)),
            )


def _plant_pines(canvas: Canvas, landscape: Landscape, shore: float, rng: np.random.Generator) -> None:
    spots = rng.random((64, 4))
    for x, depth, size, shade in spots[np.argsort(spots[:, 1])]:
        foot = shore + 0.03 + (0.95 - shore) * depth
        tall = (0.085 + 0.16 * depth) * (0.75 + 0.5 * size)
        across = (x - 0.5) * 2.0
        if landscape.thing in ("house", "boat"):
            clear = (_HOUSE if landscape.thing == "house" else _BOAT) + 0.17 * tall + 0.02
            behind = landscape.thing == "house" and foot < house_floor(shore) - 0.10
            low = landscape.thing == "house" and foot - tall > house_floor(shore) - 0.02
            low |= landscape.thing == "boat" and foot - tall > shore - 0.03
            if abs(across - thing_column(canvas, landscape)) < clear and not (behind or low):
                continue
        _paint_pine(
            canvas, across, foot, tall, np.asarray((0.13, 0.33, 0.21)) * (0.7 + 0.5 * shade) * _light(landscape)
        )


def _paint_pine(canvas: Canvas, x: float, foot: float, tall: float, colour: Paint) -> None:
    """Paints one tree: four tiers of branches on a trunk, lighter on the left."""
    half = 0.24 * tall
    if x + half < canvas.x[0] or x - half > canvas.x[-1]:
        return
    rows, columns = canvas.rows(foot - tall, foot), canvas.columns(x - half, x + half)
    down = ((canvas.y[rows] - foot) / tall + 1.0)[:, None]  # 0 at the top, 1 at the foot
    across = (canvas.x[columns] - x)[None, :] / tall
    tier = np.clip(down / 0.9, 0, 1) * 4
    width = np.where(down < 0.9, 0.21 * (0.25 + 0.75 * down / 0.9) * (0.45 + 0.55 * (tier % 1.0)), 0.022)
    width = np.where((down < 0) | (down > 1), -1.0, width)
    alpha = np.clip((width - np.abs(across)) * tall / canvas.pixel + 0.5, 0, 1).astype(np.float32)
    shade = 1.0 - 0.9 * across + 0.25 * (tier % 1.0) - 0.1
    canvas.paint("plants", alpha, np.asarray(colour, np.float32) * shade[..., None], rows, columns)


def _paint_house(canvas: Canvas, landscape: Landscape, x: float, y: float, paint: Paint) -> None:
    a, light = _HOUSE, _light(landscape)
    wood, pane = np.asarray((0.36, 0.24, 0.19)) * light, np.asarray((0.74, 0.86, 0.94)) * light
    if landscape.time in ("dusk", "night"):
        pane = np.asarray((1.0, 0.86, 0.48))
    _box(canvas, x - a, y - 1.3 * a, x + a, y, paint)
    roof = [(x - 1.22 * a, y - 1.2 * a), (x, y - 2.3 * a), (x + 1.22 * a, y - 1.2 * a)]
    canvas.polygon("thing", roof, wood)
    _box(canvas, x - 0.2 * a, y - 0.72 * a, x + 0.2 * a, y, 0.75 * wood)
    for k in (-0.6, 0.6):
        _box(canvas, x + (k - 0.2) * a, y - 0.95 * a, x + (k + 0.2) * a, y - 0.5 * a, pane)


def _paint_boat(canvas: Canvas, landscape: Landscape, x: float, y: float, paint: Paint) -> None:
    a, light = _BOAT, _light(landscape)
    wood = np.asarray((0.42, 0.28, 0.19)) * light
    hull = [(x - a, y), (x + a, y), (x + 0.7 * a, y + 0.36 * a), (x - 0.7 * a, y + 0.36 * a)]
    _box(canvas, x - 0.10 * a, y - 1.95 * a, x - 0.02 * a, y, wood)
    canvas.polygon(
        "thing", [(x + 0.02 * a, y - 1.9 * a), (x + 0.95 * a, y - 0.14 * a), (x + 0.02 * a, y - 0.14 * a)], paint
    )
    canvas.polygon(
        "thing", [(x - 0.14 * a, y - 1.6 * a), (x - 0.14 * a, y - 0.14 * a), (x - 0.8 * a, y - 0.14 * a)], paint
    )
    canvas.polygon("thing", hull, wood)


def _paint_balloon(canvas: Canvas, landscape: Landscape, x: float, y: float, paint: Paint) -> None:
    a, light = _BALLOON, 0.35 + 0.65 * _light(landscape)
    top, bottom = y - a, y + 1.6 * a
    rows, columns = canvas.rows(top - canvas.pixel, bottom), canvas.columns(x - a - canvas.pixel, x + a)
    u, v = (canvas.x[columns][None, :] - x) / a, (canvas.y[rows][:, None] - y) / a
    round_width = np.sqrt(np.maximum(1 - v**2, 0))
    tail = 0.8 - 0.62 * (v - 0.6)  # straight from where the sphere is 0.8 wide to the mouth
    width = np.where(v < 0.6, round_width, np.where(v < 1.42, tail, -1.0))
    alpha = np.clip((width - np.abs(u)) * a / canvas.pixel + 0.5, 0, 1).astype(np.float32)
    bend = u / np.maximum(width, 0.05)  # gores narrow towards top and mouth
    gores = smooth_step(0.80, 0.95, np.cos(bend * 7.0)) * (np.abs(bend) < 1)
    shade = (1.0 - 0.22 * u - 0.10 * v)[..., None]
    colour = mix(
        paint,
        np.asarray((1.0, 0.97, 0.90)) * light
        if paint[2] < 0.75 * paint[0] or paint[0] < 0.6 * paint[2]
        else np.asarray((0.62, 0.62, 0.66)) * light,
        0.45 * gores,
    )
    canvas.paint("thing", alpha, colour * shade, rows, columns)
    wood = np.asarray((0.42, 0.27, 0.16)) * light
    for k in (-0.20, 0.15):
        _box(canvas, x + k * a, y + 1.40 * a, x + (k + 0.05) * a, y + 1.66 * a, wood)
    _box(canvas, x - 0.24 * a, y + 1.62 * a, x + 0.24 * a, y + 1.95 * a, wood)


def _box(canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: Paint) -> None:
    canvas.polygon("thing", [(left, top), (right, top), (right, bottom), (left, bottom)], colour)
