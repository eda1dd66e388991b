"""Draws lines, markers, text and scales for plots of measurements, using only Pillow."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK, GREY, PALE, PAPER = (30, 30, 30), (105, 105, 105), (228, 228, 228), (255, 255, 255)
# Okabe and Ito's colours, which colour-blind readers can distinguish; each kind also has its own marker.
COLOURS: dict[str, Colour] = {
    "dense-native": (0, 114, 178),
    "dense-beta": (0, 158, 115),
    "dense-dpm": (86, 180, 233),
    "sparse": (213, 94, 0),
    "rival": (204, 121, 167),
}
METHOD_KINDS = {
    "dense-native": "dense, native levels",
    "dense-beta": "dense, the presets' levels",
    "dense-dpm": "dense, DPM-Solver++(2M)",
    "sparse": "sparse (JiT)",
    "rival": "other methods",
}
RADIUS = 5.5
_FINER = 2  # Pillow does not anti-alias lines, so draw at twice the size and halve


class Pen:
    """Draws on a white sheet. Coordinates are in pixels and may be fractional."""

    def __init__(self, width: float, height: float) -> None:
        """Creates a white sheet of this size in pixels."""
        self._sheet = Image.new("RGB", (round(width) * _FINER, round(height) * _FINER), PAPER)
        self._draw = ImageDraw.Draw(self._sheet)

    def picture(self) -> Image.Image:
        """Returns the drawn picture."""
        return self._sheet.reduce(_FINER)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        """Draws straight lines from point to point."""
        self._draw.line(_finer(points), fill=colour, width=round(width * _FINER), joint="curve")

    def dashes(self, start: Point, end: Point, colour: Colour, width: float = 1.0) -> None:
        """Draws a dashed line, with dashes of 6 pixels and gaps of 4."""
        length = math.dist(start, end)
        for at in range(0, int(length), 10):
            ends = [_between(start, end, part / length) for part in (at, min(at + 6, length))]
            self.line(ends, colour, width)

    def box(self, box: tuple[float, float, float, float], fill: Colour) -> None:
        """Fills a box (left, top, right, bottom)."""
        self._draw.rectangle([round(each * _FINER) for each in box], fill=fill)

    def text(self, at: Point, text: str, size: float = 13, colour: Colour = INK, anchor: str = "la") -> None:
        """Writes a line of text with a white outline. anchor: Pillow's code for the point of the text at `at`."""
        place = (at[0] * _FINER, at[1] * _FINER)
        rim = _FINER * 2
        self._draw.text(
            place, text, fill=colour, font=_font(size * _FINER), anchor=anchor, stroke_width=rim, stroke_fill=PAPER
        )
        self._draw.text(place, text, fill=colour, font=_font(size * _FINER), anchor=anchor)

    def marker(self, kind: str, at: Point, *, is_hollow: bool = False, colour: Colour | None = None) -> None:
        """Draws the marker of a kind of method (circle, square, diamond or triangle) with a white outline."""
        colour = COLOURS[kind] if colour is None else colour
        self._shape(kind, at, RADIUS + 1.5, PAPER)
        self._shape(kind, at, RADIUS, colour)
        if is_hollow:
            self._shape(kind, at, RADIUS - 2.2, PAPER)

    def paste(self, picture: Image.Image, at: Point) -> None:
        """Pastes a picture with its top left corner at a point."""
        size = picture.width * _FINER, picture.height * _FINER
        finer = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
        self._sheet.paste(finer, (round(at[0] * _FINER), round(at[1] * _FINER)))

    def _shape(self, kind: str, at: Point, radius: float, colour: Colour) -> None:
        x, y = at
        if kind == "dense-native":
            self._draw.ellipse(_finer([(x - radius, y - radius), (x + radius, y + radius)]), fill=colour)
            return
        corners = {
            "dense-beta": (0.9, 4, 45.0),
            "dense-dpm": (1.25, 5, 90.0),
            "sparse": (1.2, 4, 0.0),
            "rival": (1.2, 3, 90.0),
        }
        scale, count, turn = corners[kind]
        scale *= math.sqrt(2.0) if kind == "dense-beta" else 1.0
        angles = [math.radians(turn + 360.0 * k / count) for k in range(count)]
        shape = [(x + scale * radius * math.cos(a), y - scale * radius * math.sin(a)) for a in angles]
        self._draw.polygon(_finer(shape), fill=colour)


def _finer(points: Sequence[Point]) -> list[Point]:
    return [(round(x * _FINER), round(y * _FINER)) for x, y in points]


def _between(start: Point, end: Point, part: float) -> Point:
    return start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])


@functools.lru_cache(maxsize=32)
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: float = 13) -> float:
    """Returns the width of a line of text in pixels."""
    return float(_font(size * _FINER).getlength(text)) / _FINER


def wrap(text: str, width: float, size: float = 13) -> list[str]:
    """Returns a text wrapped into lines at most `width` wide; a single longer word is cut off."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(word, width, size))
    return lines


def cut(text: str, width: float, size: float = 13) -> str:
    """Returns a text whose end is replaced by dots if it is wider than `width`."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}...", size) > width:
        text = text[:-1]
    return f"{text}..."


def fade(colour: Colour, strength: float) -> Colour:
    """Returns a colour mixed with white."""
    red, green, blue = (round(255 - (255 - each) * strength) for each in colour)
    return red, green, blue


def darken(colour: Colour) -> Colour:
    """Returns a colour mixed with black, for text."""
    red, green, blue = (round(0.72 * each) for each in colour)
    return red, green, blue


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps numbers from low to high to pixels from start to end, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the pixel position of a number."""
        low, high, value = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 8) -> list[float]:
        """Returns at most `most` round numbers on the scale."""
        if self.is_log:
            for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                ticks = [m * 10.0**power for power in powers for m in mantissas]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= most:
                    break
            if len(ticks) >= 2:
                return ticks
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.9999)
        return [k * step for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
