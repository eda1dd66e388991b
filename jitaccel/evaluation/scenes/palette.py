"""The colours of the world: red, green and blue in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping

Rgb = tuple[float, float, float]

SKY_COLOURS: Mapping[str, tuple[Rgb, Rgb, Rgb]] = {  # zenith, halfway, horizon
    "dawn": ((0.42, 0.54, 0.78), (0.80, 0.70, 0.80), (1.00, 0.80, 0.68)),
    "noon": ((0.16, 0.42, 0.80), (0.42, 0.68, 0.93), (0.78, 0.90, 0.97)),
    "dusk": ((0.17, 0.13, 0.36), (0.58, 0.26, 0.42), (0.99, 0.53, 0.24)),
    "night": ((0.02, 0.03, 0.10), (0.05, 0.09, 0.22), (0.13, 0.19, 0.36)),
}
LAND_LIGHT: Mapping[str, Rgb] = {  # light on everything below the sky
    "dawn": (0.86, 0.76, 0.78),
    "noon": (1.0, 1.0, 0.98),
    "dusk": (0.74, 0.54, 0.52),
    "night": (0.32, 0.37, 0.54),
}
CLOUDS: Mapping[str, tuple[Rgb, Rgb]] = {  # lit, shaded
    "dawn": ((1.00, 0.90, 0.86), (0.72, 0.62, 0.74)),
    "noon": ((1.00, 1.00, 1.00), (0.68, 0.75, 0.84)),
    "dusk": ((0.98, 0.58, 0.46), (0.38, 0.24, 0.42)),
    "night": ((0.30, 0.34, 0.48), (0.11, 0.13, 0.24)),
}
LIGHT_COLOURS: Mapping[str, Rgb] = {
    "white": (1.00, 0.99, 0.95),
    "golden": (1.00, 0.80, 0.26),
    "red": (0.95, 0.24, 0.16),
}
MOUNTAIN_COLOURS: Mapping[str, Rgb] = {
    "snowy": (0.42, 0.46, 0.56),
    "rocky": (0.56, 0.46, 0.39),
    "green": (0.34, 0.52, 0.28),
    "autumn": (0.70, 0.33, 0.14),
}
WATER_COLOURS: Mapping[str, Rgb] = {"lake": (0.24, 0.44, 0.56), "sea": (0.10, 0.37, 0.56)}
FLOWER_COLOURS: Mapping[str, Rgb] = {
    "red": (0.88, 0.12, 0.16),
    "yellow": (1.00, 0.84, 0.16),
    "white": (0.97, 0.97, 0.98),
    "purple": (0.60, 0.30, 0.80),
}
PAINT_COLOURS: Mapping[str, Rgb] = {
    "red": (0.84, 0.14, 0.13),
    "blue": (0.14, 0.32, 0.82),
    "white": (0.96, 0.95, 0.92),
    "yellow": (0.98, 0.80, 0.16),
}
