"""Qwen-Image in its pipelines: whole generations, against the unpatched pipeline and the method by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, ConfigError, JiTConfig, UnsupportedModelError
from tests.support import reference
from tests.support.every_model import TEXT, qwen_transformer
from tests.support.models import noise
from tests.support.qwen import (
    GRID,
    LAYERED,
    LAYERS,
    first_input,
    generate,
    prompts,
    qwen_on_tokens,
    qwen_pipeline,
    small_references,
)
from tests.support.tiny import SHORT, relative_error

SCALE = 3.0


def by_hand(
    pipe: Any,
    config: JiTConfig,
    start: Tensor,
    scale: float = SCALE,
    references: Tensor | None = None,
    keeps_norm: bool = True,
) -> Tensor:
    """Returns the tokens (1, N, D) that the method gives, guided as the pipelines do it: with the norm of a branch."""

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        level = float(torch.tensor(1000 * level) / 1000)
        branches = [
            qwen_on_tokens(pipe.transformer, tokens, anchors, level, text, references)
            for text in prompts()[: 1 if scale == 1.0 else 2]
        ]
        if scale == 1.0:
            return branches[0]
        guided = branches[1] + scale * (branches[0] - branches[1])
        if not keeps_norm:
            return guided
        return guided * branches[0].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)

    grid = (LAYERS + 1, *GRID) if pipe.transformer.config.use_layer3d_rope else GRID
    with torch.no_grad():
        levels = jitaccel.noise_levels(config)
        return reference.denoise(velocity, config, grid, start, levels).states[-1]


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize(
    "config", [PRESETS["few-steps"], PRESETS["7x-paper"], SHORT], ids=["few-steps", "7x-paper", "short"]
)
def test_sparse_generation_is_the_methods(config: JiTConfig, scale: float) -> None:
    pipe = qwen_pipeline()
    expected = by_hand(pipe, config, first_input(pipe), scale)
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, true_cfg_scale=scale), expected) < 1e-5
    stats = handle.stats()
    assert stats.grid == GRID and stats.text_tokens == TEXT and stats.steps[0].calls == (1 if scale == 1.0 else 2)


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_references_stay_whole_and_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_references(monkeypatch, name)
    pipe = qwen_pipeline(name)
    shown = first_input(pipe)
    start, references = shown[:, :140], shown[:, 140:]
    assert references.shape[1] == 48
    expected = by_hand(pipe, SHORT, start, references=references)
    with jitaccel.apply(pipe, SHORT):
        assert relative_error(generate(pipe), expected) < 1e-5


@pytest.mark.parametrize("keeps_norm", [False, True])
@pytest.mark.parametrize("config", [PRESETS["few-steps"], SHORT], ids=["few-steps", "short"])
def test_layers_are_a_stack(config: JiTConfig, keeps_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_references(monkeypatch, LAYERED)
    pipe, grid = qwen_pipeline(LAYERED), (LAYERS + 1, *GRID)
    start, references = first_input(pipe).split([3 * 140, 140], dim=1)
    expected = by_hand(pipe, config, start, references=references, keeps_norm=keeps_norm)
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, cfg_normalize=keeps_norm), expected) < 1e-5
    stats = handle.stats()
    assert stats.grid == grid and stats.steps[0].tokens < stats.steps[-1].tokens == 420
    first, *later = (torch.zeros(1, 420).index_fill(1, each[0], 1.0).view(3, -1).sum(1) for each in stats.anchors)
    assert (first > 0).all() and torch.equal(later[-1], torch.full((3,), 140.0))


def test_layers_of_several_sizes_are_refused() -> None:
    model = qwen_transformer(use_layer3d_rope=True)
    given = {"encoder_hidden_states": prompts()[0], "timestep": torch.ones(1)}
    for shapes in ([(1, 10, 14), (1, 5, 7), (1, 10, 14)], [(1, 10, 14)], (1, 10, 14)):
        with torch.no_grad(), jitaccel.apply(model, SHORT), pytest.raises(ValueError, match="must be layers"):
            model(noise(5, 1, 140, 16), **given, img_shapes=[shapes])


def test_generation_may_start_among_the_levels() -> None:
    pipe = qwen_pipeline("QwenImageImg2ImgPipeline")
    with jitaccel.apply(pipe, "few-steps") as handle:
        assert generate(pipe, 7, strength=0.8).isfinite().all()
    steps = handle.stats().steps
    assert 0.0 < steps[0].noise_level < 1.0 and steps[0].tokens < steps[-1].tokens == 140


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_bare_transformer_in_an_euler_loop_is_the_methods(given: bool) -> None:
    pipe, levels, start = qwen_pipeline(), jitaccel.noise_levels(SHORT), noise(5, 1, 140, 16)
    expected, state = by_hand(pipe, SHORT, start, scale=1.0), start.clone()
    with torch.no_grad(), jitaccel.apply(pipe.transformer, SHORT, noise_levels=levels if given else None):
        for level, after in itertools.pairwise(levels):
            velocity = pipe.transformer(
                hidden_states=state,
                encoder_hidden_states=prompts()[0],
                timestep=torch.tensor([level]),
                img_shapes=[[(1, *GRID)]],
                return_dict=False,
            )[0]
            state = state + (after - level) * velocity
    assert relative_error(state, expected) < 1e-5


def test_what_is_not_covered_is_refused() -> None:
    model = qwen_transformer()
    given = {"encoder_hidden_states": prompts()[0], "timestep": torch.ones(1), "img_shapes": [[(1, *GRID)]]}
    with torch.no_grad(), jitaccel.apply(model, SHORT):
        with pytest.raises(UnsupportedModelError, match="got ControlNet residuals"):
            model(noise(5, 1, 140, 16), **given, controlnet_block_samples=[noise(6, 1, 140, 24)])
        with pytest.raises(ValueError, match="img_shapes must have the same"):
            model(noise(5, 2, 140, 16), **{**given, "img_shapes": [[(1, 10, 14)], [(1, 14, 10)]]})


def test_warm_up_of_a_pipeline_that_takes_no_size_is_refused() -> None:
    pipe, says = qwen_pipeline("QwenImageLayeredPipeline"), "must take height and width, got a QwenImageLayered"
    with jitaccel.apply(pipe, SHORT) as handle, pytest.raises(ConfigError, match=says):
        handle.warmup([(64, 64)], progress=False)
