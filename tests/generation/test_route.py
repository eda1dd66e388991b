"""A generation's path through a step, and the two ways in which a move reaches a sampler."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from jitaccel import JiTConfig, noise_levels
from jitaccel.generation.route import Answer, Generation, History, fold_move
from jitaccel.method.run import Run, lifted
from jitaccel.method.steps import KnownLevels, Step

GRID = (6, 8)
CONFIG = JiTConfig(densities=(0.4, 0.7, 1.0), boundaries=(0.4, 0.7, 1.0), steps=5, micro_flow="exact", noise="fresh")


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 48, 4, generator=torch.Generator().manual_seed(3)).to(dtype)


def network(run: Run, state: Tensor) -> Answer:
    return Answer(torch.tanh(run.gather(state)) + 0.1)


def begin(clock: KnownLevels, state: Tensor, **given: Any) -> Generation:
    return Generation(
        CONFIG, GRID, clock.step(0), state, cost=lambda image, text: 10 * image + text, text_tokens=3, **given
    )


def with_moved_state(levels: tuple[float, ...]) -> tuple[Tensor, Generation]:
    """Returns the final state of a sampler whose state is moved after each step."""
    clock, state = KnownLevels(CONFIG, levels), start()
    generation = begin(clock, state)
    for index, (level, after) in enumerate(pairwise(levels)):
        step = clock.step(index)
        velocity = generation.leave(step, state, generation.evaluate(step, state, network))
        state = state + (after - level) * velocity
        if index + 1 < clock.num_steps:
            state = generation.enter(clock.step(index + 1), state)
    return state, generation


def with_folded_move(levels: tuple[float, ...]) -> Tensor:
    """Returns the final state of a loop that only knows its own state."""
    clock, state = KnownLevels(CONFIG, levels), start()
    generation = begin(clock, state)
    for index, (level, after) in enumerate(pairwise(levels)):
        step = clock.step(index)
        entered = generation.enter(step, state)
        velocity = generation.leave(step, entered, generation.evaluate(step, entered, network))
        move = None if entered is state else entered - state
        state = state + (after - level) * fold_move(velocity, move, step)
    return state


def test_both_deliveries_end_in_the_same_picture() -> None:
    levels = noise_levels(CONFIG)
    moved, _ = with_moved_state(levels)
    torch.testing.assert_close(with_folded_move(levels), moved, rtol=1e-5, atol=1e-5)


def test_move_matters() -> None:
    levels = noise_levels(CONFIG)
    clock, state = KnownLevels(CONFIG, levels), start()
    generation = begin(clock, state)
    moves = []
    for index, (level, after) in enumerate(pairwise(levels)):
        step = clock.step(index)
        entered = generation.enter(step, state)
        moves.append(entered is not state)
        velocity = generation.leave(step, entered, generation.evaluate(step, entered, network))
        state = entered + (after - level) * velocity
    assert moves == [False, False, True, True, False]


def test_lifted_answer_counts_as_the_lift_of_its_anchors() -> None:
    clock = KnownLevels(CONFIG, noise_levels(CONFIG))
    state, step = start(), clock.step(0)
    plain, brought = begin(clock, state), begin(clock, state)
    answer = plain.evaluate(step, state, network)
    velocity = plain.leave(step, state, answer)
    whole = lifted(brought.run, step, state, answer.values)
    assert torch.equal(brought.leave(step, state, Answer(answer.values, lifted=whole)), velocity)


def test_forced_tokens_are_anchors() -> None:
    clock, state = KnownLevels(CONFIG, noise_levels(CONFIG)), start()
    forced = torch.zeros(2, 48, dtype=torch.bool)
    forced[:, [9, 20]] = True
    run = begin(clock, state, forced=lambda: forced).run
    assert all({9, 20} <= set(row.tolist()) for row in run.anchors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_move_keeps_dtype_and_pays_the_move(dtype: torch.dtype) -> None:
    step = Step(index=0, stage=0, noise_level=0.8, next_level=0.3, may_end_stage=False)
    velocity, move = start(dtype), torch.full((2, 48, 4), 0.25)
    folded = fold_move(velocity, move, step)
    assert folded.dtype == dtype
    paid = (step.next_level - step.noise_level) * (folded.float() - velocity.float())
    torch.testing.assert_close(paid, move, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0.02)


def test_nothing_is_folded_where_nothing_moves() -> None:
    step = Step(index=0, stage=0, noise_level=0.8, next_level=0.3, may_end_stage=False)
    velocity = start()
    assert fold_move(velocity, None, step) is velocity


class Plain:
    """An executor without anything to say."""

    execution = "indexed"
    attention = None
    compiled = None
    notes = ("of the executor",)

    def release(self) -> None: ...


def test_history_tells_of_the_last_generation_and_counts_all() -> None:
    history = History(CONFIG, "a codebase", Plain())
    assert history.stats().generations == 0 and history.stats().steps == ()
    for _ in range(2):
        _, generation = with_moved_state(noise_levels(CONFIG))
        history.begin(generation)
    history.notes = ("of the route",)
    stats = history.stats()
    assert stats.generations == 2 and stats.codebase == "a codebase" and stats.grid == GRID
    assert stats.notes == ("of the route", "of the executor")
    assert [step.tokens for step in stats.steps] == [19, 19, 33, 48, 48]
    assert [step.flops for step in stats.steps] == [2 * (10 * tokens + 3) for tokens in (19, 19, 33, 48, 48)]
    history.show(None)
    assert history.stats().steps == () and history.stats().generations == 2
