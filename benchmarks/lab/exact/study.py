"""Measures plans on several fields at once, and searches for levels and plans."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize  # type: ignore[import-untyped]

from jitaccel.errors import ConfigError

from .field import Field
from .levels import BETA, Family
from .linear import Distances, Laboratory, Solver, make_laboratory
from .plan import Plan, cost_on_flux, dense

_BETTER = 0.97  # a dearer plan is on the front if its error is below this multiple of any cheaper plan's
_WITHIN = 2.0  # plans whose first error exceeds this multiple of the best at their cost are not refined


@dataclass(frozen=True)
class Study:
    """Fields of one size and several spectra, on all of which one setting has to be good.

    Attributes:
        shape: Latents, (h, w) or (t, h, w); a token has 2 x 2 of them.
        exponents: Decay of each spectrum.
        pooled_off_by: Offset of the decay that the network assumes for averages; 0 makes it optimal.
    """

    shape: tuple[int, ...]
    exponents: tuple[float, ...]
    pooled_off_by: float = 0.0

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of tokens along each axis."""
        *frames, height, width = self.shape
        return (*frames, height // 2, width // 2)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a picture."""
        return math.prod(self.grid)

    def laboratories(self, cell: int) -> tuple[Laboratory, ...]:
        """Returns a laboratory for each spectrum, for pooling by factors up to `cell`."""
        return tuple(_laboratory(self.shape, exponent, cell, self.pooled_off_by) for exponent in self.exponents)

    def errors(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[float, ...]:
        """Returns the relative mean squared error of a plan for each spectrum (`Distances`)."""
        return tuple(lab.relative_mse(lab.end(plan, levels, solver)) for lab in self.laboratories(plan.cell))

    def distances(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[Distances, ...]:
        """Returns the distances of a plan for each spectrum."""
        return tuple(lab.distances(lab.end(plan, levels, solver)) for lab in self.laboratories(plan.cell))


@dataclass(frozen=True)
class DoubtfulStudy(Study):
    """A study with an unknown error of the network that sees averages.

    Attributes:
        offsets: Offsets with equal weights; `errors` lists all spectra for the first offset, then for the next.
    """

    offsets: tuple[float, ...] = (-0.15, 0.0, 0.15)

    def errors(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[float, ...]:
        """Returns the relative mean squared error of a plan for each offset and spectrum."""
        studies = (Study(self.shape, self.exponents, offset) for offset in self.offsets)
        return tuple(error for study in studies for error in study.errors(plan, levels, solver))


@functools.lru_cache(maxsize=32)
def _laboratory(shape: tuple[int, ...], exponent: float, cell: int, off_by: float) -> Laboratory:
    field = Field(shape=shape, exponent=exponent)
    return make_laboratory(field, cell, Field(shape=shape, exponent=exponent + off_by) if off_by else None)


@dataclass(frozen=True)
class Way:
    """How a plan's levels are chosen and its steps are made.

    Attributes:
        family: Family of the levels.
        solver: Solver of the steps.
    """

    family: Family = BETA
    solver: Solver = "dpmpp_2m"


@dataclass(frozen=True)
class Found:
    """A plan with the levels found for it.

    Attributes:
        plan: Its stages.
        way: The family of its levels, and its solver.
        parameters: Parameters of its levels.
        errors: Relative mean squared error for each spectrum.
    """

    plan: Plan
    way: Way
    parameters: tuple[float, float]
    errors: tuple[float, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels, one more than steps."""
        return self.way.family.levels(self.plan.steps, *self.parameters)

    @property
    def mean_error(self) -> float:
        """Geometric mean of the errors."""
        return math.exp(_score(self.errors))


def with_levels(plan: Plan, study: Study, way: Way, parameters: tuple[float, float]) -> Found:
    """Returns a plan measured on given levels."""
    levels = way.family.levels(plan.steps, *parameters)
    return Found(plan, way, parameters, study.errors(plan, levels, way.solver))


def coarse_levels(plan: Plan, study: Study, way: Way) -> Found:
    """Returns a plan on the best of its family's start levels, by the geometric mean of its errors."""
    tried = (_tried(plan, study, way, parameters) for parameters in way.family.starts)
    return min((found for found in tried if found is not None), key=lambda found: found.mean_error)


def search_levels(plan: Plan, study: Study, way: Way = Way()) -> Found:
    """Returns a plan on the best levels: the family's best start levels, refined with the Nelder-Mead method."""
    return refined(coarse_levels(plan, study, way), study)


def refined(start: Found, study: Study) -> Found:
    """Returns a plan on better levels near its current ones, to three digits."""
    way = start.way
    is_positive = way.family.is_positive

    def parameters(place: Sequence[float]) -> tuple[float, float]:
        first, second = (float(f"{math.exp(each) if is_positive else each:.3g}") for each in place)
        return first, second

    def score(place: Sequence[float]) -> float:
        found = _tried(start.plan, study, way, parameters(place))
        return 1e3 if found is None else _score(found.errors)

    origin = np.array([math.log(each) if is_positive else each for each in start.parameters])
    simplex = origin + (0.15 if is_positive else 0.3) * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    settings = {"xatol": 3e-3, "fatol": 1e-4, "maxfev": 120, "initial_simplex": simplex}
    best = optimize.minimize(score, origin, method="Nelder-Mead", options=settings)
    return with_levels(start.plan, study, way, parameters(best.x))


def _tried(plan: Plan, study: Study, way: Way, parameters: tuple[float, float]) -> Found | None:
    """Returns a plan measured on given levels, or None if they do not fall."""
    try:
        return with_levels(plan, study, way, parameters)
    except ConfigError:
        return None


def _score(errors: Sequence[float]) -> float:
    return float(np.mean(np.log(errors)))


def search_plans(plans: Sequence[Plan], study: Study, way: Way = Way()) -> list[Found]:
    """Returns plans on the best levels, cheapest first, without those far worse than cheaper ones.

    Every plan is tried on its family's start levels. A plan is refined if its error there is below `_WITHIN` times the
    smallest error of the plans that do not cost more.
    """
    coarse = sorted((coarse_levels(plan, study, way) for plan in plans), key=lambda found: _cost(found, study))
    least = np.minimum.accumulate([found.mean_error for found in coarse])
    return [
        refined(found, study) for found, best in zip(coarse, least, strict=True) if found.mean_error <= _WITHIN * best
    ]


def front(found: Sequence[Found], study: Study) -> Iterator[Found]:
    """Yields the plans that are at least 3 % better than all plans of the same or lower cost, cheapest first."""
    best = math.inf
    for each in sorted(found, key=lambda one: (_cost(one, study), one.mean_error)):
        if each.mean_error <= _BETTER * best:
            best = each.mean_error
            yield each


def _cost(found: Found, study: Study) -> float:
    return cost_on_flux(found.plan, study.num_tokens)


@functools.lru_cache(maxsize=8)
def dense_line(study: Study, family: Family = BETA, most: int = 14) -> Mapping[int, tuple[float, ...]]:
    """Returns the line to beat: errors of 3 to `most` dense 2M steps, on levels searched separately for each spectrum.

    If more steps are worse than fewer, which happens with log-ratio levels, the error of the fewer is used.
    """
    way = Way(family=family)
    counts = range(3, most + 1)
    lines = []
    for exponent in study.exponents:
        alone = Study(study.shape, (exponent,))
        errors = [search_levels(dense(steps), alone, way).errors[0] for steps in counts]
        lines.append(np.minimum.accumulate(errors).tolist())
    return dict(zip(counts, zip(*lines, strict=True), strict=True))


def ratios_to_dense(errors: Sequence[float], cost: float, line: Mapping[int, tuple[float, ...]]) -> tuple[float, ...]:
    """Returns errors divided by those of dense steps of equal cost, with log errors interpolated between whole steps.

    Raises:
        ValueError: If the line does not extend to this cost.
    """
    below = math.floor(cost)
    above = below if cost == below else below + 1
    if below not in line or above not in line:
        raise ValueError(f"ratios_to_dense: cost must be in {min(line)}..{max(line)}, got {cost}; extend the line")
    share = cost - below
    return tuple(
        error / math.exp((1.0 - share) * math.log(low) + share * math.log(high))
        for error, low, high in zip(errors, line[below], line[above], strict=True)
    )
