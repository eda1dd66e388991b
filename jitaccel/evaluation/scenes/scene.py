"""Landscapes as data: words from the lists below and one seed.

The seed determines everything without a word: ridge lines, clouds, the places of trees. `captions` describes a
landscape in sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

TIMES = ("dawn", "noon", "dusk", "night")
SKIES = ("clear", "cloudy", "starry")
LIGHTS = ("white", "golden", "red")
PLACES = {"left": 0.2, "middle": 0.5, "right": 0.8}  # fractions of the width
MOUNTAINS = ("snowy", "rocky", "green", "autumn")
WATERS = ("lake", "sea")
GROUNDS = ("flowers", "pines", "dunes", "snow")
FLOWERS = ("red", "yellow", "white", "purple")
THINGS = ("house", "boat", "balloon")
PAINTS = ("red", "blue", "white", "yellow")
NONE = "none"  # value of an attribute that the landscape does not have

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "time": TIMES,
    "sky": SKIES,
    "light": (NONE, *LIGHTS),
    "light_place": (NONE, *PLACES),
    "mountains": MOUNTAINS,
    "water": (NONE, *WATERS),
    "ground": GROUNDS,
    "flowers": (NONE, *FLOWERS),
    "thing": (NONE, *THINGS),
    "paint": (NONE, *PAINTS),
    "thing_place": (NONE, *PLACES),
}
"""Every attribute and its values, in the order in which the judge reports them."""


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """A landscape to draw. Captions may claim the fields named in `ATTRIBUTES`.

    ranges: number of mountain ranges, 1 or 2. seed: determines everything without a word.
    """

    time: str
    sky: str
    light: str
    light_place: str
    mountains: str
    water: str
    ground: str
    flowers: str
    thing: str
    paint: str
    thing_place: str
    ranges: int
    seed: int

    def attributes(self) -> dict[str, str]:
        """Returns every attribute and its value, including `NONE`."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


def random_landscape(rng: np.random.Generator) -> Landscape:
    """Returns a landscape with independently drawn attributes, as far as they are compatible.

    Stars appear only at night, a boat needs water, and a balloon does not overlap sun or moon.
    """
    time = pick(rng, TIMES)
    sky = pick(rng, ("cloudy", "starry") if time == "night" else ("clear", "cloudy"))
    light = NONE if rng.random() < 0.25 else pick(rng, LIGHTS)
    water = pick(rng, (NONE, *WATERS))
    ground = pick(rng, GROUNDS)
    thing = NONE if rng.random() < 0.3 else pick(rng, THINGS if water != NONE else ("house", "balloon"))
    landscape = Landscape(
        time=time,
        sky=sky,
        light=light,
        light_place=NONE if light == NONE else pick(rng, tuple(PLACES)),
        mountains=pick(rng, MOUNTAINS),
        water=water,
        ground=ground,
        flowers=pick(rng, FLOWERS) if ground == "flowers" else NONE,
        thing=thing,
        paint=NONE if thing == NONE else pick(rng, PAINTS),
        thing_place=NONE if thing == NONE else pick(rng, tuple(PLACES)),
        ranges=int(rng.integers(1, 3)),
        seed=int(rng.integers(2**31)),
    )
    if thing == "balloon" and landscape.thing_place == landscape.light_place:
        free = [place for place in PLACES if place != landscape.light_place]
        landscape = replace(landscape, thing_place=pick(rng, free))
    return landscape


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Returns one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]
