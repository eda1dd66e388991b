"""A bare transformer in a custom loop: where a generation starts and ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, noise_levels
from tests.support import tiny
from tests.support.tiny import SHORT
from tests.support.transformer_loop import EXACT, LEVELS, Loop, on_small_grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_new_generation_is_told_from_the_last(given: bool, dtype: torch.dtype) -> None:
    levels, loop = LEVELS["4x-paper"], Loop(dtype)  # bfloat16 makes 1.0 of the first two of these
    noise = [tiny.start(seed, (6, 6)) for seed in (1, 2)]
    loop.velocity = on_small_grid(loop.velocity)  # type: ignore[method-assign]

    def fresh(seed: int) -> Tensor:
        with jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None):
            return loop.run(levels, noise[seed])[-1]

    images = [fresh(0), fresh(1)]
    with jitaccel.apply(loop.model, "4x-paper", noise_levels=levels if given else None) as handle:
        for seed in (0, 1, 1):
            assert torch.equal(loop.run(levels, noise[seed])[-1], images[seed])
        assert handle.stats().generations == 3
        for aborted_after, seed in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (16, 1)):
            loop.run(levels, noise[0], steps=aborted_after)
            assert torch.equal(loop.run(levels, noise[seed])[-1], images[seed]), (aborted_after, seed)


def test_generation_after_an_exception_is_clean(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT):
        clean = loop.run(levels, tiny.start())[-1]
        for step in range(4):
            loop.run(levels, tiny.start(), steps=step)
            hook = loop.model.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.velocity(tiny.start(5), 1.0)
            hook.remove()
            assert torch.equal(loop.run(levels, tiny.start())[-1], clean)


def test_reset_forgets_an_unfinished_generation(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        clean = loop.run(levels, tiny.start())[-1]
        loop.run(levels, tiny.start(), steps=3)
        handle.reset()
        assert torch.equal(loop.run(levels, tiny.start())[-1], clean)


def test_shape_may_change_between_generations(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        one = loop.run(levels, tiny.start())[-1]
        two = loop.run(levels, torch.cat([tiny.start(), tiny.start(4)]))[-1]
        torch.testing.assert_close(two[:1], one, rtol=1e-5, atol=1e-5)
        assert torch.equal(loop.run(levels, tiny.start())[-1], one)
        assert handle.stats().generations == 3


def test_loop_with_more_steps_than_predicted_stays_one_generation(loop: Loop) -> None:
    levels = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0)  # the step after .2 is predicted to end at 0
    with jitaccel.apply(loop.model, EXACT) as handle:
        assert loop.run(levels, tiny.start())[-1].isfinite().all()
    assert handle.stats().generations == 1 and len(handle.stats().steps) == 8


@pytest.mark.parametrize("at", [0, 4])
def test_level_that_is_not_one_of_those_given_raises(loop: Loop, at: int) -> None:
    levels = LEVELS["7x-paper"]
    handle = jitaccel.apply(loop.model, "7x-paper", noise_levels=levels, execution="indexed")
    with handle, tiny.forwards(loop.model) as seen:
        state = loop.run(levels, tiny.start(), steps=at)[-1] if at else tiny.start()
        seen.clear()
        with pytest.raises(ConfigError, match=r"noise_levels given to apply, got level 0\.5"):
            loop.velocity(state, 0.5)
        assert not seen


@pytest.mark.parametrize("order", ["none", "positive first", "batch"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_loop_stopped_after_any_step_and_begun_again_makes_the_same_bits(solver: str, given: bool, order: str) -> None:
    config = SHORT.replace(solver=solver, densities=(0.35, 1.0), boundaries=(0.4, 1.0), steps=4)
    loop, levels = Loop(), noise_levels(config)
    loop.velocity = on_small_grid(loop.velocity)  # type: ignore[method-assign]
    noise = tiny.start(1, (6, 6))
    with jitaccel.apply(loop.model, config, noise_levels=levels if given else None) as handle:
        clean = loop.run(levels, noise, order)[-1]
        for stopped_after in range(len(levels) - 1):
            handle.reset()
            loop.run(levels, noise, order, steps=stopped_after)
            for again in range(2):
                assert torch.equal(loop.run(levels, noise, order)[-1], clean), (stopped_after, again)


def test_loop_begun_again_with_another_prompt_is_the_picture_made_alone() -> None:
    loop, levels = Loop(), noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT) as handle:
        guided = loop.run(levels, tiny.start(), "positive first")[-1]
        for stopped_after in (1, 2, 3):
            handle.reset()
            loop.run(levels, tiny.start(), steps=stopped_after)
            assert torch.equal(loop.run(levels, tiny.start(), "positive first")[-1], guided), stopped_after
