"""The parts a run computes with: the product's own, replacements, and parts that are not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jitaccel import JiTConfig, noise_levels
from jitaccel.method import run as run_module
from jitaccel.method.lift import LiftPlan
from jitaccel.method.run import Left, Parts, Run, importance_of, lifted, moved
from jitaccel.method.solver import Euler, Multistep, make_solver
from jitaccel.method.steps import KnownLevels, Step

GRID = (6, 5)
TWO = JiTConfig(densities=(0.4, 1.0), boundaries=(0.5, 1.0), steps=4, micro_flow="exact")
THREE = TWO.replace(densities=(0.3, 0.6, 1.0), boundaries=(0.3, 0.6, 1.0), steps=6)


def drive(config: JiTConfig, **given: Any) -> tuple[Tensor, list[Tensor]]:
    """Returns the last state and the anchors of each step."""
    clock = KnownLevels(config, noise_levels(config))
    state, seen = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0)), []
    run = Run(config, GRID, clock.step(0), state, **given)
    for index in range(clock.num_steps):
        step = clock.step(index)
        state = run.enter(step, state)
        seen.append(run.anchors)
        velocity = run.leave(step, state, run.gather(state).sin())
        state = state + (step.next_level - step.noise_level) * velocity
    return state, seen


@pytest.mark.parametrize(("config", "calls"), [(TWO, 0), (THREE, 1)])
def test_importance_is_not_asked_for_where_every_token_is_activated(
    config: JiTConfig, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    own = run_module.importance

    def counted(*given: Any) -> Tensor:
        asked.append(given)
        return own(*given)

    monkeypatch.setattr(run_module, "importance", counted)
    _, seen = drive(config)
    assert len(asked) == calls
    assert torch.equal(seen[-1], torch.arange(30).expand(2, -1))


def test_importance_is_not_asked_for_where_no_token_is_activated() -> None:
    def never(run: Run, left: Left) -> Tensor:
        raise AssertionError

    config = THREE.replace(densities=(0.4, 0.4 + 1e-9, 1.0))
    _, seen = drive(config, parts=Parts(scores=never))
    assert torch.equal(seen[0], seen[2])


def test_parts_are_asked_in_place_of_the_product_s_own() -> None:
    asked: list[str] = []

    def scores(run: Run, left: Left) -> Tensor:
        asked.append("scores")
        return importance_of(run, left)

    def lift(run: Run, step: Step, state: Tensor, values: Tensor) -> Tensor:
        asked.append("lift")
        return lifted(run, step, state, values)

    def move(run: Run, step: Step, state: Tensor, left: Left, tokens: Tensor, old: LiftPlan) -> Tensor:
        asked.append("move")
        assert tokens.shape[1] + old.anchors.shape[1] == run.num_active
        return moved(run, step, state, left, tokens, old)

    state, _ = drive(THREE, parts=Parts(scores=scores, lift=lift, move=move))
    assert (asked.count("scores"), asked.count("lift"), asked.count("move")) == (1, 6, 2)
    assert torch.equal(state, drive(THREE)[0])


def test_scores_decide_what_is_activated() -> None:
    by_index = Parts(scores=lambda run, left: torch.arange(30.0).expand(2, -1))
    _, seen = drive(THREE, parts=by_index)
    first, then = seen[0][0], seen[THREE.stage_ends(6)[0]][0]
    new = then[~torch.isin(then, first)]
    left = torch.tensor([n for n in range(30) if n not in then.tolist()])
    assert new.min() > left.max()


def test_solvers_are_made_by_name_and_euler_changes_nothing() -> None:
    assert isinstance(make_solver("euler"), Euler) and isinstance(make_solver("dpmpp_2m"), Multistep)
    solver, state, velocity = make_solver("euler"), torch.zeros(1, 30, 3), torch.ones(1, 30, 3)
    step = KnownLevels(TWO, noise_levels(TWO)).step(1)
    assert solver.correct(step, state, velocity, None) is velocity is solver.uncorrect(step, state, velocity)
    assert not solver.needs_every_step and solver.weight(0.9, 0.5, 0.1) == 0.0
