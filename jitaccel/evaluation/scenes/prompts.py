"""Prompts that no training sees, each with what it claims, so that a judge can say whether a picture shows it."""

from __future__ import annotations

import hashlib

import numpy as np

from .captions import Claims, describe
from .scene import Landscape, random_landscape

_STREAM = 0x68656C64  # "held": a stream of its own among the seeds
SHARE_HELD_OUT = 8  # one combination of words in so many is held out


def is_held_out(landscape: Landscape) -> bool:
    """Returns whether training must not draw a landscape: a fixed eighth of all combinations of its words."""
    words = ",".join(landscape.attributes().values())
    return hashlib.blake2b(words.encode(), digest_size=4).digest()[0] % SHARE_HELD_OUT == 0


def training_landscape(rng: np.random.Generator) -> Landscape:
    """Returns a random landscape of a combination that training may see."""
    while is_held_out(landscape := random_landscape(rng)):
        pass
    return landscape


def held_out_landscape(rng: np.random.Generator) -> Landscape:
    """Returns a random landscape of a combination that training never sees."""
    while not is_held_out(landscape := random_landscape(rng)):
        pass
    return landscape


def held_out(count: int, seed: int = 0) -> list[tuple[str, Claims]]:
    """Returns `count` different prompts with their claims; the first ones stay the same whatever the count.

    Args:
        count: Number of prompts.
        seed: Another seed is another set.

    The combination of words behind each prompt is held out. A prompt leaves some of it unsaid, so a training picture
    may fit a short one.
    """
    rng = np.random.default_rng([_STREAM, seed])
    found: dict[str, Claims] = {}
    while len(found) < count:
        caption = describe(held_out_landscape(rng), rng)
        found.setdefault(caption.text, caption.claims)
    return list(found.items())
