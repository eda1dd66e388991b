"""Finds the step that a call of the network belongs to: its index, stage, noise level and next level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config import JiTConfig
from .schedule import match_level, noise_levels, predict_next_level, stage_of_level, stage_starts_by_level


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the sampler, from `noise_level` to `next_level`.

    `may_end_stage`: whether a new stage may follow, so that the inputs of activation must be kept.
    `matched`: the index of this level among the expected ones; -1 if none matches, that is, the sampler has its own
    levels.
    """

    index: int
    stage: int
    noise_level: float
    next_level: float
    may_end_stage: bool
    matched: int = -1


class KnownLevels:
    """The clock of a sampler with known levels; stages are shares of its steps."""

    def __init__(self, config: JiTConfig, levels: Sequence[float]) -> None:
        self.levels = tuple(levels)
        self.num_steps = len(self.levels) - 1
        self._ends = config.stage_ends(self.num_steps)

    def step(self, index: int) -> Step:
        """Returns the step with an index in 0 .. num_steps - 1."""
        return Step(
            index=index,
            stage=sum(index >= end for end in self._ends),
            noise_level=self.levels[index],
            next_level=self.levels[index + 1],
            may_end_stage=index + 1 in self._ends[:-1],
        )

    def follow(self, previous: Step | None, noise_level: float) -> Step | None:
        """Returns the step after `previous`, or None if its level is not `noise_level`."""
        index = 0 if previous is None else previous.index + 1
        if index >= self.num_steps or match_level(noise_level, self.levels[index : index + 2]) != 0:
            return None
        if not is_rounding_of(noise_level, self.levels[index]):
            return None
        return self.step(index)


class PredictedLevels:
    """The clock of an unknown sampler: stages go by noise level, the next level is predicted.

    A stage starts at the level where it starts on the configuration's own levels. A sampler that uses those levels is
    predicted exactly.
    """

    def __init__(self, config: JiTConfig) -> None:
        self._levels = noise_levels(config)
        self._starts = stage_starts_by_level(config)
        self._ends = config.stage_ends(len(self._levels) - 1)
        self._num_stages = config.num_stages

    def follow(self, previous: Step | None, noise_level: float) -> Step:
        """Returns the step that starts at `noise_level` after `previous`."""
        match = self._match(previous, noise_level)
        level = noise_level if match is None else self._levels[match]
        expected = stage_of_level(level, self._starts) if match is None else sum(match >= end for end in self._ends)
        stage = max(expected, 0 if previous is None else previous.stage)
        return Step(
            index=0 if previous is None else previous.index + 1,
            stage=stage,
            noise_level=level,
            next_level=self._next_level(previous, level, match),
            may_end_stage=stage + 1 < self._num_stages,
            matched=-1 if match is None else match,
        )

    def _match(self, previous: Step | None, noise_level: float) -> int | None:
        """Returns the index of the matching expected level, if the sampler has followed them since its first step.

        A single level near an expected one may be chance, and its step would be taken for one of another length.
        """
        after = -1 if previous is None else previous.matched
        if previous is not None and after < 0:
            return None
        match = match_level(noise_level, self._levels, after)
        if match is None or (previous is not None and match != after + 1):
            return None
        return match if is_rounding_of(noise_level, self._levels[match]) else None

    def _next_level(self, previous: Step | None, level: float, match: int | None) -> float:
        if match is not None:
            return self._levels[match + 1]
        if previous is not None:
            return predict_next_level(level, (), previous.noise_level)
        return predict_next_level(level, self._levels)


def is_rounding_of(value: float, level: float) -> bool:
    """Returns whether `value` may be `level` after the rounding that its own digits show: bfloat16, float16 or none.

    In half precision a level is rounded twice (`match_level`), so it may be off by one unit in the last place.
    """
    significand = math.frexp(value)[0]
    tolerance = next((2.0 ** (1 - bits) for bits in (8, 11) if (significand * 2.0**bits).is_integer()), 1e-4)
    return abs(value - level) <= tolerance * value
