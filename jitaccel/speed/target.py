"""A target speed as a preset: `preset=jitaccel.Auto(speedup=8)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..method.checks import is_finite_number


@dataclass(frozen=True, kw_only=True)
class Auto:
    """A target speed instead of a preset. jitaccel times a few steps and picks steps and densities that reach it.

    Args:
        speedup: Relative to 50 dense steps of the untouched model, above 1. Give this or `ms`.
        ms: Milliseconds for the denoising loop of one image and one branch; true CFG takes twice that.
        size: (height, width) in pixels to measure at; defaults to the pipeline's size.
        text_tokens: Prompt length to measure with, including padding; defaults to the pipeline's padded length.
        call: Further arguments of the pipeline's call to measure with, for models other than FLUX: `num_frames` of a
            video, or the `image` it is made from.

    Raises:
        ConfigError: If not exactly one target is given, or if it is not a valid speed.
    """

    speedup: float | None = None
    ms: float | None = None
    size: tuple[int, int] | None = None
    text_tokens: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := target_problems("Auto", ("speedup", "ms"), (self.speedup, self.ms)):
            raise ConfigError("\n".join(problems))


def target_problems(function: str, names: tuple[str, str], values: tuple[float | None, float | None]) -> list[str]:
    """Returns what is wrong with a speed-up and milliseconds, which `function` takes by these names; one is needed."""
    problems, (speedup, ms) = [], values
    if (speedup is None) == (ms is None):
        problems.append(
            f"{function}: one of {names[0]} and {names[1]} must be given, got {'none' if ms is None else 'both'}; "
            f"say how fast, for example {names[0]}=8.0"
        )
    if speedup is not None and not (is_finite_number(speedup) and speedup > 1.0):
        problems.append(
            f'{function}: {names[0]} must be a finite number above 1, got {speedup!r}; use preset="dense" for 1'
        )
    if ms is not None and not (is_finite_number(ms) and ms > 0.0):
        problems.append(f"{function}: {names[1]} must be a finite number above 0, got {ms!r}; give milliseconds")
    return problems
