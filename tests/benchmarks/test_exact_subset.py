"""The exact laboratory's subset stages against the product's own run, and rows that a worse method would change."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.lab.exact import report, subset, subset_questions
from benchmarks.lab.exact.field import Field
from benchmarks.lab.exact.gradients import solve
from benchmarks.lab.exact.plan import Plan, Stage, dense, pooled
from benchmarks.lab.exact.study import Study
from benchmarks.lab.exact.subset import SampledSubsetStudy, SubsetStudy, Variant, _anchors_of, end_of
from jitaccel.method.config import JiTConfig
from jitaccel.method.run import Left, Parts, Run
from jitaccel.method.schedule import beta_levels
from jitaccel.method.steps import KnownLevels

GRID = (6, 8)
FIELD = Field(shape=(12, 16), exponent=2.0)
TOLERANCE = 0.07  # of sampled rows: their noise and their two digits
PAPER = Plan((Stage(steps=4, density=0.32), Stage(steps=3, density=0.6), Stage(steps=4)))


def to_tokens(pictures: Tensor) -> Tensor:
    height, width = GRID
    return pictures.view(-1, height, 2, width, 2).transpose(2, 3).reshape(len(pictures), -1, 4)


def covariance() -> Tensor:
    """Returns the covariance of all latents in token order, (4 N, 4 N), straight from the spectrum."""
    rows, columns = np.meshgrid(np.arange(12.0), np.arange(16.0), indexing="ij")
    root = torch.from_numpy(FIELD.power(rows, columns)).sqrt()
    every = torch.eye(12 * 16, dtype=torch.float64).view(-1, 12, 16)
    fields = to_tokens(torch.fft.ifft2(torch.fft.fft2(every) * root).real).flatten(1)
    return fields.T @ fields


def network(state: Tensor, anchors: Tensor, level: float, between: Tensor) -> Tensor:
    """Returns the velocity of the best network on the anchors (1, M, 4): normal equations, solved directly."""
    place = (4 * anchors[0][:, None] + torch.arange(4)).flatten()
    known = between[place][:, place]
    noisy = state[0, anchors[0]].double().flatten()
    seen = (1.0 - level) ** 2 * known + level**2 * torch.eye(len(place), dtype=torch.float64)
    clean = (1.0 - level) * known @ torch.linalg.solve(seen, noisy)
    return ((noisy - clean) / level).view(1, -1, 4).float()


@pytest.mark.parametrize(
    ("changed", "variant"),
    [
        ({"lifter": "clean", "micro_flow": "none", "solver": "dpmpp_2m"}, Variant()),
        ({"lifter": "clean", "micro_flow": "exact", "noise": "own"}, Variant("clean", 1.0, "own")),
        ({"lifter": "velocity", "micro_flow": "released"}, Variant("velocity", 1.0 / 3.0, "fresh")),
        ({"lifter": "velocity", "micro_flow": "none", "solver": "dpmpp_2m"}, Variant("velocity")),
    ],
    ids=["2M", "moved", "paper", "2M velocity"],
)
def test_lab_makes_of_noise_what_the_products_run_makes(changed: dict[str, Any], variant: Variant) -> None:
    config = JiTConfig(densities=(0.32, 0.60, 1.0), boundaries=(0.4, 0.65, 1.0), steps=11, **changed)
    generator = torch.Generator().manual_seed(3)
    start, fresh = (torch.randn(1, 12, 16, generator=generator) for _ in range(2))
    first, second = (_anchors_of(PAPER, stage, GRID, 0) for stage in PAPER.stages[:2])
    scores = torch.zeros(1, 48)
    scores[0, list(second or ())] = 1.0

    def chosen(run: Run, left: Left) -> Tensor:
        return scores

    clock, between, state = KnownLevels(config, beta_levels(11)), covariance(), to_tokens(start)
    noise = None if config.noise == "own" else to_tokens(fresh)
    run = Run(
        config, GRID, clock.step(0), state, anchors=torch.tensor([first]), noise=noise, parts=Parts(scores=chosen)
    )
    for step in map(clock.step, range(11)):
        state = run.enter(step, state)
        velocity = run.leave(step, state, network(state, run.anchors, step.noise_level, between))
        state = state + (step.next_level - step.noise_level) * velocity

    ends = torch.from_numpy(end_of(PAPER, beta_levels(11), FIELD, config.solver, variant))
    units = torch.cat([start.flatten(), fresh.flatten()])[: len(ends)].double()
    expected = to_tokens(torch.einsum("k, khw -> hw", units, ends)[None])
    assert (state - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("plan", [dense(5), pooled((3, 2), (3, 1)), pooled((2, 4), (3, 1))], ids=str)
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "dpmpp_2m_across"])
def test_unit_noises_and_aliasing_blocks_agree_without_a_subset(plan: Plan, solver: Any) -> None:
    levels = beta_levels(plan.steps)
    (by_units,) = SubsetStudy((16, 16), (2.0,)).distances(plan, levels, solver)
    (by_blocks,) = Study((16, 16), (2.0,)).distances(plan, levels, solver)
    assert dataclasses.astuple(by_units) == pytest.approx(dataclasses.astuple(by_blocks), rel=1e-8)


def test_every_token_as_anchor_is_dense() -> None:
    nearly = Plan((Stage(steps=3, density=1.0 - 1e-12), Stage(steps=3)))
    small = SubsetStudy((12, 16), (2.0,))
    assert small.errors(nearly, beta_levels(6), "euler") == pytest.approx(
        small.errors(dense(6), beta_levels(6), "euler")
    )


# 32x32 latents on the paper's levels, spectrum 2.0: results of another program that sampled 24 fields.
@pytest.mark.parametrize(
    ("plan", "variant", "solver", "sampled"),
    [
        (PAPER, Variant("velocity", 1.0 / 3.0, "fresh"), "euler", 0.185),
        (PAPER, Variant(), "dpmpp_2m", 0.037),
        (Plan((Stage(steps=4, density=0.32), Stage(steps=5))), Variant(), "dpmpp_2m", 0.0101),
    ],
    ids=["paper", "clean", "4 at 32 %"],
)
def test_subset_rows_agree_with_sampled_ones(plan: Plan, variant: Variant, solver: Any, sampled: float) -> None:
    (error,) = SubsetStudy((32, 32), (2.0,), variant=variant).errors(plan, beta_levels(plan.steps), solver)
    assert error == pytest.approx(sampled, rel=TOLERANCE)


SMALL = SampledSubsetStudy((24, 32), (2.0,), count=5, seed=2)
VARIANTS = [Variant(), Variant("velocity", 1.0 / 3.0, "fresh"), Variant("clean", 1.0, "own")]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_conjugate_gradients_make_of_noise_what_the_normal_equations_do(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dataclasses.replace(SMALL, variant=variant)
    (direct,) = study.of_pictures(PAPER, beta_levels(11), "dpmpp_2m")
    monkeypatch.setattr(subset, "_MOST_LATENTS", 0)
    (solved,) = study.of_pictures(PAPER, beta_levels(11), "dpmpp_2m")
    assert solved == pytest.approx(direct, rel=1e-6) and not np.array_equal(solved, direct)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_drawn_noise_has_the_error_of_every_unit_within_its_standard_error(variant: Variant) -> None:
    drawn = dataclasses.replace(SMALL, variant=variant, count=48)
    (exact,) = SubsetStudy(SMALL.shape, SMALL.exponents, variant=variant).errors(PAPER, beta_levels(11), "euler")
    (each,) = drawn.of_pictures(PAPER, beta_levels(11), "euler")
    error = float(each.std(ddof=1)) / len(each) ** 0.5
    assert abs(float(each.mean()) - exact) < 2.5 * error < 0.3 * exact
    assert drawn.distances(PAPER, beta_levels(11), "euler")[0].wasserstein_2 is None


def test_solve_needs_a_residual_that_falls() -> None:
    right = np.ones((1, 3))
    assert solve(lambda x: 2.0 * x, lambda x: x, right, 1e-9) == pytest.approx(0.5 * right)
    with pytest.raises(RuntimeError, match="residuals must fall"):
        solve(lambda x: x * np.array([1.0, -2.0, 3.0]), lambda x: 0.0 * x, right, 1e-9)


def test_rows_of_subset_presets_have_controls_and_standard_errors() -> None:
    small = SampledSubsetStudy((16, 16), (2.0, 2.6), count=4)
    rows = [row.fields for row in subset_questions.subset_presets(("7x-paper", "few-steps"), small)]
    assert [row.get("target", row.get("control_of")) for row in rows] == ["7x-paper"] * 2 + ["few-steps"] * 2
    for drawn, control in zip(rows[::2], rows[1::2], strict=True):
        assert control["cost_dense_steps"] == round(drawn["cost_dense_steps"]) and control["solver"] == drawn["solver"]
        assert set(drawn["standard_error"]) == {"2.0", "2.6"} and "wasserstein_2" not in drawn
    assert rows[0]["plan"] == str(PAPER) and rows[2]["plan"] == "1 at 32%, 6 dense"
    named = [{**row, "benchmark": "exact", "case": "presets", "date": "2026-12-01", "commit": "abc"} for row in rows]
    head, _, first, *_ = report.tables(named).splitlines()[2:]
    assert head.count("W2") == 2 and " |  |  | " in first


def test_variants_at_both_sizes_are_the_same_ones() -> None:
    tiny = SampledSubsetStudy((16, 16), (2.0,), count=2)
    (drawn, *_) = subset_questions.paper_variants(tiny)
    exact = SubsetStudy(tiny.shape, tiny.exponents, variant=Variant("velocity", 1.0 / 3.0, "fresh"))
    (error,) = exact.errors(PAPER, beta_levels(11), "euler")
    assert drawn.fields["relative_mse"]["2.0"] == pytest.approx(error, rel=0.7)
    pooled_row, first_order, across = subset_questions.large_subset_or_pooled(((2, 2),), tiny)
    assert "pooled" in pooled_row.fields["plan"]
    assert first_order.fields["cost_dense_steps"] == across.fields["cost_dense_steps"]
