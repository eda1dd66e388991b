"""Questions for the exact laboratory: dense steps, pooled plans, targets, other sizes and spectra. Each yields rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import POOLED_PLANS
from jitaccel.method.presets import PRESETS as PRODUCT

from ...registry import Measurement
from .levels import BETA, LOG_RATIO, SPACED_BETA, native_levels
from .linear import Distances, Solver
from .mixture import SCORES, Mixture, by_truth
from .plan import Plan, Stage, cost_by_tokens, cost_on_flux, dense, pooled, pooled_plans
from .study import (
    DoubtfulStudy,
    Found,
    Study,
    Way,
    dense_line,
    front,
    ratios_to_dense,
    search_levels,
    search_plans,
    with_levels,
)
from .targets import TARGETS, candidates, is_just_in_time, shares_of_limit

FLUX = Study((128, 128), (2.0, 2.6))  # 1024x1024 pixels: 64x64 tokens
VIDEO = Study((13, 60, 104), (3.0, 3.6))  # 13x30x52 tokens
MIXTURE = Mixture()
WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "Beta levels": Way(BETA, "dpmpp_2m"),
        "Beta levels, across": Way(BETA, "dpmpp_2m_across"),
        "log-ratio levels, across": Way(LOG_RATIO, "dpmpp_2m_across"),
        "spaced Beta levels, across": Way(SPACED_BETA, "dpmpp_2m_across"),
    }
)
SOLVERS: Mapping[Solver, str] = MappingProxyType(
    {"euler": "Euler", "dpmpp_2m": "2M", "dpmpp_2m_across": "2M across stages"}
)
_MOST, _COSTS = (4, 10, 10), (3.0, 12.5)  # steps pooled by 4, pooled by 2, dense; dense steps of FLUX.1-dev


def dense_steps(study: Study = FLUX, counts: Sequence[int] = range(4, 13)) -> Iterator[Measurement]:
    """Yields dense steps: Euler on the model's own levels, 2M on these levels, and 2M on searched levels."""
    for steps in (7, 28, 50):
        yield row(study, dense(steps), native_levels(steps), "native", "euler")
    for steps in (7, 10, 28):
        yield row(study, dense(steps), native_levels(steps), "native", "dpmpp_2m")
    for family in (BETA, LOG_RATIO):
        line = dense_line(study, family)
        for steps in counts:
            found = search_levels(dense(steps), study, Way(family))
            yield found_row(study, found, {"relative_mse_levels_alone": by_spectrum(study, line[steps])})


def plans(way: Way, study: Study = FLUX, most: Sequence[int] = _MOST) -> Iterator[Measurement]:
    """Yields the front of plans with at least half of the steps pooled, then the best plan for each affordable target.

    `limit_share` is the error divided by the target's smallest limit, against dense steps on the same family of levels.
    """
    family = way.family
    line = dense_line(study, family)
    chosen = [plan for plan in pooled_plans(most, study.num_tokens, _COSTS) if is_just_in_time(plan)]
    found = search_plans(chosen, study, way)
    for each in front(found, study):
        ratios = ratios_to_dense(each.errors, cost_on_flux(each.plan, study.num_tokens), line)
        yield found_row(study, each, {"ratio_to_dense": by_spectrum(study, ratios)})
    for factor in (2, 4):
        some = [each for each in found if each.plan.cell <= factor]
        for preset, target in TARGETS.items():
            shares = {each: shares_of_limit(target, each, study, family) for each in candidates(target, some, study)}
            if not shares:
                continue
            best = min(shares, key=lambda each: max(shares[each]))
            ratios = ratios_to_dense(best.errors, cost_on_flux(best.plan, study.num_tokens), line)
            extra = {
                "target": preset,
                "largest_factor": factor,
                "limit_share": by_spectrum(study, shares[best]),
                "ratio_to_dense": by_spectrum(study, ratios),
            }
            yield found_row(study, best, extra, f"{preset}, factors to {factor}: ")


def product_plan(config: JiTConfig) -> Plan:
    """Returns the stages of a product configuration."""
    starts = (0, *config.stage_ends(int(config.steps)))
    factors = [config.pooling_of(stage) for stage in range(config.num_stages)]
    return Plan(
        tuple(
            Stage(steps=b - a, factor=factor, density=density if factor == 1 else 1.0)
            for (a, b), factor, density in zip(pairwise(starts), factors, config.densities, strict=True)
        )
    )


def product_presets() -> Iterator[Measurement]:
    """Yields the product's pooled presets against their targets, and every plan of `preset="auto"`."""
    line, names = dense_line(FLUX), {config: name for name, config in PRODUCT.items()}
    for config in POOLED_PLANS.values():
        way, parameters = WAYS["spaced Beta levels, across"], (config.alpha, config.beta)
        found = with_levels(product_plan(config), FLUX, way, parameters)
        ratios = ratios_to_dense(found.errors, cost_on_flux(found.plan, FLUX.num_tokens), line)
        extra: dict[str, Any] = {"ratio_to_dense": by_spectrum(FLUX, ratios)}
        if (preset := names.get(config)) is not None:
            shares = shares_of_limit(TARGETS[preset], found, FLUX)
            extra |= {"target": preset, "limit_share": by_spectrum(FLUX, shares)}
        yield found_row(FLUX, found, extra)


# Two-stage plans found by `plans`, with their levels, some of which are equal in bfloat16.
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


def elsewhere(sides: Sequence[int] = (64, 128, 256)) -> Iterator[Measurement]:
    """Yields plans at other sizes and spectra, on levels that were searched at 128x128 latents for 2.0 and 2.6."""
    for side in sides:
        study = Study((side, side), (1.4, 2.0, 2.3, 2.6, 3.0))
        for name, presets in PRESETS.items():
            way = WAYS[name]
            for preset, (plan, parameters) in presets.items():
                levels = way.family.levels(plan.steps, *parameters)
                yield row(study, plan, levels, way.family.name, way.solver, {"target": preset}, parameters)
        for family in (BETA, LOG_RATIO):
            for steps in (5, 7):
                found = search_levels(dense(steps), FLUX, Way(family))
                yield row(study, found.plan, found.levels, family.name, "dpmpp_2m", {}, found.parameters)
        for steps in (28, 50):
            yield row(study, dense(steps), native_levels(steps), "native", "euler")


def other_half_size(offsets: Sequence[float] = (-0.3, -0.15, 0.0, 0.15, 0.3)) -> Iterator[Measurement]:
    """Yields the presets' plans with a network that assumes a different spectrum at half size than at full size."""
    for offset in offsets:
        study = Study(FLUX.shape, FLUX.exponents, offset)
        for name, presets in PRESETS.items():
            way = WAYS[name]
            for preset, (plan, parameters) in presets.items():
                levels = way.family.levels(plan.steps, *parameters)
                extra = {"target": preset, "pooled_off_by": offset}
                start = f"half size off by {offset:g}: "
                yield row(study, plan, levels, way.family.name, way.solver, extra, parameters, start)


def doubtful_half_size(solver: Solver, study: Study = FLUX, most: Sequence[int] = (0, 8, 9)) -> Iterator[Measurement]:
    """Yields the front of plans that are good on average if the spectrum at half size is off by -0.15, 0 or 0.15.

    `relative_mse` is the error without an offset, `relative_mse_off` with the others. Plans have at least one pooled
    step.
    """
    doubtful = DoubtfulStudy(study.shape, study.exponents)
    chosen = [plan for plan in pooled_plans(most, study.num_tokens, _COSTS) if plan.cheap_steps]
    line = dense_line(study)
    for each in front(search_plans(chosen, doubtful, Way(BETA, solver)), doubtful):
        off = {}
        for offset in doubtful.offsets:
            errors = Study(study.shape, study.exponents, offset).errors(each.plan, each.levels, solver)
            off[f"{offset:g}"] = by_spectrum(study, errors)
        worst = [max(errors[spectrum] for errors in off.values()) for spectrum in off["0"]]
        ratios = ratios_to_dense(worst, cost_on_flux(each.plan, study.num_tokens), line)
        extra = {"relative_mse_off": off, "worst_ratio_to_dense": by_spectrum(study, ratios)}
        yield row(study, each.plan, each.levels, BETA.name, solver, extra, each.parameters)


def activation(mixture: Mixture = MIXTURE, count: int = 32, seed: int = 0) -> Iterator[Measurement]:
    """Yields the effect of activation by importance on pictures with localised detail, for two plans.

    `more_than_random` is the mean over pictures of the squared error minus that of random activation, divided by the
    mean of the latter; `standard_error` is its standard error. "truth" knows where the exact result has its detail.
    """
    noise = mixture.noise(count, seed)
    end = mixture.end(noise)
    ways = {**SCORES, "truth": by_truth(mixture, end)}
    for densities, boundaries in (((0.32, 0.6, 1.0), (0.4, 0.65, 1.0)), ((0.25, 0.5, 1.0), (0.25, 0.8, 1.0))):
        config = JiTConfig(
            densities=densities, boundaries=boundaries, steps=11, lifter="clean", micro_flow="none", solver="dpmpp_2m"
        )
        starts = (0, *config.stage_ends(11))
        plan = Plan(tuple(Stage(steps=b - a, density=d) for (a, b), d in zip(pairwise(starts), densities, strict=True)))
        errors = {
            name: (mixture.run(config, noise, scores) - end).square().flatten(1).mean(1)
            for name, scores in ways.items()
        }
        for name, found in errors.items():
            more = (found - errors["random"]) / errors["random"].mean()
            fields = {
                "method": f"{plan}, activated by {name}",
                "plan": str(plan),
                "activated_by": name,
                "grid": list(mixture.grid),
                "steps": plan.steps,
                "pictures": count,
                "seed": seed,
                "relative_mse_of_mixture": float(f"{found.mean() / end.square().mean():.5g}"),
                "more_than_random": float(f"{more.mean():.3g}"),
                "standard_error": float(f"{more.std() / count**0.5:.3g}"),
            }
            shown = f"error {found.mean() / end.square().mean():.4f}, {100 * more.mean():+.1f} %"
            yield Measurement(line=f"{plan}, activated by {name}: {shown}", fields=fields)


def video(study: Study = VIDEO) -> Iterator[Measurement]:
    """Yields dense and pooled steps on 13x30x52 tokens, pooled within frames.

    A frame of a field in three dimensions with power k^-(p + 1) has k^-p.
    """
    for plan in (dense(5), dense(6), dense(7), dense(8)):
        yield found_row(study, search_levels(plan, study))
    for solver in ("dpmpp_2m", "dpmpp_2m_across"):
        for cheap, whole in ((6, 3), (4, 4), (7, 5)):
            yield found_row(study, search_levels(pooled((cheap, 2), (whole, 1)), study, Way(BETA, solver)))


def earlier_rows() -> Iterator[Measurement]:
    """Yields plans that an earlier sampling program measured, for comparison."""
    small = Study((32, 32), (1.4, 2.0))
    for plan in (dense(6), dense(7), pooled((4, 2), (5, 1))):
        yield row(small, plan, BETA.levels(plan.steps, 1.4, 0.425), BETA.name, "dpmpp_2m", {}, (1.4, 0.425))
    for steps in (7, 28, 50):
        yield row(small, dense(steps), native_levels(steps), "native", "euler")
    middle = Study((64, 64), (2.0, 2.6))
    for plan in (dense(6), dense(8), pooled((2, 4), (4, 2), (4, 1)), pooled((2, 4), (4, 2), (5, 1))):
        yield found_row(middle, search_levels(plan, middle))
    for plan in (pooled((4, 2), (4, 1)), pooled((6, 2), (5, 1))):
        yield found_row(FLUX, search_levels(plan, FLUX))


def found_row(
    study: Study, found: Found, extra: Mapping[str, Any] = MappingProxyType({}), name: str = ""
) -> Measurement:
    """Returns the row of a plan on the levels found for it."""
    family, solver = found.way.family.name, found.way.solver
    return row(study, found.plan, found.levels, family, solver, extra, found.parameters, name)


def row(
    study: Study,
    plan: Plan,
    levels: Sequence[float],
    family: str,
    solver: Solver,
    extra: Mapping[str, Any] = MappingProxyType({}),
    parameters: Sequence[float] = (),
    name: str = "",
) -> Measurement:
    """Returns the row of a plan on levels of a family, with `extra` fields."""
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
) -> Measurement:
    """Returns the row of a run; `extra` must contain `levels` and `level_parameters`."""
    errors = by_spectrum(study, [each.relative_mse for each in distances])
    between = [each.wasserstein_2 for each in distances if each.wasserstein_2 is not None]
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
        **({"wasserstein_2": by_spectrum(study, between)} if between else {}),
        "dtype": "float64",
        **extra,
    }
    shown = ", ".join(f"{value:.5f} at {spectrum}" for spectrum, value in errors.items())
    line = f"{fields['method']}: {fields['cost_dense_steps']:.2f} dense steps, error {shown}"
    return Measurement(line=line, fields=fields)


def by_spectrum(study: Study, values: Sequence[float]) -> dict[str, float]:
    """Returns values by spectrum, with five digits."""
    return {f"{exponent:.1f}": float(f"{value:.5g}") for exponent, value in zip(study.exponents, values, strict=True)}
