"""Captions of landscapes in several wordings, the attributes each claims, and the words they use."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from .scene import ATTRIBUTES, NONE, Landscape, pick

Claims = Mapping[str, str]
"""The claims of a caption: attribute -> value. A caption never claims that something is absent."""

_WORDINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "clear": ("a clear sky", "a cloudless sky"),
        "cloudy": ("a cloudy sky", "clouds"),
        "starry": ("a starry sky", "stars"),
        "lake": ("a lake", "a calm lake"),
        "sea": ("the sea", "a sea with waves"),
        "flowers": ("a meadow with {} flowers", "{} flowers"),
        "pines": ("pines", "pine trees"),
        "dunes": ("sand dunes", "dunes"),
        "snow": ("snow", "a field of snow"),
    }
)
_PLACES: Mapping[str, str] = MappingProxyType(
    {"left": "on the left", "middle": "in the middle", "right": "on the right"}
)
_OTHER_WORDS = ("a sun", "a moon", "mountains at", "over", "with", "and")


@dataclass(frozen=True)
class Caption:
    """A sentence, its claims, and the part of the sentence for each: `(start, end, claims)` in characters."""

    text: str
    parts: tuple[tuple[int, int, Claims], ...]

    @property
    def claims(self) -> dict[str, str]:
        """All claims of the sentence."""
        return {name: value for _, _, said in self.parts for name, value in said.items()}


def vocabulary() -> frozenset[str]:
    """Returns every word that a caption may contain, in lower case."""
    values = (value for values in ATTRIBUTES.values() for value in values if value != NONE)
    wordings = itertools.chain.from_iterable(_WORDINGS.values())
    return frozenset(_words(" ".join([*values, *wordings, *_PLACES.values(), *_OTHER_WORDS])))


def unknown_words(text: str) -> list[str]:
    """Returns the words of a prompt that no caption contains, each once, in order."""
    known = vocabulary()
    return [word for word in dict.fromkeys(_words(text)) if word not in known]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def describe(landscape: Landscape, rng: np.random.Generator, detail: float = 0.9) -> Caption:
    """Returns a caption in one of several wordings; each part but the mountains appears with probability `detail`."""
    said = rng.random(6) < detail
    parts = [_worded("sky", landscape, rng)] if said[0] else []
    parts += [_light(landscape)] if said[1] and landscape.light != NONE else []
    parts += [_worded("water", landscape, rng)] if said[2] and landscape.water != NONE else []
    parts += [_ground(landscape, rng)] if said[3] else []
    parts += [_thing(landscape)] if said[4] and landscape.thing != NONE else []
    if rng.random() < 0.4:
        parts = [parts[k] for k in rng.permutation(len(parts))]
    return _sentence(_lead(landscape, rng, bool(said[5])), parts, rng)


_Part = tuple[str, dict[str, str]]


def _lead(landscape: Landscape, rng: np.random.Generator, with_time: bool) -> list[_Part]:
    mountains = (f"{landscape.mountains} mountains", {"mountains": landscape.mountains})
    if not with_time:
        return [mountains]
    if rng.random() < 0.3:
        return [(f"{landscape.time} over", {"time": landscape.time}), mountains]
    return [mountains, (f"at {landscape.time}", {"time": landscape.time})]


def _worded(name: str, landscape: Landscape, rng: np.random.Generator) -> _Part:
    value = str(getattr(landscape, name))
    return pick(rng, _WORDINGS[value]), {name: value}


def _light(landscape: Landscape) -> _Part:
    body = "moon" if landscape.time == "night" else "sun"
    text = f"a {landscape.light} {body} {_PLACES[landscape.light_place]}"
    return text, {"light": landscape.light, "light_place": landscape.light_place}


def _ground(landscape: Landscape, rng: np.random.Generator) -> _Part:
    text, claims = _worded("ground", landscape, rng)
    if landscape.ground == "flowers":
        claims["flowers"] = landscape.flowers
    return text.format(landscape.flowers), claims


def _thing(landscape: Landscape) -> _Part:
    text = f"a {landscape.paint} {landscape.thing} {_PLACES[landscape.thing_place]}"
    return text, {"thing": landscape.thing, "paint": landscape.paint, "thing_place": landscape.thing_place}


def _sentence(lead: Sequence[_Part], parts: Sequence[_Part], rng: np.random.Generator) -> Caption:
    """Returns the parts as "lead, a, b, c" or as "lead with a, b and c"."""
    plain = rng.random() < 0.5
    text = ""
    spans: list[tuple[int, int, Claims]] = []
    for k, (words, claims) in enumerate([*lead, *parts]):
        start = len(text) + len(joint := _joint(k, len(lead), len(parts), plain))
        text += joint + words
        spans.append((start, len(text), claims))
    return Caption(text, tuple(spans))


def _joint(k: int, num_lead: int, num_parts: int, plain: bool) -> str:
    """Returns the separator before the k-th part of a sentence."""
    if k == 0:
        return ""
    if k < num_lead:
        return " "
    if k == num_lead:
        return ", " if plain else " with "
    return " and " if k == num_lead + num_parts - 1 and not plain else ", "
