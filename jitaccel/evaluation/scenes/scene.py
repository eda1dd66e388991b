"""Landscapes, the captions that describe them, and what a caption claims.

A landscape is data: words from the lists below and one seed, from which drawing takes everything that has no word
(ridge lines, clouds, where the trees stand). A caption says some of it, in one of several wordings.
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
NONE = "none"  # what an attribute is where the landscape has no such thing

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

Claims = Mapping[str, str]
"""What a caption says: attribute -> value. It never claims that something is absent."""


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """What is drawn. The fields named in `ATTRIBUTES` are what a caption may claim.

    ranges: mountain ranges, 1 or 2. seed: of all that has no word.
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
        """Returns every attribute and its value, `NONE` included."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


@dataclass(frozen=True)
class Caption:
    """A sentence, what it claims, and which part of it claims what: `(start, end, claims)` in characters."""

    text: str
    parts: tuple[tuple[int, int, Claims], ...]

    @property
    def claims(self) -> dict[str, str]:
        return {name: value for _, _, said in self.parts for name, value in said.items()}


def random_landscape(rng: np.random.Generator) -> Landscape:
    """Returns a landscape with each attribute drawn alone, as far as they can stand together.

    Stars are seen at night, a boat needs water, and a balloon keeps clear of sun and moon.
    """
    time = _pick(rng, TIMES)
    sky = _pick(rng, ("cloudy", "starry") if time == "night" else ("clear", "cloudy"))
    light = NONE if rng.random() < 0.25 else _pick(rng, LIGHTS)
    water = _pick(rng, (NONE, *WATERS))
    ground = _pick(rng, GROUNDS)
    thing = NONE if rng.random() < 0.3 else _pick(rng, THINGS if water != NONE else ("house", "balloon"))
    landscape = Landscape(
        time=time,
        sky=sky,
        light=light,
        light_place=NONE if light == NONE else _pick(rng, tuple(PLACES)),
        mountains=_pick(rng, MOUNTAINS),
        water=water,
        ground=ground,
        flowers=_pick(rng, FLOWERS) if ground == "flowers" else NONE,
        thing=thing,
        paint=NONE if thing == NONE else _pick(rng, PAINTS),
        thing_place=NONE if thing == NONE else _pick(rng, tuple(PLACES)),
        ranges=int(rng.integers(1, 3)),
        seed=int(rng.integers(2**31)),
    )
    if thing == "balloon" and landscape.thing_place == landscape.light_place:
        free = [place for place in PLACES if place != landscape.light_place]
        landscape = replace(landscape, thing_place=_pick(rng, free))
    return landscape


def describe(landscape: Landscape, rng: np.random.Generator, detail: float = 0.9) -> Caption:
    """Returns a caption in one of several wordings; each part but the mountains is said with probability `detail`."""
    said = rng.random(6) < detail
    parts = [_sky(landscape, rng)] if said[0] else []
    parts += [_light(landscape)] if said[1] and landscape.light != NONE else []
    parts += [_water(landscape, rng)] if said[2] and landscape.water != NONE else []
    parts += [_ground(landscape, rng)] if said[3] else []
    parts += [_thing(landscape)] if said[4] and landscape.thing != NONE else []
    if rng.random() < 0.4:
        parts = [parts[k] for k in rng.permutation(len(parts))]
    return _sentence(_lead(landscape, rng, said[5]), parts, rng)


Part = tuple[str, dict[str, str]]


def _lead(landscape: Landscape, rng: np.random.Generator, with_time: bool) -> list[Part]:
    mountains = (f"{landscape.mountains} mountains", {"mountains": landscape.mountains})
    if not with_time:
        return [mountains]
    if rng.random() < 0.3:
        return [(f"{landscape.time} over", {"time": landscape.time}), mountains]
    return [mountains, (f"at {landscape.time}", {"time": landscape.time})]


def _sky(landscape: Landscape, rng: np.random.Generator) -> Part:
    words = {"clear": ("a clear sky", "a cloudless sky"), "cloudy": ("a cloudy sky", "clouds")}
    words["starry"] = ("a starry sky", "stars")
    return _pick(rng, words[landscape.sky]), {"sky": landscape.sky}


def _light(landscape: Landscape) -> Part:
    body = "moon" if landscape.time == "night" else "sun"
    text = f"a {landscape.light} {body} {_where(landscape.light_place)}"
    return text, {"light": landscape.light, "light_place": landscape.light_place}


def _water(landscape: Landscape, rng: np.random.Generator) -> Part:
    words = {"lake": ("a lake", "a calm lake"), "sea": ("the sea", "a sea with waves")}
    return _pick(rng, words[landscape.water]), {"water": landscape.water}


def _ground(landscape: Landscape, rng: np.random.Generator) -> Part:
    if landscape.ground == "flowers":
        text = _pick(rng, ("a meadow with {} flowers", "{} flowers")).format(landscape.flowers)
        return text, {"ground": "flowers", "flowers": landscape.flowers}
    words = {"pines": ("pines", "pine trees"), "dunes": ("sand dunes", "dunes"), "snow": ("snow", "a field of snow")}
    return _pick(rng, words[landscape.ground]), {"ground": landscape.ground}


def _thing(landscape: Landscape) -> Part:
    text = f"a {landscape.paint} {landscape.thing} {_where(landscape.thing_place)}"
    return text, {"thing": landscape.thing, "paint": landscape.paint, "thing_place": landscape.thing_place}


def _where(place: str) -> str:
    return "in the middle" if place == "middle" else f"on the {place}"


def _sentence(lead: Sequence[Part], parts: Sequence[Part], rng: np.random.Generator) -> Caption:
    """Returns the parts as "lead, a, b, c" or as "lead with a, b and c"."""
    plain = rng.random() < 0.5
    text = ""
    spans: list[tuple[int, int, Claims]] = []
    for k, (words, claims) in enumerate([*lead, *parts]):
        number = k - len(lead)  # among `parts`
        if k == 0:
            joint = ""
        elif number < 0:
            joint = " "
        elif number == 0:
            joint = ", " if plain else " with "
        else:
            joint = " and " if number == len(parts) - 1 and not plain else ", "
        start = len(text) + len(joint)
        text += joint + words
        spans.append((start, len(text), claims))
    return Caption(text, tuple(spans))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
