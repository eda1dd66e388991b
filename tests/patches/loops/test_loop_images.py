"""A bare transformer in a custom Euler loop makes the pipeline's image."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import jitaccel
from jitaccel import PRESETS, JiTConfig, noise_levels
from tests.support import tiny
from tests.support.tiny import SHORT, relative_error
from tests.support.transformer_loop import CLEAN, EXACT, LEVELS, SCALE, Loop, through_pipeline


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize(
    "config",
    [
        PRESETS["7x"],
        PRESETS["4x"],
        PRESETS["7x-paper"],
        PRESETS["4x-paper"],
        EXACT,
        SHORT.replace(noise="own", lifter="clean"),
        SHORT.replace(micro_flow="none"),
        CLEAN,
    ],
    ids=["7x", "4x", "7x-paper", "4x-paper", "exact", "own-clean", "none", "clean-none"],
)
def test_loop_makes_the_pipelines_image(loop: Loop, config: JiTConfig, given: bool) -> None:
    levels = noise_levels(config)
    with jitaccel.apply(loop.model, config, noise_levels=levels if given else None) as handle:
        state = loop.run(levels, tiny.start())[-1]
        assert relative_error(state, through_pipeline(config)) < 1e-5
    counts = config.token_counts(tiny.NUM_TOKENS)
    stages = [config.stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)]
    assert [step.tokens for step in handle.stats().steps] == [counts[stage] for stage in stages]
    assert handle.stats().generations == 1


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("preset", ["7x", "4x", "7x-paper", "4x-paper"])
def test_loop_in_bfloat16_makes_the_pipelines_image_to_rounding(preset: str, given: bool) -> None:
    levels, loop = LEVELS[preset], Loop(torch.bfloat16)
    dense = loop.run(levels, tiny.start())[-1]
    with jitaccel.apply(loop.model, preset, noise_levels=levels if given else None) as handle:
        state = loop.run(levels, tiny.start())[-1]
    target = through_pipeline(preset, dtype=torch.bfloat16)
    far = float((dense.float() - target.float()).abs().mean())
    assert float((state.float() - target.float()).abs().mean()) < 0.25 * far
    assert [step.stage for step in handle.stats().steps] == [
        PRESETS[preset].stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)
    ]


@pytest.mark.parametrize("order", ["none", "positive first", "batch"])
def test_loop_that_writes_in_place_makes_the_same_image(loop: Loop, order: str) -> None:
    config = EXACT.replace(noise="own")
    levels = noise_levels(config)
    with jitaccel.apply(loop.model, config):
        plain = loop.run(levels, tiny.start(), order)[-1]
        assert relative_error(loop.run(levels, tiny.start(), order, in_place=True)[-1], plain) < 1e-4


def test_nobodys_tensor_is_written(loop: Loop) -> None:
    levels = noise_levels(EXACT)
    state = tiny.start()
    with jitaccel.apply(loop.model, EXACT):
        for level, next_level in pairwise(levels):
            copy = state.clone()
            velocity = loop.velocity(state, level)
            assert torch.equal(state, copy)
            kept = velocity.clone()
            loop.velocity(state, level, 1)
            assert torch.equal(velocity, kept)
            state = state + (next_level - level) * velocity


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("order", ["positive first", "negative first", "batch"])
@pytest.mark.parametrize(
    "config",
    [EXACT, SHORT, CLEAN, PRESETS["7x"], EXACT.replace(solver="dpmpp_2m")],
    ids=["7x-paper", "stage of one step", "clean, none", "7x", "solver and moves"],
)
def test_guided_loop_makes_the_guided_pipelines_image(loop: Loop, config: JiTConfig, order: str, given: bool) -> None:
    levels = noise_levels(config)
    target = through_pipeline(config, true_cfg_scale=SCALE)
    with jitaccel.apply(loop.model, config, noise_levels=levels if given else None) as handle:
        assert relative_error(loop.run(levels, tiny.start(), order)[-1], target) < 1e-4
    calls, batch = (1, 2) if order == "batch" else (2, 1)
    assert {step.calls for step in handle.stats().steps} == {calls} and handle.stats().batch == batch


def test_batched_and_sequential_guidance_make_the_same_image(loop: Loop) -> None:
    levels = noise_levels(EXACT)
    images = []
    for order in ("batch", "positive first", "negative first"):
        with jitaccel.apply(loop.model, EXACT):
            images.append(loop.run(levels, tiny.start(), order)[-1])
    assert relative_error(images[1], images[0]) < 1e-4
    assert relative_error(images[2], images[0]) < 1e-4


def test_image_of_a_batch_is_the_image_alone(loop: Loop) -> None:
    levels = noise_levels(EXACT)
    start = torch.cat([tiny.start(1), tiny.start(2)])
    with jitaccel.apply(loop.model, EXACT):
        together = loop.run(levels, start)[-1]
        for image in range(2):
            alone = loop.run(levels, start[image : image + 1])[-1]
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-5, atol=1e-5)


def test_arguments_of_one_row_serve_the_whole_batch(loop: Loop) -> None:
    state = torch.cat([tiny.start(1), tiny.start(2)])
    embeds, pooled, text_ids = loop.texts[0]
    arguments = (state, embeds.expand(2, -1, -1), pooled.expand(2, -1))
    with jitaccel.apply(loop.model, EXACT), torch.no_grad():
        expected = loop.velocity(state, 1.0)
    with jitaccel.apply(loop.model, EXACT), torch.no_grad():
        velocity = loop.model(*arguments, torch.ones(1), tiny.ids(), text_ids, torch.tensor([3.5])).sample
    torch.testing.assert_close(velocity, expected)
