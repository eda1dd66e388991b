"""HunyuanVideo and HunyuanVideo-1.5 in their pipelines: whole generations, also against the method by hand."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig
from jitaccel.patches.layout import patchify, unpatchify
from tests.support import reference
from tests.support.hunyuan import PIPELINES, arguments, generate, pipeline, prompts, velocity_on_tokens
from tests.support.tiny import DENSE, SHORT, relative_error
from tests.support.video import GRID

SCALE = 3.0


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


def patch_of(pipe: Any) -> tuple[int, ...]:
    return (1, 2, 2) if type(pipe).__name__ == "HunyuanVideoPipeline" else (1, 1, 1)


def noise_of(pipe: Any, seed: int = 0) -> Tensor:
    sizes = [side * step for side, step in zip(GRID, patch_of(pipe), strict=True)]
    return torch.randn(1, 4, *sizes, generator=torch.Generator().manual_seed(seed))


def by_hand(pipe: Any, config: JiTConfig, start: Tensor, levels: tuple[float, ...], scale: float = SCALE) -> Tensor:
    """Returns the latents (1, C, T, H, W) that the method gives."""
    name, patch = type(pipe).__name__, patch_of(pipe)

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        positive, negative = (
            velocity_on_tokens(name, pipe.transformer, tokens, anchors, level, text) for text in prompts(name)
        )
        return negative + scale * (positive - negative)

    with torch.no_grad():
        state = reference.denoise(velocity, config, GRID, patchify(start, patch), levels).states[-1]
    return unpatchify(state, GRID, patch)


def native_levels(steps: int) -> tuple[float, ...]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    return tuple(scheduler.sigmas.tolist())


@pytest.mark.parametrize(
    "config",
    [PRESETS["few-steps"].replace(schedule="native"), PRESETS["7x-paper"].replace(schedule="native"), SHORT],
    ids=["few-steps", "7x-paper", "short"],
)
def test_sparse_generation_is_the_methods(pipe: Any, config: JiTConfig) -> None:
    assert isinstance(config.steps, int)
    levels = native_levels(config.steps) if config.schedule == "native" else jitaccel.noise_levels(config)
    expected = by_hand(pipe, config, noise_of(pipe), levels)
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe), expected) < 1e-5
    assert handle.stats().grid == GRID and handle.stats().steps[0].calls == 2


def test_bare_transformer_in_an_euler_loop_is_the_methods(pipe: Any) -> None:
    name, levels, start = type(pipe).__name__, jitaccel.noise_levels(SHORT), noise_of(pipe, 1)
    expected = by_hand(pipe, SHORT, start, levels, scale=1.0)
    latents = start.clone()
    with torch.no_grad(), jitaccel.apply(pipe.transformer, SHORT, noise_levels=levels):
        for level, after in itertools.pairwise(levels):
            call = arguments(name, latents, level, prompts(name)[0])
            latents = latents + (after - level) * pipe.transformer(**call, return_dict=False)[0]
    assert relative_error(latents, expected) < 1e-5


def test_blocks_are_compiled_where_the_forward_does_not_trace() -> None:
    pipe = pipeline("HunyuanVideo15Pipeline")
    with jitaccel.apply(pipe, SHORT):
        eager = generate(pipe)
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager"}, strict=True) as handle:
        assert relative_error(generate(pipe), eager) < 1e-6
        assert relative_error(generate(pipe, seed=1), eager) > 1e-2
    compiled = handle.stats().compiled
    assert compiled is not None and "compiled blocks: 3 graphs" in str(handle.stats())
    # Two blocks, two branches of guidance, five steps, twice; the blocks of a stage share a graph.
    assert compiled.graphs == 3 and compiled.calls == 40 and compiled.eager_calls == 0
    assert all("forward" not in vars(block) for block in pipe.transformer.transformer_blocks)


def test_attention_mask_shrinks_with_the_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("HunyuanVideo15Pipeline")
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        if attn_mask is not None and attn_mask.shape[-2] > 1 and query.shape[-2] > 40:
            seen.append(attn_mask.shape[-2])
        return attend(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with jitaccel.apply(pipe, SHORT) as handle:
        generate(pipe)
    text = 7 + 4 + 3
    assert dict.fromkeys(seen) == dict.fromkeys(step.tokens + text for step in handle.stats().steps)


def test_guidance_that_mixes_tokens_weighs_lifted_branches() -> None:
    pipe = pipeline("HunyuanVideo15Pipeline")
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.7)
    plain = generate(pipe)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe), plain)
    with jitaccel.apply(pipe, SHORT):
        assert generate(pipe).isfinite().all()
