"""Ranges of numbers that the commands accept; larger ones would never finish or not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import CommandError
from ..limits import MOST_BATCH, MOST_SIDE
from ..method.checks import MAX_STEPS

MOST_PROMPTS = 10_000  # of the drawn world, which is finite
MOST_SEED = 2**63 - 1
_WHOLE: Mapping[str, tuple[int, int]] = {
    "batch_size": (1, MOST_BATCH),
    "max_sequence_length": (1, 512),  # the limit of FLUX.1
    "prompts": (1, MOST_PROMPTS),
    "seed": (0, MOST_SEED),
    "steps": (1, MAX_STEPS),
}


def check_numbers(arguments: object) -> None:
    """Raises CommandError listing every argument of a command that is out of range or not a number."""
    given = vars(arguments)
    problems = []
    for name, (least, most) in _WHOLE.items():
        value = given.get(name)
        if isinstance(value, int) and not least <= value <= most:
            problems.append(f"--{name.replace('_', '-')} must be in {least}..{_short(most)}, got {_short(value)}")
    guidance = given.get("guidance")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0.0):
        problems.append(f"--guidance must be a finite number, 0 or above, got {guidance}")
    if problems:
        raise CommandError("\n".join(problems))


def check_size(size: tuple[int, int]) -> None:
    """Raises CommandError for a size (height, width) out of range."""
    if any(not 1 <= side <= MOST_SIDE for side in size):
        raise CommandError(f"--size must be of sides in 1..{MOST_SIDE} pixels, got {'x'.join(map(_short, size))}")


def _short(value: int) -> str:
    """Returns a number as text, or roughly if it is huge: Python refuses to print integers of thousands of digits."""
    if value == MOST_SEED:
        return "2**63 - 1"
    return str(value) if abs(value) < 10**40 else f"about 2^{value.bit_length()}"
