"""Checks of values that describe stages, steps and levels; each returns a truth value or problems, or raises."""

import math
import numbers
from itertools import pairwise
from typing import TypeGuard

from ..errors import ConfigError, suggestion

MAX_STEPS = 10_000  # bounds the search for a step count that works; no sampler runs more steps


def is_whole(value: object) -> TypeGuard[int]:
    """Returns whether a value is a whole number; numpy integers count, booleans do not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_steps(function: str, value: object) -> None:
    """Raises ConfigError, in the name of `function`, unless `value` is a valid number of sampler steps."""
    if not is_step_count(value):
        raise ConfigError(
            f"{function}: steps must be a whole number from 1 to {MAX_STEPS}, got {value!r}; "
            f"pass the number of steps of the sampler"
        )


def is_step_count(value: object) -> TypeGuard[int]:
    """Returns whether a value is a valid number of sampler steps."""
    return is_whole(value) and 1 <= value <= MAX_STEPS


def is_finite_number(value: object) -> TypeGuard[float]:
    """Returns whether a value is a real number that a float can hold."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def stage_problems(name: str, shares: tuple[float, ...], remedy: str) -> list[str]:
    """Returns what is wrong with a field of one share per stage; shares must rise strictly to 1.0."""
    problems = []
    if not all(0.0 < share <= 1.0 for share in shares):
        problems.append(f"JiTConfig: {name} must lie in (0, 1], got {shares}; give shares, not counts")
    if any(after <= before for before, after in pairwise(shares)):
        problems.append(f"JiTConfig: {name} must rise strictly, got {shares}; {remedy}")
    if shares[-1] != 1.0:
        problems.append(f"JiTConfig: {name} must end in 1.0, got {shares}; set the last stage's to 1.0")
    return problems


def choice_problems(name: str, value: object, allowed: tuple[str, ...]) -> list[str]:
    """Returns what is wrong with a field that must hold one of the allowed words."""
    if isinstance(value, str) and value in allowed:
        return []
    return [
        f"JiTConfig: {name} must be one of {', '.join(allowed)}, got {value!r}; "
        f"{suggestion(value, allowed)}"
    ]
