"""Prompts that are never used in training, each with its claims, so that a judge can score pictures of them."""

from __future__ import annotations

import hashlib

import numpy as np

from .captions import Claims, describe
from .scene import Landscape, random_landscape

_STREAM = 0x68656C64  # "held": a separate stream of seeds
SHARE_HELD_OUT = 8  # one in this many combinations of words is held out


def is_held_out(landscape: Landscape) -> bool:
    """Returns whether a landscape is excluded from training: a fixed eighth of all combinations of its words."""
    words = ",".join(landscape.attributes().values())
    return hashlib.blake2b(words.encode(), digest_size=4).digest()[0] % SHARE_HELD_OUT == 0


def training_landscape(rng: np.random.Generator) -> Landscape:
    """Returns a random landscape of a combination that training may use."""
    while is_held_out(landscape := random_landscape(rng)):
        pass
    return landscape


def held_out_landscape(rng: np.random.Generator) -> Landscape:
    """Returns a random landscape of a combination that training never uses."""
    while not is_held_out(landscape := random_landscape(rng)):
        pass
    return landscape


def held_out(count: int, seed: int = 0) -> list[tuple[str, Claims]]:
    """Returns `count` different prompts with their claims; the first ones are the same whatever the count.

    The combination of words behind each prompt is held out. A prompt does not mention all of them, so a training
    picture may match a short prompt.

    Args:
        count: Number of prompts.
        seed: A different seed gives a different set.
    """
    rng = np.random.default_rng([_STREAM, seed])
    found: dict[str, Claims] = {}
    while len(found) < count:
        caption = describe(held_out_landscape(rng), rng)
        found.setdefault(caption.text, caption.claims)
    return list(found.items())
