"""Questions for the exact laboratory about subset stages, at 16x16 tokens exactly and at 64x64 on sampled noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS as PRODUCT

from ...registry import Measurement
from .levels import BETA, SPACED_BETA
from .linear import Distances, Solver
from .plan import Plan, Stage, cost_on_flux, dense, pooled
from .questions import FLUX, by_spectrum, found_row, product_plan, row, row_of
from .study import Found, Study, Way, refined, search_levels, with_levels
from .subset import SampledSubsetStudy, SubsetStudy, Variant

LARGE = SampledSubsetStudy(FLUX.shape, FLUX.exponents, count=64)
_SEARCHED_ON = 8  # pictures used in searches; rows use 64

_PAPER = Plan((Stage(steps=4, density=0.32), Stage(steps=3, density=0.6), Stage(steps=4)))  # 7x-paper
_PAPER_LEVELS = (1.4, 0.425)
_VARIANTS: Mapping[str, tuple[Variant, Solver]] = MappingProxyType(
    {
        "velocity lifted, released blend, fresh noise": (Variant("velocity", 1.0 / 3.0, "fresh"), "euler"),
        "velocity lifted, exact micro-flow, fresh noise": (Variant("velocity", 1.0, "fresh"), "euler"),
        "velocity lifted, exact micro-flow, own noise": (Variant("velocity", 1.0, "own"), "euler"),
        "velocity lifted, nothing moved": (Variant("velocity"), "euler"),
        "velocity lifted, nothing moved, second order": (Variant("velocity"), "dpmpp_2m"),
        "clean estimate lifted, nothing moved": (Variant("clean"), "euler"),
        "clean estimate lifted, nothing moved, second order": (Variant("clean"), "dpmpp_2m"),
        "clean estimate lifted, second order across stages": (Variant("clean"), "dpmpp_2m_across"),
    }
)


def subset_variants() -> Iterator[Measurement]:
    """Yields the paper's 7x and its variants at 32x32 latents, with the paper's levels and random activation."""
    levels = BETA.levels(_PAPER.steps, *_PAPER_LEVELS)
    for name, (variant, solver) in _VARIANTS.items():
        study = SubsetStudy((32, 32), (1.4, 2.0), variant=variant)
        yield row(study, _PAPER, levels, BETA.name, solver, {"variant": name}, _PAPER_LEVELS, f"{name}: ")
    small = Study((32, 32), (1.4, 2.0))
    for steps in (7, 11):
        yield row(small, dense(steps), BETA.levels(steps, *_PAPER_LEVELS), BETA.name, "euler", {}, _PAPER_LEVELS)


def subset_or_pooled() -> Iterator[Measurement]:
    """Yields plans of equal cost by tokens with subset steps and with pooled steps, on levels searched for each."""
    study = SubsetStudy((32, 32), (2.0, 2.6))
    for solver in ("dpmpp_2m", "dpmpp_2m_across"):
        way = Way(BETA, solver)
        for cheap, whole in ((4, 4), (6, 3), (7, 5)):
            by_area = search_levels(pooled((cheap, 2), (whole, 1)), Study(study.shape, study.exponents), way)
            yield found_row(study, by_area)
            by_subset = Plan((Stage(steps=cheap, density=0.25), Stage(steps=whole)))
            yield found_row(study, refined(with_levels(by_subset, study, way, by_area.parameters), study))


def variant_of(config: JiTConfig) -> Variant:
    """Returns the variant that corresponds to a product configuration."""
    return Variant(config.lifter, config.move_weight, config.noise)


def subset_presets(
    names: Sequence[str] = ("7x-paper", "4x-paper", "few-steps"), study: SampledSubsetStudy = LARGE
) -> Iterator[Measurement]:
    """Yields the product's presets with subset stages at FLUX.1's size, on sampled noise with random activation.

    Each is followed by dense steps of its cost, rounded to a whole number, on its levels and with its solver; these are
    exact.
    """
    exact = Study(study.shape, study.exponents)
    for name in names:
        config = PRODUCT[name]
        plan, parameters = product_plan(config), (config.alpha, config.beta)
        its = replace(study, variant=variant_of(config))
        yield drawn_row(its, Found(plan, Way(BETA, config.solver), parameters, ()), {"target": name})
        steps = round(cost_on_flux(plan, study.num_tokens))
        extra = {"control_of": name}
        levels = BETA.levels(steps, *parameters)
        yield row(exact, dense(steps), levels, BETA.name, config.solver, extra, parameters, f"control of {name}: ")


def paper_variants(study: SampledSubsetStudy = LARGE) -> Iterator[Measurement]:
    """Yields the paper's 7x and its variants at FLUX.1's size, with the paper's levels and random activation."""
    for name, (variant, solver) in _VARIANTS.items():
        found = Found(_PAPER, Way(BETA, solver), _PAPER_LEVELS, ())
        yield drawn_row(replace(study, variant=variant), found, {"variant": name}, f"{name}: ")


def large_subset_or_pooled(
    steps_of: Sequence[tuple[int, int]] = ((6, 5), (6, 3)), study: SampledSubsetStudy = LARGE
) -> Iterator[Measurement]:
    """Yields pooled and subset plans of equal cost at FLUX.1's size, on spaced levels searched for each.

    The search is exact for a pooled plan. For a subset plan it starts from the pooled plan's levels and uses fewer
    pictures than its row.
    """
    exact = Study(study.shape, study.exponents)
    for cheap, whole in steps_of:
        across = Way(SPACED_BETA, "dpmpp_2m_across")
        by_area = search_levels(pooled((cheap, 2), (whole, 1)), exact, across)
        yield found_row(exact, by_area)
        by_subset = Plan((Stage(steps=cheap, density=0.25), Stage(steps=whole)))
        for way in (Way(SPACED_BETA), across):
            few = replace(study, count=_SEARCHED_ON)
            yield drawn_row(study, refined(with_levels(by_subset, few, way, by_area.parameters), few))


def drawn_row(
    study: SampledSubsetStudy, found: Found, extra: Mapping[str, Any] = MappingProxyType({}), name: str = ""
) -> Measurement:
    """Returns the row of a plan on the study's sampled noise, with the standard error of each mean."""
    way = found.way
    pictures = study.of_pictures(found.plan, found.levels, way.solver)
    distances = [Distances(float(each.mean()), None) for each in pictures]
    spread = [float(each.std(ddof=1)) / len(each) ** 0.5 for each in pictures]
    fields = {
        "levels": way.family.name,
        "level_parameters": list(found.parameters),
        "standard_error": by_spectrum(study, spread),
        "pictures": study.count,
        "seed": study.seed,
        **extra,
    }
    return row_of(study, found.plan, distances, way.solver, fields, name)
