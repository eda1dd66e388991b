"""An overview of the presets, computed from their fields: steps, what the network sees, and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..method.config import JiTConfig
from ..method.presets import DENSE_STEPS, PRESETS
from .control import loop_cost

FEWER_STEPS = 28  # the other common number of steps for FLUX.1-dev
_POOLED = {2: "half the size", 4: "a quarter of the size"}


@dataclass(frozen=True, kw_only=True)
class PresetRow:
    """A preset. `cost`: in dense steps. `speedups`: by operations, against DENSE_STEPS and FEWER_STEPS dense steps."""

    name: str
    steps: int
    shown: str
    cost: float

    @property
    def speedups(self) -> tuple[float, float]:
        return DENSE_STEPS / self.cost, FEWER_STEPS / self.cost


def stages(config: JiTConfig) -> tuple[str, ...]:
    """Returns, for each stage, its number of steps and what the network sees in them, in words.

    Args:
        config: Must have a fixed number of steps.
    """
    lengths = config.stage_lengths(int(config.steps))
    return tuple(f"{n} {_seen(config, stage)}" for stage, n in enumerate(lengths))


def _seen(config: JiTConfig, stage: int) -> str:
    factor, density = config.pooling_of(stage), config.densities[stage]
    if factor > 1:
        return f"at {_POOLED[factor]}"
    return "on all tokens" if density == 1.0 else f"on {density:.0%} of the tokens"


def overview(grid: Sequence[int], cost: Callable[[int], int]) -> tuple[PresetRow, ...]:
    """Returns a row for each preset.

    Args:
        grid: Tokens of the picture, (h, w).
        cost: Operations of one forward by its number of tokens.
    """
    dense = cost(math.prod(grid))
    rows = []
    for name, config in PRESETS.items():
        steps = int(config.steps)
        operations = loop_cost(config, config.stage_tokens(grid), cost, steps)
        rows.append(PresetRow(name=name, steps=steps, shown=", then ".join(stages(config)), cost=operations / dense))
    return tuple(rows)
