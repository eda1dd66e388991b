"""HunyuanVideo and HunyuanVideo-1.5 from an image: whole generations, also against the method by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig
from jitaccel.patches.layout import patchify, unpatchify
from tests.support import reference, video
from tests.support.hunyuan import (
    CONCATENATED,
    FROM_IMAGES,
    arguments,
    first_input,
    generate,
    pipeline,
    prompts,
    velocity_on_tokens,
)
from tests.support.tiny import SHORT, relative_error
from tests.support.video import GRID

SCALE, CHANNELS, FRAME = 3.0, 4, GRID[1] * GRID[2]
REPLACED = FROM_IMAGES[0]


def patch_of(name: str) -> tuple[int, ...]:
    return (1, 1, 1) if "15" in name else (1, 2, 2)


def by_hand(name: str, pipe: Any, config: JiTConfig, given: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Returns the method's latents (1, C, T, H, W). `given` is the network's input in the first step."""
    patch = patch_of(name)
    start, condition = patchify(given[:, :CHANNELS], patch), patchify(given[:, CHANNELS:], patch)
    is_given = torch.arange(start.shape[1]) < (FRAME if name == REPLACED else 0)

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        beside = condition[:, anchors] if condition.shape[2] else None
        tokens = torch.where(is_given[anchors][None, :, None], start[:, anchors], tokens)
        positive, negative = (
            velocity_on_tokens(name, pipe.transformer, tokens, anchors, level, text, beside) for text in prompts(name)
        )
        return negative + SCALE * (positive - negative)

    forced = is_given if name == REPLACED else None
    with torch.no_grad():
        state = reference.denoise(velocity, config, GRID, start, levels, forced=forced).states[-1]
    return unpatchify(torch.where(is_given[None, :, None], start, state), GRID, patch)


def native_levels(steps: int) -> tuple[float, ...]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    return tuple(scheduler.sigmas.tolist())


CONFIGS = {
    "few-steps": PRESETS["few-steps"].replace(schedule="native"),
    "7x-paper": PRESETS["7x-paper"].replace(schedule="native"),
    "short": SHORT,
    "own noise": SHORT.replace(noise="own", lifter="clean", solver="dpmpp_2m"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_sparse_generation_is_the_methods(name: str, config: JiTConfig) -> None:
    pipe = pipeline(name)
    assert isinstance(config.steps, int)
    levels = native_levels(config.steps) if config.schedule == "native" else jitaccel.noise_levels(config)
    expected = by_hand(name, pipe, config, first_input(pipe), levels)
    if name == CONCATENATED:
        expected = expected[:, :, 1:]  # the pipeline drops the first frame
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe), expected) < 1e-5
    assert handle.stats().grid == GRID and all(step.calls == 2 for step in handle.stats().steps)


def test_replaced_frame_is_shown_whole_in_every_step() -> None:
    pipe = pipeline(REPLACED)
    frame = first_input(pipe)[:, :, :1]
    with jitaccel.apply(pipe, SHORT) as handle:
        assert torch.equal(generate(pipe)[:, :, :1], frame)
    anchors = handle.stats().anchors
    assert all(torch.equal(each[0, :FRAME], torch.arange(FRAME)) for each in anchors)
    assert [each.shape[1] for each in anchors] == [FRAME + int(share * 2 * FRAME) for share in SHORT.densities]


@pytest.mark.parametrize("solver", ["euler", "caller"])
def test_replaced_frame_is_no_part_of_a_multistep_schedulers_state(solver: Any) -> None:
    pipe = pipeline(REPLACED)
    pipe.scheduler = video.unipc()
    given, config = first_input(pipe), SHORT.replace(solver=solver)
    with jitaccel.apply(pipe, config):
        made = generate(pipe)
    assert made.isfinite().all() and torch.equal(made[:, :, :1], given[:, :, :1])
    if solver == "euler":
        expected = by_hand(REPLACED, pipe, config, given, jitaccel.noise_levels(config))
        assert relative_error(made, expected) < 1e-5


@torch.no_grad()
def test_bare_transformer_that_replaces_a_frame_is_the_methods_in_an_euler_loop() -> None:
    pipe, levels = pipeline(REPLACED), jitaccel.noise_levels(SHORT)
    given = first_input(pipe)
    latents, patch = given.clone(), patch_of(REPLACED)
    start, is_given = patchify(given, patch), torch.arange(3 * FRAME) < FRAME

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        tokens = torch.where(is_given[anchors][None, :, None], start[:, anchors], tokens)
        return velocity_on_tokens(REPLACED, pipe.transformer, tokens, anchors, level, prompts(REPLACED)[0])

    expected = reference.denoise(velocity, SHORT, GRID, start, levels, forced=is_given).states[-1]
    with jitaccel.apply(pipe.transformer, SHORT, noise_levels=levels):
        for level, after in pairwise(levels):
            call = arguments(REPLACED, latents, level, prompts(REPLACED)[0])
            out = pipe.transformer(**call, return_dict=False)[0]
            moved = latents[:, :, 1:] + (after - level) * out[:, :, 1:]
            latents = torch.cat([given[:, :, :1], moved], dim=2)
    assert relative_error(latents[:, :, 1:], unpatchify(expected, GRID, patch)[:, :, 1:]) < 1e-5
