"""Prompts that no training sees, each with what it claims, so that a judge can say whether a picture shows it."""

from __future__ import annotations

import numpy as np

from .scene import Claim, describe, random_scene

# Training seeds its generators with one small number, or with such a number and a picture's size. A sequence that
# starts with this word is a stream of its own.
_STREAM = 0x68656C64  # "held"


def held_out(count: int, seed: int = 0) -> list[tuple[str, tuple[Claim, ...]]]:
    """Returns `count` different prompts with their claims; the first ones stay the same whatever the count.

    seed: another set of prompts. The scenes behind them are never drawn. A prompt of one thing may be the caption
    of some training picture too (there are few such sentences), one of two things hardly ever is.
    """
    rng = np.random.default_rng([_STREAM, seed])
    found: dict[str, tuple[Claim, ...]] = {}
    while len(found) < count:
        text, claims = describe(random_scene(rng), rng)
        found.setdefault(text, claims)
    return list(found.items())
