"""What a preset has to reach on the exact laboratory, and whether a plan does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .levels import BETA, Family, native_levels
from .plan import Plan, cost_on_flux, dense
from .study import Found, Study, dense_line, ratios_to_dense


@dataclass(frozen=True, kw_only=True)
class Target:
    """Limits of a preset; every limit holds for each spectrum.

    Attributes:
        cost: Most it may cost, in dense steps of FLUX.1-dev.
        of_equal_cost: Most of the error of dense 2M steps of equal cost, or None.
        of_dense: No more error than so many dense 2M steps have, or None.
        of_euler: No more error than so many Euler steps on the model's own levels have, or None.
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
    """Returns the error of each spectrum over the least limit of a target; 1 or less meets it.

    Args:
        target: Of a preset.
        found: The plan.
        study: The fields.
        line_of: Family of levels that the dense steps have, searched for each spectrum alone.
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
    """Returns the plans that a target's cost allows and of which at least half of the steps are cheap."""
    affordable = (found for found in among if cost_on_flux(found.plan, study.num_tokens) <= target.cost)
    return [found for found in affordable if is_just_in_time(found.plan)]


def _over(errors: Sequence[float], limits: Sequence[float]) -> list[float]:
    return [error / limit for error, limit in zip(errors, limits, strict=True)]
