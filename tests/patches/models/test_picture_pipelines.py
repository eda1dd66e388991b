"""Z-Image, AuraFlow and HunyuanImage-2.1 through their pipelines: whole generations, also by hand."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from tests.support.picture_pipelines import GRID, SCALE, SUBJECTS, Subject, by_hand, generate, hunyuan_image
from tests.support.tiny import DENSE, SHORT, relative_error

NAMES = [*SUBJECTS]


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def noise_of(subject: Subject, pipe: Any) -> Tensor:
    side = 1 if subject.pixels == 32 else 2
    return torch.randn(1, 4, side * GRID[0], side * GRID[1], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [PRESETS["few-steps"], SHORT], ids=["few-steps", "short"])
def test_sparse_generation_is_the_methods(subject: Subject, config: JiTConfig) -> None:
    pipe = subject.make()
    expected = by_hand(subject, pipe, config, noise_of(subject, pipe))
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(subject, pipe), expected) < 3e-5  # Z-Image is given 1 - level
    stats = handle.stats()
    assert stats.grid == GRID and stats.batch == 1 and 0 < stats.flops < stats.dense_step_flops * 2 * config.steps
    assert all(step.calls == 2 for step in stats.steps)


def test_guidance_of_whole_pictures_weighs_lifted_branches() -> None:
    subject = SUBJECTS["ZImagePipeline"]
    pipe = subject.make()

    def guided(positive: Tensor, negative: Tensor) -> Tensor:
        mixed = positive + SCALE * (positive - negative)
        return mixed * (0.8 * positive.norm() / mixed.norm()).clamp(max=1.0)

    expected = by_hand(subject, pipe, SHORT, noise_of(subject, pipe), guided, mixes=True)
    call = {"cfg_normalization": 0.8}
    plain = generate(subject, pipe, **call)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(subject, pipe, **call), plain)
    with jitaccel.apply(pipe, SHORT):
        got = generate(subject, pipe, **call)
    assert relative_error(got, expected) < 1e-5
    # Zeros at inactive tokens would have changed the norms.
    unlifted = by_hand(subject, pipe, SHORT, noise_of(subject, pipe), guided)
    assert relative_error(got, unlifted) > 1e-4


def test_default_guider_of_hunyuan_image_runs() -> None:
    subject = SUBJECTS["HunyuanImagePipeline"]
    guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=SCALE, adaptive_projected_guidance_start_step=1)
    pipe = hunyuan_image(guider)
    plain = generate(subject, pipe)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(subject, pipe), plain)
    with jitaccel.apply(pipe, SHORT) as handle:
        assert generate(subject, pipe).isfinite().all()
        assert all(step.calls == 2 for step in handle.stats().steps)


def test_unknown_guider_is_refused() -> None:
    subject = SUBJECTS["HunyuanImagePipeline"]
    pipe = hunyuan_image(diffusers.SkipLayerGuidance(guidance_scale=SCALE, skip_layer_guidance_layers=[0]))
    with jitaccel.apply(pipe, SHORT), pytest.raises(UnsupportedModelError, match="guider that is not known"):
        generate(subject, pipe)
