"""Plans: the numbers of pooled, subset and dense steps, and their cost."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from jitaccel.patches.flux.flops import flux_flops

from ...pipelines import FLUX_DEV

TEXT_TOKENS = 512  # FLUX.1-dev's


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps of one kind.

    Attributes:
        steps: Number of steps.
        factor: Side of the averaged areas; 1 averages nothing.
        density: Share of the tokens that the network sees; 1.0 is all of them.
    """

    steps: int
    factor: int = 1
    density: float = 1.0

    @property
    def share(self) -> float:
        """Share of the tokens that enter the network."""
        return self.density / self.factor**2

    def __str__(self) -> str:
        kind = f"pooled by {self.factor}" if self.factor > 1 else f"at {self.density:.0%}"
        return f"{self.steps} {'dense' if self.share == 1.0 else kind}"


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run."""

    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def cheap_steps(self) -> int:
        """Number of steps that do not see every token."""
        return sum(stage.steps for stage in self.stages if stage.share < 1.0)

    @property
    def cell(self) -> int:
        """Largest pooling factor."""
        return max(stage.factor for stage in self.stages)

    def __str__(self) -> str:
        return ", ".join(map(str, self.stages))


def dense(steps: int) -> Plan:
    """Returns a plan of dense steps."""
    return Plan((Stage(steps=steps),))


def pooled(*steps_of: tuple[int, int]) -> Plan:
    """Returns a plan from pairs of (steps, factor); pairs without steps are left out."""
    return Plan(tuple(Stage(steps=steps, factor=factor) for steps, factor in steps_of if steps))


def cost_by_tokens(plan: Plan) -> float:
    """Returns the cost in dense steps if the cost of a step is its share of the tokens."""
    return sum(stage.steps * stage.share for stage in plan.stages)


def cost_on_flux(plan: Plan, num_tokens: int) -> float:
    """Returns the cost in dense steps of FLUX.1-dev, attention and 512 text tokens included (`flux_flops`)."""
    return sum(stage.steps * _share_on_flux(int(stage.share * num_tokens), num_tokens) for stage in plan.stages)


@functools.lru_cache(maxsize=1024)
def _share_on_flux(tokens: int, num_tokens: int) -> float:
    return flux_flops(FLUX_DEV, tokens, TEXT_TOKENS) / flux_flops(FLUX_DEV, num_tokens, TEXT_TOKENS)


def pooled_plans(most: Sequence[int], num_tokens: int, costs: tuple[float, float]) -> list[Plan]:
    """Returns the plans of pooled-by-4, pooled-by-2 and dense steps within a range of costs on FLUX.1-dev.

    Args:
        most: Largest number of steps of each of the three kinds; a plan has at least one dense step.
        num_tokens: Number of tokens of the whole picture.
        costs: Smallest and largest cost, in dense steps.
    """
    found = [
        pooled((by_four, 4), (by_two, 2), (whole, 1))
        for by_four in range(most[0] + 1)
        for by_two in range(most[1] + 1)
        for whole in range(1, most[2] + 1)
    ]
    return [plan for plan in found if costs[0] <= cost_on_flux(plan, num_tokens) <= costs[1]]
