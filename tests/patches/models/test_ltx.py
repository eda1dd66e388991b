"""LTX-Video in its pipeline, with batched guidance: whole generations, also against the method by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from tests.support import reference
from tests.support.ltx import arguments, generate, ltx_on_tokens, pipeline, prompts
from tests.support.pooled import POOLED
from tests.support.tiny import DENSE, SHORT, relative_error
from tests.support.video import GRID

SCALE = 3.0


def noise_of(seed: int = 0) -> Tensor:
    """Returns the packed noise that the pipeline draws from the seed."""
    noise = torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(seed))
    return noise.flatten(2).transpose(1, 2).contiguous()


def by_hand(pipe: Any, config: JiTConfig, scale: float = SCALE) -> Tensor:
    """Returns the tokens (1, N, D) that the method gives."""

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        positive, negative = (ltx_on_tokens(pipe.transformer, tokens, anchors, level, text) for text in prompts())
        return positive if scale == 1.0 else negative + scale * (positive - negative)

    with torch.no_grad():
        levels = jitaccel.noise_levels(config)
        return reference.denoise(velocity, config, GRID, noise_of(), levels).states[-1]


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("config", [PRESETS["few-steps"], SHORT], ids=["few-steps", "short"])
def test_sparse_generation_is_the_methods(config: JiTConfig, scale: float) -> None:
    pipe = pipeline()
    expected = by_hand(pipe, config, scale)
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, guidance_scale=scale), expected) < 1e-5
    stats = handle.stats()
    assert stats.grid == GRID and stats.batch == 1
    assert all(step.calls == (1 if scale == 1.0 else 2) for step in stats.steps)


@torch.no_grad()
def test_pooled_stage_is_the_smaller_video_made_by_hand() -> None:
    pipe = pipeline()

    def velocity(tokens: Tensor, grid: tuple[int, ...], level: float) -> Tensor:
        positive, negative = (
            pipe.transformer(**arguments(tokens, grid, level, text), return_dict=False)[0] for text in prompts()
        )
        return negative + SCALE * (positive - negative)

    levels = jitaccel.noise_levels(POOLED)
    latents = noise_of().unflatten(1, GRID)
    for i, (level, after) in enumerate(itertools.pairwise(levels)):
        if POOLED.stage_of_step(i, 5) == 0:
            frames, rows, columns = GRID
            blocks = latents.unflatten(3, (columns // 2, 2)).unflatten(2, (rows // 2, 2))
            small_level = (level / 2) / (1 - level / 2)
            small = blocks.mean(dim=(3, 5)) / (1 - level / 2)
            out = velocity(small.flatten(1, 3), (frames, rows // 2, columns // 2), small_level)
            clean = small - small_level * out.unflatten(1, small.shape[1:4])
            large = torch.nn.functional.interpolate(
                clean[0].permute(0, 3, 1, 2), scale_factor=2, mode="bilinear"
            ).permute(0, 2, 3, 1)[None]
            full = (latents - large) / level
        else:
            full = velocity(latents.flatten(1, 3), GRID, level).unflatten(1, GRID)
        latents = latents + (after - level) * full
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(generate(pipe), latents.flatten(1, 3)) < 1e-5


def test_bare_transformer_in_an_euler_loop_is_the_methods() -> None:
    pipe, levels, state = pipeline(), jitaccel.noise_levels(SHORT), noise_of()
    expected = by_hand(pipe, SHORT, scale=1.0)
    with torch.no_grad(), jitaccel.apply(pipe.transformer, SHORT, noise_levels=levels):
        for level, after in itertools.pairwise(levels):
            call = arguments(state, GRID, level, prompts()[0])
            state = state + (after - level) * pipe.transformer(**call, return_dict=False)[0]
    assert relative_error(state, expected) < 1e-5


def test_recorded_stages_are_one_graph_each() -> None:
    pipe = pipeline()
    with jitaccel.apply(pipe, SHORT):
        eager = generate(pipe)
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager", "graphs": True}, strict=True) as handle:
        assert relative_error(generate(pipe), eager) < 1e-6
    compiled = handle.stats().compiled
    assert compiled is not None and compiled.graphs == compiled.captures == 3 and compiled.eager_calls == 0


def test_rescaled_guidance_weighs_lifted_branches() -> None:
    pipe = pipeline()
    plain = generate(pipe, guidance_rescale=0.7)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, guidance_rescale=0.7), plain)
    with jitaccel.apply(pipe, SHORT):
        assert relative_error(generate(pipe, guidance_rescale=0.7), generate(pipe)) > 1e-3


def test_positions_of_its_own_are_refused() -> None:
    pipe = pipeline()
    given = {**arguments(noise_of(), GRID, 1.0, prompts()[0]), "video_coords": torch.zeros(1, 3, 144)}
    with jitaccel.apply(pipe.transformer, SHORT), pytest.raises(UnsupportedModelError, match="positions of its own"):
        pipe.transformer(**given)
