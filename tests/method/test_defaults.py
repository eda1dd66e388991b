"""Torch's default dtype and device, which callers may set, do not change a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig, Request, generate_batch, noise_levels
from jitaccel.method.run import Run
from jitaccel.method.steps import KnownLevels
from tests.support import tiny
from tests.support.tiny import PIXELS_PER_TOKEN, SHORT, TEXT_TOKENS
from tests.support.transformer_loop import Loop

GRID, CHANNELS = (2, 8, 10), 4
CONFIGS = {
    "exact": SHORT,
    "released": SHORT.replace(micro_flow="released"),
    "dpmpp_2m": SHORT.replace(solver="dpmpp_2m", lifter="clean"),
    "pooled": jitaccel.PRESETS["7x"],
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Any] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


def trajectory(config: JiTConfig, start: Tensor, forced: Tensor) -> list[Tensor]:
    """Returns the states of a run whose network is a cheap function of its input."""
    levels = noise_levels(config)
    clock = KnownLevels(config, levels)
    run, state, states = Run(config, GRID, clock.step(0), start, forced=forced, patch=1), start, []
    for index, (level, after) in enumerate(pairwise(levels)):
        step = clock.step(index)
        state = run.enter(step, state)
        velocity = run.leave(step, state, run.show(state).sin() - 0.2 * run.show(state))
        state = state + (after - level) * velocity
        states.append(state)
    return states


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_run_of_the_method_is_the_same_bit_for_bit(name: str, default: str) -> None:
    start = torch.randn(2, 160, CHANNELS, generator=torch.Generator().manual_seed(0))
    forced = torch.zeros(2, 160, dtype=torch.bool)
    forced[:, 3:7] = True
    expected = trajectory(CONFIGS[name], start, forced)
    with DEFAULTS[default]():
        found = trajectory(CONFIGS[name], start, forced)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("execution", ["packed", "indexed"])
def test_picture_of_a_loop_is_the_same_bit_for_bit(default: str, execution: Any) -> None:
    loop, levels, start = Loop(), noise_levels(SHORT), tiny.start()
    call: dict[str, Any] = {
        "encoder_hidden_states": loop.texts[0][0],
        "pooled_projections": loop.texts[0][1],
        "txt_ids": loop.texts[0][2],
        "img_ids": tiny.ids(),
        "guidance": torch.full([1], 3.5),
    }
    timesteps = [torch.tensor([level]) for level in levels]

    def picture() -> Tensor:
        state = start
        with torch.no_grad(), jitaccel.apply(loop.model, SHORT, execution=execution):
            for (level, after), timestep in zip(pairwise(levels), timesteps, strict=False):
                velocity = loop.model(hidden_states=state, timestep=timestep, **call).sample
                state = state + (after - level) * velocity
        return state

    expected = picture()
    with DEFAULTS[default]():
        assert torch.equal(picture(), expected)


def test_batch_of_requests_is_the_same_under_bfloat16() -> None:
    pipe = tiny.pipeline()
    asked = [
        Request(
            prompt="a",
            height=side * PIXELS_PER_TOKEN,
            width=12 * PIXELS_PER_TOKEN,
            preset=SHORT,
            max_sequence_length=TEXT_TOKENS,
            guidance_scale=3.3,
        )
        for side in (12, 8)
    ]
    expected = generate_batch(pipe, asked, output_type="latent")
    with default_dtype(torch.bfloat16):
        found = generate_batch(pipe, asked, output_type="latent")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.image, other.image)
