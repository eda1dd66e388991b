"""The exact laboratory: closed forms against plain sampling, and rows that a worse method would change."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases.exact import CASES
from benchmarks.lab.exact import picture, questions, report
from benchmarks.lab.exact.field import Field, make_blocks, make_pooling
from benchmarks.lab.exact.levels import (
    BETA,
    LEAST_GAP,
    LOG_RATIO,
    SPACED_BETA,
    Family,
    log_ratio_levels,
    native_levels,
    spaced_beta_levels,
)
from benchmarks.lab.exact.linear import Solver, make_laboratory
from benchmarks.lab.exact.plan import Plan, cost_by_tokens, cost_on_flux, dense, pooled, pooled_plans
from benchmarks.lab.exact.study import (
    DoubtfulStudy,
    Study,
    Way,
    dense_line,
    front,
    ratios_to_dense,
    search_levels,
    search_plans,
    with_levels,
)
from benchmarks.lab.exact.targets import TARGETS, candidates, is_just_in_time, shares_of_limit
from benchmarks.registry import Measurement
from jitaccel.errors import ConfigError
from jitaccel.method.presets import PRESETS as PRODUCT
from jitaccel.method.schedule import beta_levels, noise_levels
from jitaccel.method.solver import extrapolation_weight

WHOLE = Study((128, 128), (2.0, 2.6))  # FLUX.1 at 1024x1024: 64x64 tokens
SIDE = 16
PLANS = (dense(5), pooled((3, 2), (3, 1)), pooled((2, 4), (3, 2), (3, 1)), pooled((2, 4), (3, 1)))


def power_of(field: Field) -> Tensor:
    frequency = (torch.fft.fftfreq(SIDE, dtype=torch.float64) * SIDE).numpy() % SIDE
    return torch.from_numpy(field.power(*np.meshgrid(frequency, frequency, indexing="ij")))


def sampled_end(field: Field, factors: list[int], levels: tuple[float, ...], solver: Solver, noise: Tensor) -> Tensor:
    """Returns the end of a run from `noise` (B, h, w), as METHOD.md 11 says it: averages, levels and all."""
    power, state = power_of(field), noise
    before: tuple[float, Tensor, int] | None = None
    for factor, (level, following) in zip(factors, pairwise(levels), strict=True):
        seen, own, known = state, level, power
        if factor > 1:
            seen = functional.avg_pool2d(state[:, None], factor)[:, 0] / (1.0 - level + level / factor)
            own = (level / factor) / (1.0 - level + level / factor)
            box = torch.zeros_like(power)
            box[:factor, :factor] = 1.0 / factor**2
            covariance = torch.fft.ifft2(power * torch.fft.fft2(box).abs().square()).real
            known = torch.fft.fft2(covariance[::factor, ::factor]).real
        gain = (1.0 - own) * known / ((1.0 - own) ** 2 * known + own**2)
        clean = torch.fft.ifft2(torch.fft.fft2(seen) * gain).real
        if factor > 1:
            wide = functional.pad(clean[:, None], (1, 1, 1, 1), mode="circular")
            up = functional.interpolate(wide, scale_factor=factor, mode="bilinear", align_corners=False)
            clean = up[:, 0, factor:-factor, factor:-factor]
        aim = clean
        if before is not None and solver != "euler" and (solver == "dpmpp_2m_across" or before[2] == factor):
            aim = clean + extrapolation_weight(before[0], level, following) * (clean - before[1])
        before = level, clean, factor
        state = state + (following - level) * (state - aim) / level
    return state


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "dpmpp_2m_across"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_closed_form_is_the_mean_over_all_noise_of_the_run(plan: Plan, solver: Solver) -> None:
    field, levels = Field(shape=(SIDE, SIDE), exponent=2.0), beta_levels(plan.steps)
    every = torch.eye(SIDE**2, dtype=torch.float64).view(-1, SIDE, SIDE)  # a linear map is known by these
    factors = [stage.factor for stage in plan.stages for _ in range(stage.steps)]
    made = sampled_end(field, factors, levels, solver, every)
    exact = torch.fft.ifft2(torch.fft.fft2(every) * power_of(field).sqrt()).real
    expected = (made - exact).square().sum() / exact.square().sum()
    root = torch.linalg.svdvals(made.flatten(1) @ exact.flatten(1)).sum()
    distance = (made.square().sum() + exact.square().sum() - 2.0 * root) / exact.square().sum()
    laboratory = make_laboratory(field, 4)
    found = laboratory.distances(laboratory.end(plan, levels, solver))
    assert found.relative_mse == pytest.approx(expected.item(), rel=1e-9)
    assert found.wasserstein_2 == pytest.approx(distance.item() ** 0.5, rel=1e-6)


def test_video_is_pooled_within_its_frames() -> None:
    """If a field's power does not depend on the frequency of the first axis, its frames are independent."""

    class Frames(Field):
        def power(self, *frequencies: np.ndarray) -> np.ndarray:
            return Field(shape=self.shape[-2:], exponent=self.exponent).power(*frequencies[-2:])

    plan = pooled((3, 2), (3, 1))
    errors = []
    for field in (Frames(shape=(3, 12, 20), exponent=2.0), Field(shape=(12, 20), exponent=2.0)):
        laboratory = make_laboratory(field, 2)
        errors.append(laboratory.relative_mse(laboratory.end(plan, beta_levels(6))))
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize("shape", [(12, 20), (3, 12, 20)])
@pytest.mark.parametrize("cell", [1, 2, 4])
def test_blocks_count_every_frequency_once(shape: tuple[int, ...], cell: int) -> None:
    blocks = make_blocks(Field(shape=shape, exponent=2.0), cell)
    assert blocks.count.sum() * cell**2 == np.prod(shape)
    assert blocks.total == pytest.approx(np.prod(shape))
    with pytest.raises(ValueError, match="cell must be a power of two"):
        make_blocks(Field(shape=(*shape[:-1], 18), exponent=2.0), 4)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_averages_keep_white_noise_white_and_a_constant_as_it_is(factor: int) -> None:
    pooling = make_pooling(make_blocks(Field(shape=(SIDE, SIDE), exponent=2.0), 4), factor)
    n = 16
    down = pooling.averaged(np.broadcast_to(np.eye(n), (len(pooling.down), n, n)))
    products = down @ np.swapaxes(down, 1, 2)
    assert products == pytest.approx(np.broadcast_to(np.eye(n // factor**2), products.shape), abs=1e-12)
    assert pooling.coupling[0, 0] == pytest.approx(1.0)


def test_costs_are_those_of_flux_with_text_and_attention() -> None:
    assert cost_on_flux(pooled((1, 2)), 4096) == pytest.approx(0.289, abs=5e-4)
    assert cost_by_tokens(pooled((6, 2), (5, 1))) == 6.5
    assert cost_on_flux(dense(7), 4096) == 7.0
    plans = pooled_plans((2, 4, 6), 4096, (5.0, 5.5))
    assert pooled((4, 2), (4, 1)) in plans and all(5.0 <= cost_on_flux(plan, 4096) <= 5.5 for plan in plans)


def test_native_levels_are_those_of_the_pipeline() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / 28, 28), mu=1.15)
    assert native_levels(28) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_levels_are_even_in_the_log_ratio() -> None:
    levels = log_ratio_levels(6, -4.0, 2.0)
    ratios = [np.log((1.0 - level) / level) for level in levels[1:-1]]
    assert (levels[0], levels[-1]) == (1.0, 0.0) and np.diff(ratios) == pytest.approx(1.5)
    for bad in ((6, 2.0, 2.0), (2, -4.0, 2.0)):
        with pytest.raises(ConfigError, match="first must be below last"):
            log_ratio_levels(*bad)


def test_steps_and_levels_have_to_match() -> None:
    (laboratory, _) = WHOLE.laboratories(1)
    with pytest.raises(ValueError, match="one more than 5 steps"):
        laboratory.end(dense(5), beta_levels(6))


# Rows that were made by sampling 24 fields with another program, to its two digits.
@pytest.mark.parametrize(
    ("side", "exponent", "plan", "sampled"),
    [
        (32, 1.4, dense(6), 0.0190),
        (32, 1.4, dense(7), 0.0095),
        (32, 2.0, dense(6), 0.0200),
        (32, 2.0, dense(7), 0.0135),
        (32, 1.4, pooled((4, 2), (5, 1)), 0.0059),
        (32, 2.0, pooled((4, 2), (5, 1)), 0.0067),
    ],
)
def test_rows_on_the_papers_levels_agree_with_sampled_ones(
    side: int, exponent: float, plan: Plan, sampled: float
) -> None:
    (error,) = Study((side, side), (exponent,)).errors(plan, beta_levels(plan.steps))
    assert error == pytest.approx(sampled, rel=0.06)


@pytest.mark.parametrize(("steps", "sampled"), [(7, 0.057), (28, 0.0042), (50, 0.0014)])
def test_euler_rows_on_native_levels_agree_with_sampled_ones(steps: int, sampled: float) -> None:
    (error,) = Study((32, 32), (2.0,)).errors(dense(steps), native_levels(steps), "euler")
    assert error == pytest.approx(sampled, rel=0.06)


# Exact: relative mean squared error for spectra 2.0 and 2.6, levels searched for both.
@pytest.mark.parametrize(
    ("plan", "way", "known"),
    [
        (dense(6), Way(), (0.0194, 0.0232)),
        (dense(7), Way(), (0.00728, 0.01256)),
        (pooled((4, 2), (4, 1)), Way(), (0.00901, 0.01681)),
        (pooled((6, 2), (5, 1)), Way(), (0.00248, 0.00476)),
        (pooled((6, 2), (3, 1)), Way(BETA, "dpmpp_2m_across"), (0.00312, 0.00507)),
        (pooled((7, 2), (5, 1)), Way(BETA, "dpmpp_2m_across"), (0.00088, 0.00154)),
        (dense(7), Way(LOG_RATIO), (0.00131, 0.00181)),
    ],
    ids=lambda each: str(each) if isinstance(each, Plan) else "",
)
def test_searched_rows_stay_what_they_are(plan: Plan, way: Way, known: tuple[float, float]) -> None:
    assert search_levels(plan, WHOLE, way).errors == pytest.approx(known, rel=0.02)


def test_search_beats_every_level_of_its_grid_nearby() -> None:
    found = search_levels(dense(6), WHOLE)
    for alpha, beta in ((1.05, 1.0), (0.95, 1.0), (1.0, 1.05), (1.0, 0.95)):
        levels = beta_levels(6, alpha * found.parameters[0], beta * found.parameters[1])
        assert np.prod(WHOLE.errors(dense(6), levels)) > np.prod(found.errors)


@functools.cache
def small_search(family: Family) -> tuple[Plan, ...]:
    plans = pooled_plans((0, 3, 3), WHOLE.num_tokens, (3.0, 4.2))
    return tuple(found.plan for found in front(search_plans(plans, WHOLE, Way(family)), WHOLE))


def test_front_gets_better_as_it_gets_dearer() -> None:
    plans = small_search(BETA)
    costs = [cost_on_flux(plan, WHOLE.num_tokens) for plan in plans]
    assert costs == sorted(costs) and plans[-1] == pooled((3, 2), (3, 1))
    assert dense(3) not in plans[1:]


def test_half_size_that_knows_another_spectrum_is_worse_and_dense_steps_do_not_see_it() -> None:
    off = Study(WHOLE.shape, WHOLE.exponents, pooled_off_by=0.3)
    for plan, is_same in ((dense(5), True), (pooled((7, 2), (5, 1)), False)):
        levels = beta_levels(plan.steps, 0.839, 0.267)
        best, other = WHOLE.errors(plan, levels), off.errors(plan, levels)
        assert other == best if is_same else all(np.array(other) > 1.5 * np.array(best))


def test_doubt_counts_every_offset_alike_and_its_rows_hold_the_others() -> None:
    small = Study((16, 16), (2.0, 2.6))
    plan, levels = pooled((3, 2), (3, 1)), beta_levels(6)
    each = [Study(small.shape, small.exponents, offset).errors(plan, levels) for offset in (-0.15, 0.0, 0.15)]
    assert DoubtfulStudy(small.shape, small.exponents).errors(plan, levels) == sum(each, ())
    (row, *_) = [row.fields for row in questions.doubtful_half_size("dpmpp_2m", small, most=(0, 1, 3))]
    assert row["relative_mse_off"]["0"] == row["relative_mse"] and row["cheap_steps"] == 1


def test_equal_cost_lies_between_whole_numbers_of_dense_steps() -> None:
    line = {6: (4e-2,), 7: (1e-2,)}
    assert ratios_to_dense((1e-2,), 6.5, line) == pytest.approx((0.5,))
    assert ratios_to_dense((1e-2,), 7.0, line) == pytest.approx((1.0,))
    with pytest.raises(ValueError, match=r"cost must be in 6\.\.7"):
        ratios_to_dense((1e-2,), 7.1, line)


def test_dense_line_falls() -> None:
    line = dense_line(WHOLE)
    assert [*line] == list(range(3, 15))
    for errors in zip(*line.values(), strict=True):
        assert list(errors) == sorted(errors, reverse=True)


def rows_of(question: Iterable[Measurement], case: str) -> list[dict[str, Any]]:
    origin = {"benchmark": "exact", "case": case, "date": "2026-12-01", "commit": "abc"}
    return [{**row.fields, **origin} for row in question]


def test_rows_become_a_table_and_a_picture() -> None:
    small = Study((16, 16), (2.0, 2.6))
    rows = rows_of(questions.dense_steps(small, counts=(5, 6)), "dense steps")
    rows += rows_of(questions.plans(Way(), small, most=(1, 1, 3)), "pooled plans, Beta levels")
    text = report.tables(rows)
    (line,) = [line for line in text.splitlines() if line.startswith("| 28 dense") and "Euler" in line]
    errors = small.errors(dense(28), native_levels(28), "euler")
    cells = line.split(" | ")
    assert float(cells[5]) == pytest.approx(errors[0], rel=0.05) and float(cells[6]) == pytest.approx(
        errors[1], rel=0.05
    )
    assert text.count("2026-12-01, abc") == 2
    drawn = ElementTree.fromstring(picture.picture(rows))
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * len(picture.LINES)
    assert len((lines[0].get("points") or "").split()) == 2  # 5 and 6 dense steps on Beta levels
    with pytest.raises(ValueError, match="dense steps, got none"):
        picture.picture([])


def test_every_question_is_a_case() -> None:
    names = {case.name for case in CASES}
    assert {"dense steps", "video", "subset or pooled steps"} <= names
    assert {f"pooled plans, {way}" for way in questions.WAYS} <= names
    assert {line.case for line in picture.LINES} <= names


@pytest.mark.parametrize("way", questions.PRESETS)
@pytest.mark.parametrize("preset", TARGETS)
def test_two_stage_presets_meet_their_targets(way: str, preset: str) -> None:
    plan, parameters = questions.PRESETS[way][preset]
    found = with_levels(plan, WHOLE, questions.WAYS[way], parameters)
    assert is_just_in_time(plan) and cost_on_flux(plan, WHOLE.num_tokens) <= TARGETS[preset].cost
    assert max(shares_of_limit(TARGETS[preset], found, WHOLE, BETA)) <= 1.0


@pytest.mark.parametrize("preset", TARGETS)
def test_presets_of_the_product_meet_their_targets(preset: str) -> None:
    """What people get by name: their stages, their levels, and the solver's rule at the end of pooled steps."""
    config = PRODUCT[preset]
    plan = questions.product_plan(config)
    found = with_levels(plan, WHOLE, Way(BETA, "dpmpp_2m_across"), (config.alpha, config.beta))
    assert found.levels == noise_levels(config)
    assert is_just_in_time(plan) and cost_on_flux(plan, WHOLE.num_tokens) <= TARGETS[preset].cost
    assert max(shares_of_limit(TARGETS[preset], found, WHOLE, BETA)) <= 1.0
    assert min(level - after for level, after in pairwise(found.levels)) >= LEAST_GAP


def test_levels_that_are_equal_in_bfloat16_are_left_out() -> None:
    assert spaced_beta_levels(11, 0.86, 0.363) == beta_levels(11, 0.86, 0.363)
    with pytest.raises(ConfigError, match="levels must be at least"):
        spaced_beta_levels(11, 0.52, 0.149)
    found = search_levels(pooled((2, 2), (2, 1)), Study((16, 16), (2.0,)), Way(SPACED_BETA))
    assert min(level - after for level, after in pairwise(found.levels)) >= LEAST_GAP


def test_a_limit_is_the_least_of_a_targets_limits() -> None:
    found = with_levels(dense(7), WHOLE, Way(), (0.778, 0.275))
    line = dense_line(WHOLE)
    half = [2.0 * error / limit for error, limit in zip(found.errors, line[7], strict=True)]
    assert shares_of_limit(TARGETS["7x"], found, WHOLE) == pytest.approx(
        half
    )  # 28 Euler steps allow more than half of 7
    assert candidates(TARGETS["7x"], [found], WHOLE) == []  # no step of it is cheap
