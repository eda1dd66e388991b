"""The targets of presets in the exact laboratory, and checks of plans against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .levels import BETA, Family, native_levels
from .plan import Plan, cost_on_flux, dense
from .study import Found, Study, dense_line, ratios_to_dense


@dataclass(frozen=True, kw_only=True)
class Target:
    """The limits of a preset, which apply to each spectrum.

    Attributes:
        cost: Largest cost, in dense steps of FLUX.1-dev.
        of_equal_cost: Largest error as a multiple of that of dense 2M steps of equal cost, or None.
        of_dense: Number of dense 2M steps whose error must not be exceeded, or None.
        of_euler: Number of Euler steps on the model's own levels whose error must not be exceeded, or None.
    """

    cost: float
    of_equal_cost: float | None = None
    of_dense: int | None = None
    of_euler: int | None = None


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "10x": Target(cost=5.0, of_dense=6),
        "7x": Target(cost=7.2, of_equal_cost=0.5, of_euler=28),
        "4x": Target(cost=12.5, of_euler=50),
    }
)


def is_just_in_time(plan: Plan) -> bool:
    """Returns whether at least half of a plan's steps are cheap."""
    return 2 * plan.cheap_steps >= plan.steps


def shares_of_limit(target: Target, found: Found, study: Study, line_of: Family = BETA) -> tuple[float, ...]:
    """Returns the error for each spectrum divided by the smallest limit of a target; 1 or less meets the target.

    Args:
        target: The target of a preset.
        found: The plan.
        study: The fields.
        line_of: Family of levels for the dense steps, searched separately for each spectrum.
    """
    line = dense_line(study, line_of)
    shares: list[Sequence[float]] = []
    if target.of_equal_cost is not None:
        ratios = ratios_to_dense(found.errors, cost_on_flux(found.plan, study.num_tokens), line)
        shares.append([ratio / target.of_equal_cost for ratio in ratios])
    if target.of_dense is not None:
        shares.append(_over(found.errors, line[target.of_dense]))
    if target.of_euler is not None:
        steps = target.of_euler
        shares.append(_over(found.errors, study.errors(dense(steps), native_levels(steps), "euler")))
    return tuple(map(max, zip(*shares, strict=True)))


def candidates(target: Target, among: Sequence[Found], study: Study) -> list[Found]:
    """Returns the plans within a target's cost with at least half of the steps cheap."""
    affordable = (found for found in among if cost_on_flux(found.plan, study.num_tokens) <= target.cost)
    return [found for found in affordable if is_just_in_time(found.plan)]


def _over(errors: Sequence[float], limits: Sequence[float]) -> list[float]:
    return [error / limit for error, limit in zip(errors, limits, strict=True)]
