"""What a scene holds, how one is drawn at random, and what is said about it.

A scene is one or two things on a shaded background. Its caption may leave attributes out; what the caption
says is kept beside it (`Claim`), so that a judge can ask whether a picture shows just that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring")
TEXTURES = ("plain", "striped", "checkered", "dotted")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.13, 0.14),
    "orange": (0.96, 0.53, 0.09),
    "yellow": (0.96, 0.85, 0.16),
    "green": (0.13, 0.62, 0.24),
    "cyan": (0.16, 0.76, 0.82),
    "blue": (0.14, 0.27, 0.82),
    "purple": (0.53, 0.18, 0.68),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "gray": (0.55, 0.56, 0.58),
    "black": (0.09, 0.09, 0.11),
    "brown": (0.45, 0.31, 0.20),
    "pink": (0.90, 0.66, 0.72),
    "teal": (0.10, 0.36, 0.38),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.12, 0.15), "large": (0.20, 0.25)}  # radius / canvas
PLACES: dict[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_MARGIN = 0.03


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn object; `x`, `y` and `radius` are fractions of the canvas, `x` to the right, `y` downwards."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float  # of shape and texture, radians
    phase: float  # of the texture, in periods

    @property
    def size(self) -> str:
        return "large" if self.radius > 0.17 else "small"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn. `light` is the direction (radians) towards which the background brightens."""

    background: str
    light: float
    things: tuple[Thing, ...]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a caption says of one thing; `None` where it is silent."""

    shape: str
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    place: str | None = None


def random_scene(rng: np.random.Generator, num_things: int | None = None) -> Scene:
    """Returns a scene of one or two things that do not overlap and differ in shape."""
    wanted = int(num_things if num_things is not None else rng.choice([1, 2], p=[0.3, 0.7]))
    shapes = rng.choice(len(SHAPES), size=wanted, replace=False)
    things: list[Thing] = []
    while len(things) < wanted:
        thing = _random_thing(rng, SHAPES[shapes[len(things)]])
        if all(math.hypot(thing.x - t.x, thing.y - t.y) > 1.02 * (thing.radius + t.radius) for t in things):
            things.append(thing)
        elif rng.random() < 0.05:
            things.clear()
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(background=background, light=float(rng.uniform(0, 2 * math.pi)), things=tuple(things))


def _random_thing(rng: np.random.Generator, shape: str) -> Thing:
    low, high = SIZES[str(rng.choice(list(SIZES)))]
    radius = float(rng.uniform(low, high))
    x, y = rng.uniform(radius + _MARGIN, 1 - radius - _MARGIN, size=2)
    return Thing(
        shape=shape,
        colour=str(rng.choice(list(COLOURS))),
        texture=str(rng.choice(TEXTURES)),
        x=float(x),
        y=float(y),
        radius=radius,
        angle=float(rng.uniform(-0.3, 0.3)),
        phase=float(rng.uniform(0, 1)),
    )


def places_of(thing: Thing, margin: float = 0.0) -> tuple[str, ...]:
    """Returns the place words that are true of a thing, clear by `margin` (fraction of the canvas) of the middle."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    found = []
    if abs(dx) > margin:
        found.append("right" if dx > 0 else "left")
    if abs(dy) > margin:
        found.append("bottom" if dy > 0 else "top")
    return tuple(found)


def describe(scene: Scene, rng: np.random.Generator, detail: float = 0.75) -> tuple[str, tuple[Claim, ...]]:
    """Returns a caption of the scene and what it claims of each thing, in the order in which it names them.

    Every attribute but the shape is said with probability `detail`; "plain" is said by silence half of the time
    (a caption that names no texture claims "plain" only where it says the word).
    """
    order = rng.permutation(len(scene.things))
    claims = tuple(_claim(scene.things[k], rng, detail) for k in order)
    background = scene.background if rng.random() < detail else None
    return caption(claims, background), claims


def _claim(thing: Thing, rng: np.random.Generator, detail: float) -> Claim:
    said = rng.random(4) < (detail, detail + 0.2, 0.6 * detail, detail)
    places = places_of(thing, margin=0.06)
    return Claim(
        shape=thing.shape,
        texture=thing.texture if said[0] or thing.texture != "plain" else None,
        colour=thing.colour if said[1] else None,
        size=thing.size if said[2] else None,
        place=str(rng.choice(places)) if said[3] and places else None,
    )


def caption(claims: Sequence[Claim], background: str | None = None) -> str:
    """Returns the sentence that makes these claims, such as "a small red striped circle on the left"."""
    text = " and ".join(_phrase(claim) for claim in claims)
    return f"{text} on a {background} background" if background else text


def _phrase(claim: Claim) -> str:
    words = [w for w in (claim.size, claim.colour, claim.texture, claim.shape) if w]
    article = "an" if words[0][0] in "aeiou" else "a"
    place = f" {PLACES[claim.place]}" if claim.place else ""
    return f"{article} {' '.join(words)}{place}"
