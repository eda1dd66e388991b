"""What the exact laboratory is asked: dense steps, pooled plans, targets, other sizes and spectra. Each yields rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ...registry import Row
from .levels import BETA, LOG_RATIO, native_levels
from .linear import Distances, Solver
from .plan import Plan, cost_by_tokens, cost_on_flux, dense, pooled, pooled_plans
from .study import Found, Study, Way, dense_line, front, ratios_to_dense, search_levels, search_plans
from .targets import TARGETS, candidates, is_just_in_time, shares_of_limit

FLUX = Study((128, 128), (2.0, 2.6))  # 1024x1024 pixels: 64x64 tokens
WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "Beta levels": Way(BETA, "dpmpp_2m"),
        "Beta levels, across": Way(BETA, "dpmpp_2m_across"),
        "log-ratio levels, across": Way(LOG_RATIO, "dpmpp_2m_across"),
    }
)
SOLVERS: Mapping[Solver, str] = MappingProxyType(
    {"euler": "Euler", "dpmpp_2m": "2M", "dpmpp_2m_across": "2M across stages"}
)
_MOST, _COSTS = (4, 10, 10), (3.0, 12.5)  # steps pooled by 4, pooled by 2, dense; dense steps of FLUX.1-dev


def dense_steps(study: Study = FLUX, counts: Sequence[int] = range(4, 13)) -> Iterator[Row]:
    """Yields dense steps: Euler's on the model's own levels, 2M on those, and 2M with levels searched."""
    for steps in (7, 28, 50):
        yield _row(study, dense(steps), native_levels(steps), "native", "euler")
    for steps in (7, 10, 28):
        yield _row(study, dense(steps), native_levels(steps), "native", "dpmpp_2m")
    for family in (BETA, LOG_RATIO):
        line = dense_line(study, family)
        for steps in counts:
            found = search_levels(dense(steps), study, Way(family))
            yield _found_row(study, found, {"relative_mse_levels_alone": _by_spectrum(study, line[steps])})


def plans(way: Way, study: Study = FLUX, most: Sequence[int] = _MOST) -> Iterator[Row]:
    """Yields the front of plans of which half of the steps are pooled, then the best for each target.

    `limit_share` is the error over the least limit of the target, against dense steps on the same family of levels.
    """
    family = way.family
    line = dense_line(study, family)
    chosen = [plan for plan in pooled_plans(most, study.num_tokens, _COSTS) if is_just_in_time(plan)]
    found = search_plans(chosen, study, way)
    for each in front(found, study):
        ratios = ratios_to_dense(each.errors, cost_on_flux(each.plan, study.num_tokens), line)
        yield _found_row(study, each, {"ratio_to_dense": _by_spectrum(study, ratios)})
    for factor in (2, 4):
        some = [each for each in found if each.plan.cell <= factor]
        for preset, target in TARGETS.items():
            shares = {each: shares_of_limit(target, each, study, family) for each in candidates(target, some, study)}
            best = min(shares, key=lambda each: max(shares[each]))
            ratios = ratios_to_dense(best.errors, cost_on_flux(best.plan, study.num_tokens), line)
            extra = {
                "target": preset,
                "largest_factor": factor,
                "limit_share": _by_spectrum(study, shares[best]),
                "ratio_to_dense": _by_spectrum(study, ratios),
            }
            yield _found_row(study, best, extra, f"{preset}, factors to {factor}: ")


# The two-stage plan of each preset, and its levels as searched by `plans`; for comparison the dense steps of its cost.
PRESETS: Mapping[str, Mapping[str, tuple[Plan, tuple[float, float]]]] = MappingProxyType(
    {
        "Beta levels": {
            "10x": (pooled((6, 2), (3, 1)), (1.33, 0.359)),
            "7x": (pooled((7, 2), (5, 1)), (0.839, 0.267)),
            "4x": (pooled((10, 2), (9, 1)), (0.597, 0.218)),
        },
        "Beta levels, across": {
            "10x": (pooled((6, 2), (3, 1)), (0.695, 0.212)),
            "7x": (pooled((7, 2), (5, 1)), (0.502, 0.172)),
            "4x": (pooled((9, 2), (9, 1)), (0.234, 0.118)),
        },
        "log-ratio levels, across": {
            "10x": (pooled((4, 2), (3, 1)), (-5.27, 2.62)),
            "7x": (pooled((5, 2), (5, 1)), (-9.4, 5.02)),
            "4x": (pooled((9, 2), (9, 1)), (-6.64, 2.62)),
        },
    }
)


def elsewhere(sides: Sequence[int] = (64, 128, 256)) -> Iterator[Row]:
    """Yields plans on levels that were searched at 128x128 latents for 2.0 and 2.6, at other sizes and spectra."""
    for side in sides:
        study = Study((side, side), (1.4, 2.0, 2.3, 2.6, 3.0))
        for name, presets in PRESETS.items():
            way = WAYS[name]
            for preset, (plan, parameters) in presets.items():
                levels = way.family.levels(plan.steps, *parameters)
                yield _row(study, plan, levels, way.family.name, way.solver, {"target": preset}, parameters)
        for family in (BETA, LOG_RATIO):
            for steps in (5, 7):
                found = search_levels(dense(steps), FLUX, Way(family))
                yield _row(study, found.plan, found.levels, family.name, "dpmpp_2m", {}, found.parameters)
        for steps in (28, 50):
            yield _row(study, dense(steps), native_levels(steps), "native", "euler")


def earlier_rows() -> Iterator[Row]:
    """Yields rows that a sampled program had before, for comparison."""
    small = Study((32, 32), (1.4, 2.0))
    for plan in (dense(6), dense(7), pooled((4, 2), (5, 1))):
        yield _row(small, plan, BETA.levels(plan.steps, 1.4, 0.425), BETA.name, "dpmpp_2m", {}, (1.4, 0.425))
    for steps in (7, 28, 50):
        yield _row(small, dense(steps), native_levels(steps), "native", "euler")
    middle = Study((64, 64), (2.0, 2.6))
    for plan in (dense(6), dense(8), pooled((2, 4), (4, 2), (4, 1)), pooled((2, 4), (4, 2), (5, 1))):
        yield _found_row(middle, search_levels(plan, middle))
    for plan in (pooled((4, 2), (4, 1)), pooled((6, 2), (5, 1))):
        yield _found_row(FLUX, search_levels(plan, FLUX))


def _found_row(study: Study, found: Found, extra: Mapping[str, Any] = MappingProxyType({}), name: str = "") -> Row:
    family, solver = found.way.family.name, found.way.solver
    return _row(study, found.plan, found.levels, family, solver, extra, found.parameters, name)


def _row(
    study: Study,
    plan: Plan,
    levels: Sequence[float],
    family: str,
    solver: Solver,
    extra: Mapping[str, Any] = MappingProxyType({}),
    parameters: Sequence[float] = (),
    name: str = "",
) -> Row:
    distances = study.distances(plan, levels, solver)
    return row_of(
        study, plan, distances, solver, {"levels": family, "level_parameters": list(parameters), **extra}, name
    )


def row_of(
    study: Study,
    plan: Plan,
    distances: Sequence[Distances],
    solver: Solver,
    extra: Mapping[str, Any],
    name: str = "",
) -> Row:
    """Returns the row of a run. extra: at least its `levels` and `level_parameters`."""
    errors = _by_spectrum(study, [each.relative_mse for each in distances])
    fields = {
        "method": f"{name}{plan}, {extra['levels']} levels, {SOLVERS[solver]}",
        "plan": str(plan),
        "grid": list(study.grid),
        "steps": plan.steps,
        "cheap_steps": plan.cheap_steps,
        "solver": solver,
        "cost_dense_steps": round(cost_on_flux(plan, study.num_tokens), 4),
        "cost_dense_steps_by_tokens": cost_by_tokens(plan),
        "relative_mse": errors,
        "wasserstein_2": _by_spectrum(study, [each.wasserstein_2 for each in distances]),
        "dtype": "float64",
        **extra,
    }
    shown = ", ".join(f"{value:.5f} at {spectrum}" for spectrum, value in errors.items())
    return Row(line=f"{fields['method']}: {fields['cost_dense_steps']:.2f} dense steps, error {shown}", fields=fields)


def _by_spectrum(study: Study, values: Sequence[float]) -> dict[str, float]:
    return {f"{exponent:.1f}": float(f"{value:.5g}") for exponent, value in zip(study.exponents, values, strict=True)}
