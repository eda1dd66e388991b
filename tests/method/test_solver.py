"""The multistep solver: against diffusers' own, with guidance and stages, and the tokens it does not touch."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from jitaccel import PRESETS, JiTConfig
from jitaccel.artefacts.manifest import manifest_tensors
from jitaccel.errors import ConfigError
from jitaccel.method.run import Run
from jitaccel.method.schedule import noise_levels
from jitaccel.method.solver import Multistep, extrapolation_weight
from jitaccel.method.steps import KnownLevels, Step

DENSE = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=8, solver="dpmpp_2m")
GRID = (4, 4)


def field(state: Tensor, level: float) -> Tensor:
    """A velocity that is not linear in anything."""
    return torch.tanh(2.0 * state) * (1.0 + math.sin(3.0 * level)) - 0.5 * state.roll(1, dims=1)


def solve(config: JiTConfig, levels: tuple[float, ...], state: Tensor) -> Tensor:
    clock = KnownLevels(config, levels)
    run = Run(config, GRID, clock.step(0), state)
    for index in range(clock.num_steps):
        step = clock.step(index)
        state = run.enter(step, state)
        velocity = run.leave(step, state, run.gather(field(state, step.noise_level)))
        state = state + (step.next_level - step.noise_level) * velocity
    return state


def first_state() -> Tensor:
    return torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0))


def test_dense_steps_are_those_of_diffusers_solver() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    scheduler.set_timesteps(8)
    levels = tuple(scheduler.sigmas.tolist())
    state = expected = first_state()
    for timestep, level in zip(scheduler.timesteps, levels, strict=False):
        expected = scheduler.step(field(expected, level), timestep, expected).prev_sample
    assert levels[0] < 1.0 and (solve(DENSE, levels, state) - expected).abs().max() < 1e-5
    assert (solve(DENSE.replace(solver="euler"), levels, state) - expected).abs().max() > 1e-3


def test_error_falls_with_the_square_of_the_steps() -> None:
    state = first_state()
    even = {n: tuple(0.9 * (1.0 - k / n) + 0.05 * k / n for k in range(n)) for n in (10, 20, 40, 640)}
    ends = {
        solver: [
            solve(DENSE.replace(steps=n + 1, solver=solver), (*levels, 0.05, 0.0), state)
            for n, levels in even.items()
        ]
        for solver in ("euler", "dpmpp_2m")
    }
    for solver, least in (("euler", 1.6), ("dpmpp_2m", 2.6)):
        *found, exact = ends[solver]
        errors = [float((end - exact).square().mean().sqrt()) for end in found]
        assert all(before / after > least for before, after in pairwise(errors)), (solver, errors)


@pytest.mark.parametrize(
    ("before", "level", "next_level"), [(1.0, 0.9, 0.8), (0.9, 0.8, 0.0), (0.9, 0.9, 0.8), (0.8, 0.9, 0.7)]
)
def test_ends_of_the_path_take_euler_steps(before: float, level: float, next_level: float) -> None:
    assert extrapolation_weight(before, level, next_level) == 0.0
    solver = Multistep()
    state, velocity = first_state(), torch.ones(1, 16, 3)
    for index, (start, end) in enumerate(((before, level), (level, next_level))):
        assert solver.correct(_step(index, 0, start, end), state, velocity, None) is velocity


def test_levels_that_crowd_are_not_extrapolated_without_bound() -> None:
    assert extrapolation_weight(0.500001, 0.5, 0.1) == 2.0
    for name in ("4x", "7x", "10x"):
        levels = noise_levels(PRESETS[name])
        weights = [extrapolation_weight(*levels[k : k + 3]) for k in range(len(levels) - 2)]
        assert weights[0] == weights[-1] == 0.0 < min(weights[1:-1]) and max(weights) < 2.0


def test_corrected_velocity_can_be_taken_back() -> None:
    solver, state = Multistep(), first_state()
    generator = torch.Generator().manual_seed(1)
    anchors = torch.tensor([[0, 3, 5, 9]])
    for index, (stage, where) in enumerate(((0, anchors), (0, anchors), (1, None), (1, None))):
        velocity = torch.randn(state.shape, generator=generator)
        step = _step(index, stage, 0.9 - 0.1 * index, 0.8 - 0.1 * index)
        corrected = solver.correct(step, state, velocity, where)
        assert torch.allclose(solver.uncorrect(step, state, corrected), velocity, atol=1e-5)
        assert (corrected is velocity) == (index == 0)


def test_tokens_that_were_lifted_take_an_euler_step_where_a_stage_begins() -> None:
    solver, state, anchors = Multistep(), first_state(), torch.tensor([[0, 3, 5, 9]])
    solver.correct(_step(0, 0, 0.9, 0.8), state, torch.ones(1, 16, 3), anchors)
    velocity = torch.zeros(1, 16, 3)
    corrected = solver.correct(_step(1, 1, 0.8, 0.7), state, velocity, None)
    changed = (corrected != velocity).any(dim=2)[0].nonzero().flatten()
    assert changed.tolist() == anchors[0].tolist()


def test_guided_branches_come_to_what_the_guided_velocity_does() -> None:
    """Each branch is corrected with the guided result of the previous step."""
    together, apart, state, scale = Multistep(), Multistep(), first_state(), 3.0
    generator = torch.Generator().manual_seed(2)
    for index in range(4):
        step = _step(index, 0, 0.9 - 0.2 * index, 0.7 - 0.2 * index)
        branches = [torch.randn(state.shape, generator=generator) for _ in range(2)]
        expected = together.correct(step, state, torch.lerp(*branches, scale), None)
        found = torch.lerp(*(apart.correct(step, state, branch, None) for branch in branches), scale)
        assert torch.allclose(found, expected, atol=1e-4)
        apart.correct(step, state, apart.uncorrect(step, state, found), None)
        state = state + (step.next_level - step.noise_level) * expected


def test_exported_gains_take_the_same_steps() -> None:
    levels = noise_levels(DENSE)
    gains = manifest_tensors(DENSE, levels, GRID)["solver_gains"]
    state, before = first_state(), None
    for level, next_level, gain in zip(levels, levels[1:], gains.tolist(), strict=False):
        velocity = field(state, level)
        clean = state - level * velocity
        state = state + (next_level - level) * velocity
        if before is not None:
            state = state + gain * (clean - before)
        before = clean
    assert torch.allclose(state, solve(DENSE, levels, first_state()), atol=1e-5)
    assert not manifest_tensors(DENSE.replace(solver="euler"), levels, GRID)["solver_gains"].any()


def test_other_solvers_are_refused() -> None:
    with pytest.raises(ConfigError, match="solver must be one of euler, dpmpp_2m, caller, got 'heun'"):
        PRESETS["7x"].replace(solver="heun")


def _step(index: int, stage: int, level: float, next_level: float) -> Step:
    return Step(index=index, stage=stage, noise_level=level, next_level=next_level, may_end_stage=False)
