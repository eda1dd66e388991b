"""A bare transformer in a custom loop: levels that are given, predicted, or rounded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel.method.steps import Step
from jitaccel.patches.loops.visits import _step_made, _Visit
from tests.support import reference, tiny
from tests.support.tiny import GRID, relative_error
from tests.support.transformer_loop import EXACT, GEOMETRIC, LEVELS, SHIFTED, UNIFORM, Loop, network_of


@pytest.mark.parametrize("levels", [UNIFORM, GEOMETRIC, SHIFTED], ids=["uniform", "geometric", "shifted"])
def test_owed_move_vanishes_on_levels_that_were_predicted_wrong(loop: Loop, levels: tuple[float, ...]) -> None:
    with jitaccel.apply(loop.model, EXACT) as handle:
        states = loop.run(levels, tiny.start())
        steps = handle.stats().steps
        assert handle.stats().generations == 1
    stages = [step.stage for step in steps]
    assert set(stages) == {0, 1, 2}
    exact = reference.denoise(network_of(loop), EXACT, GRID, tiny.start(), levels, stages=stages)
    errors = [relative_error(*pair) for pair in zip(states, exact.states, strict=True)]
    # The reference moves the state after the step before, the loop within the first step of the stage.
    boundaries = [i for i in range(1, len(stages)) if stages[i] > stages[i - 1]]
    assert max(errors[: boundaries[0] - 1], default=0.0) < 1e-5
    for start, end in pairwise((*boundaries, len(stages) + 1)):
        assert errors[start - 1] > 0.1
        for i in range(start, end - 1):
            made, guessed = levels[i] - levels[i + 1], steps[i].noise_level - steps[i].next_level
            assert errors[i] < 1.5 * abs(1.0 - made / guessed) * errors[i - 1] + 1e-5
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("in_place", [False, True], ids=["new states", "in place"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loop_in_half_precision_needs_not_tell_its_levels(dtype: torch.dtype, in_place: bool) -> None:
    loop, start = Loop(dtype), torch.cat([tiny.start(1), tiny.start(2)])
    with jitaccel.apply(loop.model, EXACT) as handle:
        untold = loop.run(SHIFTED, start, in_place=in_place)[-1]
        stages = [step.stage for step in handle.stats().steps]
    ends = tuple(sum(stage <= last for stage in stages) / len(stages) for last in range(EXACT.num_stages))
    same_stages = EXACT.replace(boundaries=ends, steps=len(stages))
    with jitaccel.apply(loop.model, same_stages, noise_levels=SHIFTED) as handle:
        told = loop.run(SHIFTED, start, in_place=in_place)[-1]
        assert [step.stage for step in handle.stats().steps] == stages
    error = torch.linalg.vector_norm(untold.float() - told.float()) / torch.linalg.vector_norm(told.float())
    assert error < 2 * torch.finfo(dtype).eps


PAINTED = (torch.arange(tiny.NUM_TOKENS) < tiny.NUM_TOKENS // 20)[:, None]
EDITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda state, level: state,
    "inpainting": lambda state, level: torch.where(
        PAINTED, (1 - level) * tiny.start(8) + level * tiny.start(0), state.float()
    ),
    "inpainting with fresh noise": lambda state, level: torch.where(
        PAINTED, (1 - level) * tiny.start(8) + level * tiny.start(int(1000 * level)), state.float()
    ),
    "scaling": lambda state, level: 0.99 * state.float(),
}


@pytest.mark.parametrize(
    ("dtype", "order", "edit", "is_fitted"),
    [
        (torch.bfloat16, "none", "none", True),
        (torch.float32, "none", "none", False),
        (torch.bfloat16, "positive first", "none", False),
        (torch.bfloat16, "batch", "none", False),
        *((torch.bfloat16, "none", edit, False) for edit in EDITS if edit != "none"),
    ],
)
def test_step_is_fitted_to_no_state_that_guidance_or_an_edit_made(
    dtype: torch.dtype, order: str, edit: str, is_fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(dtype)
    # Branches so similar that their results do not reveal guidance; equal ones would be one repeated call.
    embeds, pooled, text_ids = loop.texts[0]
    loop.texts[1] = (embeds, pooled * 1.01, text_ids)

    def image() -> Tensor:
        state = tiny.start(0).to(dtype)
        with jitaccel.apply(loop.model, EXACT) as handle:
            for level, next_level in pairwise(SHIFTED):
                velocity = loop.guided(state, level, order)
                state = (state.float() + (next_level - level) * velocity.float()).to(dtype)
                state = EDITS[edit](state, next_level).to(dtype)
            assert handle.stats().generations == 1
        return state

    fitted = image()
    monkeypatch.setattr("jitaccel.patches.loops.visits._step_made", lambda visit, state, rounded: rounded)
    assert torch.equal(fitted, image()) is not is_fitted


@pytest.mark.parametrize(("off", "is_fitted"), [(0.007, True), (0.009, False)])
def test_step_is_fitted_as_far_as_levels_are_rounded(off: float, is_fitted: bool) -> None:
    seen, velocity, length = tiny.start(1).bfloat16(), tiny.start(2), -0.04
    step = Step(index=3, stage=1, noise_level=0.5, next_level=0.45, may_end_stage=True)
    visit = _Visit(step=step, level=0.5, seen=seen, entered=seen, calls=1, returned=velocity)
    state = (seen.float() + length * velocity).bfloat16()
    assert _step_made(visit, state, length + off) == pytest.approx(length + (0.0 if is_fitted else off), abs=2e-4)


def test_given_levels_of_another_schedule_make_the_references_image(loop: Loop) -> None:
    with jitaccel.apply(loop.model, EXACT, noise_levels=SHIFTED):
        states = loop.run(SHIFTED, tiny.start())
    exact = reference.denoise(network_of(loop), EXACT, GRID, tiny.start(), SHIFTED)
    assert relative_error(states[-1], exact.states[-1]) < 1e-5


def test_given_levels_allow_native_schedules_and_callers_steps(loop: Loop) -> None:
    config = EXACT.replace(schedule="native", steps="caller")
    with jitaccel.apply(loop.model, config, noise_levels=UNIFORM):
        states = loop.run(UNIFORM, tiny.start())
    exact = reference.denoise(network_of(loop), config, GRID, tiny.start(), UNIFORM)
    assert relative_error(states[-1], exact.states[-1]) < 1e-5


def test_notes_say_what_the_levels_are(loop: Loop) -> None:
    with jitaccel.apply(loop.model, "7x-paper") as handle:
        assert "predicted" in handle.stats().notes[0]
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=LEVELS["7x-paper"]) as handle:
        assert handle.stats().notes == ()
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=UNIFORM) as handle:
        assert "16 steps" in handle.stats().notes[0] and "11" in handle.stats().notes[0]
