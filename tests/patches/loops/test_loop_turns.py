"""A bare transformer in a custom loop that alternates between the steps of several images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, ConfigError, noise_levels
from tests.support import tiny
from tests.support.tiny import SHORT
from tests.support.transformer_loop import EXACT, LEVELS, SHIFTED, UNIFORM, Loop, on_small_grid


def in_turn(
    loop: Loop,
    levels: Sequence[float],
    starts: Sequence[Tensor],
    *,
    texts: Sequence[int] = (0, 0, 0),
    orders: Sequence[str] = ("none",) * 3,
    delays: Sequence[int] = (0, 0, 0),
    in_place: bool = False,
) -> list[Tensor]:
    """Returns the final states of images that take their steps in turn; `delays`: rounds before each begins."""
    states = [start.to(loop.dtype).clone() for start in starts]
    for i in range(len(levels) - 1 + max(delays)):
        for k, state in enumerate(states):
            at = i - delays[k]
            if not 0 <= at < len(levels) - 1:
                continue
            if orders[k] == "none":
                velocity = loop.velocity(state, levels[at], texts[k])
            else:
                velocity = loop.guided(state, levels[at], orders[k])
            if in_place:
                state.add_(velocity, alpha=levels[at + 1] - levels[at])
            else:
                states[k] = (state.float() + (levels[at + 1] - levels[at]) * velocity.float()).to(loop.dtype)
    return states


def alone(loop: Loop, levels: Sequence[float], starts: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Returns the same images, each made before the next begins."""
    singles = [
        {name: [value[k]] if name != "in_place" else value for name, value in options.items() if name != "delays"}
        for k in range(len(starts))
    ]
    return [
        in_turn(loop, levels, [start], delays=(0,), **single)[0] for start, single in zip(starts, singles, strict=True)
    ]


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"texts": (0, 1, 0)},
        {"delays": (0, 3, 1)},
        {"orders": ("positive first", "none", "negative first")},
        {"in_place": True},
    ],
    ids=["same text", "other texts", "begun later", "guided", "in place"],
)
def test_images_taken_in_turn_are_the_images_alone(given: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    loop, levels = Loop(dtype), LEVELS["4x-paper"]  # bfloat16 makes 1.0 of the first two of these
    starts = [tiny.start(seed) for seed in (1, 2, 3)]
    with jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None) as handle:
        expected = alone(loop, levels, starts, **options)
        images = in_turn(loop, levels, starts, **options)
        assert handle.stats().generations == 6
    for image, single in zip(images, expected, strict=True):
        assert torch.equal(image, single)


@pytest.mark.parametrize("levels", [UNIFORM, SHIFTED], ids=["uniform", "shifted"])
def test_images_in_turn_on_levels_that_nobody_told_are_the_images_alone(loop: Loop, levels: tuple[float, ...]) -> None:
    starts = [tiny.start(seed) for seed in (1, 2)]
    options = {"delays": (0, 2)}
    with jitaccel.apply(loop.model, EXACT):
        expected = alone(loop, levels, starts, **options)
        images = in_turn(loop, levels, starts, **options)
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_velocities_that_the_loop_writes_are_remembered_as_they_were(loop: Loop, given: bool) -> None:
    levels, starts = LEVELS["7x-paper"], [tiny.start(1), tiny.start(2)]
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=levels if given else None) as handle:
        expected = alone(loop, levels, starts)
        states = [start.clone() for start in starts]
        for level, next_level in pairwise(levels):
            for k, state in enumerate(states):
                velocity = loop.velocity(state, level)
                states[k] = state + (next_level - level) * velocity
                velocity.fill_(torch.nan)  # a buffer that is used again
        assert handle.stats().generations == 4
    for state, single in zip(states, expected, strict=True):
        assert torch.equal(state, single)


def test_images_of_different_shape_taken_in_turn_are_the_images_alone(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    starts = [tiny.start(1), torch.cat([tiny.start(2), tiny.start(3)])]
    with jitaccel.apply(loop.model, SHORT):
        expected = alone(loop, levels, starts)
        assert all(torch.equal(*pair) for pair in zip(in_turn(loop, levels, starts), expected, strict=True))


def test_statistics_are_of_the_image_called_last(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        in_turn(loop, levels, [tiny.start(1), tiny.start(2)], delays=(0, 2))
        assert len(handle.stats().steps) == len(levels) - 1
        loop.velocity(tiny.start(3), 1.0)
        assert len(handle.stats().steps) == 1 and handle.stats().generations == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_images_in_turn_from_one_noise_are_refused(given: bool, dtype: torch.dtype) -> None:
    loop, levels = Loop(dtype), LEVELS["4x-paper"]
    with (
        jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None),
        pytest.raises(ConfigError, match=r"must start from different noise.*run them one after the other"),
    ):
        in_turn(loop, levels, [tiny.start(1), tiny.start(1)], texts=(0, 1))


def test_failure_of_one_image_leaves_the_others_alone(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    starts = [tiny.start(1), tiny.start(2)]
    with jitaccel.apply(loop.model, SHORT, noise_levels=levels):
        expected = alone(loop, levels, starts)
        states = [loop.run(levels, start, steps=1)[-1] for start in starts]
        hook = loop.model.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.velocity(states[1], levels[1])
        hook.remove()
        state = states[0]
        for level, next_level in pairwise(levels[1:]):
            state = state + (next_level - level) * loop.velocity(state, level)
        assert torch.equal(state, expected[0])


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_state_that_is_not_finite_belongs_to_the_image_that_broke(loop: Loop, given: bool) -> None:
    levels, starts = LEVELS["7x-paper"], [tiny.start(1), tiny.start(2)]
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=levels if given else None):
        expected = alone(loop, levels, starts)[0]
        states = [loop.run(levels, start, steps=2)[-1] for start in starts]
        states[1] = states[1] + torch.nan
        for level, next_level in pairwise(levels[2:5]):  # to the end of the first stage
            for k in (0, 1):
                states[k] = states[k] + (next_level - level) * loop.velocity(states[k], level)
        states[0] = states[0] + (levels[5] - levels[4]) * loop.velocity(states[0], levels[4])
        with pytest.raises(jitaccel.NonFiniteVelocityError, match="at step 2"):
            loop.velocity(states[1], levels[4])
        first = states[0]
        for level, next_level in pairwise(levels[5:]):
            first = first + (next_level - level) * loop.velocity(first, level)
        assert torch.equal(first, expected)


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_state_edited_between_steps_stays_one_generation(loop: Loop, given: bool) -> None:
    levels, mask = LEVELS["7x-paper"], (torch.arange(tiny.NUM_TOKENS) % 2 == 0)[:, None]
    original, noise = tiny.start(8), tiny.start(0)
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=levels if given else None) as handle:
        state = noise
        for level, next_level in pairwise(levels):
            state = state + (next_level - level) * loop.velocity(state, level)
            noised = (1 - next_level) * original + next_level * tiny.start(int(100 * level))
            state = torch.where(mask, noised, state)
        assert handle.stats().generations == 1
        stages = [PRESETS["7x-paper"].stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)]
        assert [step.stage for step in handle.stats().steps] == stages


def test_more_generations_under_way_than_are_kept_are_refused_until_a_reset(loop: Loop) -> None:
    loop.velocity = on_small_grid(loop.velocity)  # type: ignore[method-assign]
    with jitaccel.apply(loop.model, "7x-paper") as handle:
        for seed in range(64):
            loop.velocity(tiny.start(seed, (6, 6)), 1.0)
        with pytest.raises(ConfigError, match=r"at most 64 generations.*handle\.reset\(\)"):
            loop.velocity(tiny.start(64, (6, 6)), 1.0)
        handle.reset()
        loop.velocity(tiny.start(64, (6, 6)), 1.0)


def test_finished_and_forgotten_generations_are_let_go(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = noise_levels(SHORT)
    monkeypatch.setattr("jitaccel.patches.loops.velocity._FORGOTTEN_AFTER", 20)
    with jitaccel.apply(loop.model, SHORT) as handle:
        loop.run(levels, tiny.start(99), steps=2)
        for seed in range(6):
            loop.run(levels, tiny.start(seed))
        assert len(handle.route._generations) <= 3  # type: ignore[attr-defined]
