"""Stable Diffusion 3 in its pipelines, with batched guidance: whole generations, also against the method by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from jitaccel.patches.layout import patchify, unpatchify
from tests.support import reference
from tests.support.every_model import sd3_transformer
from tests.support.models import noise
from tests.support.sd3 import GRID, PIPELINES, generate, pipeline, prompts, sd3_on_tokens
from tests.support.tiny import SHORT, relative_error

SCALE = 3.0
PATCH = (2, 2)


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


def noise_of(seed: int = 0) -> Tensor:
    return torch.randn(1, 4, 20, 28, generator=torch.Generator().manual_seed(seed))


def by_hand(pipe: Any, config: JiTConfig, scale: float = SCALE, skip_from: int | None = None) -> Tensor:
    """Returns the latents (1, C, H, W) that the method gives. skip_from: the step at which a block is left out, too."""
    levels = jitaccel.noise_levels(config)

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        positive, negative = (sd3_on_tokens(pipe.transformer, tokens, anchors, level, text) for text in prompts())
        if scale == 1.0:
            return positive
        guided = negative + scale * (positive - negative)
        if levels.index(level) != skip_from:
            return guided
        without = sd3_on_tokens(pipe.transformer, tokens, anchors, level, prompts()[0], skipped=(1,))
        return guided + 2.0 * (positive - without)

    with torch.no_grad():
        state = reference.denoise(velocity, config, GRID, patchify(noise_of(), PATCH), levels).states[-1]
    return unpatchify(state, GRID, PATCH)


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize(
    "config", [PRESETS["few-steps"], PRESETS["7x-paper"], SHORT], ids=["few-steps", "7x-paper", "short"]
)
def test_sparse_generation_is_the_methods(config: JiTConfig, scale: float) -> None:
    pipe = pipeline()
    expected = by_hand(pipe, config, scale)
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, guidance_scale=scale), expected) < 1e-5
    stats = handle.stats()
    assert stats.grid == GRID and stats.batch == 1
    assert all(step.calls == (1 if scale == 1.0 else 2) for step in stats.steps)


def test_branch_of_skip_layer_guidance_has_the_same_anchors() -> None:
    pipe = pipeline()
    expected = by_hand(pipe, SHORT, skip_from=1)
    with jitaccel.apply(pipe, SHORT) as handle:
        latents = generate(
            pipe,
            skip_guidance_layers=[1],
            skip_layer_guidance_scale=2.0,
            skip_layer_guidance_start=0.1,
            skip_layer_guidance_stop=0.3,
        )
    assert relative_error(latents, expected) < 1e-5
    assert [step.calls for step in handle.stats().steps] == [2, 3, 2, 2, 2]


def test_generation_may_start_among_the_levels() -> None:
    pipe = pipeline(PIPELINES[1])
    with jitaccel.apply(pipe, "few-steps") as handle:
        assert generate(pipe, 7, strength=0.8).isfinite().all()
    steps = handle.stats().steps
    assert len(steps) < 7 and steps[0].noise_level < 1.0 and steps[0].tokens < steps[-1].tokens == 140


def test_bare_transformer_in_an_euler_loop_is_the_methods() -> None:
    pipe, levels, latents = pipeline(), jitaccel.noise_levels(SHORT), noise_of()
    expected = by_hand(pipe, SHORT, scale=1.0)
    with torch.no_grad(), jitaccel.apply(pipe.transformer, SHORT, noise_levels=levels):
        for level, after in itertools.pairwise(levels):
            velocity = pipe.transformer(
                hidden_states=latents,
                encoder_hidden_states=prompts()[0][0],
                pooled_projections=prompts()[0][1],
                timestep=torch.tensor([1000 * level]),
                return_dict=False,
            )[0]
            latents = latents + (after - level) * velocity
    assert relative_error(latents, expected) < 1e-5


def test_controlnet_residuals_are_refused() -> None:
    model = sd3_transformer()
    given = {"encoder_hidden_states": prompts()[0][0], "pooled_projections": prompts()[0][1], "timestep": torch.ones(1)}
    with torch.no_grad(), jitaccel.apply(model, SHORT), pytest.raises(UnsupportedModelError, match="ControlNet resid"):
        model(noise_of(), **given, block_controlnet_hidden_states=[noise(6, 1, 140, 16)])
