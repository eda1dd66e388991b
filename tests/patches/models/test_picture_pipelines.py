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


def test_density_one_is_the_unpatched_pipeline_bit_for_bit(subject: Subject) -> None:
    pipe = subject.make()
    calls: list[dict[str, Any]] = [{}, subject.guidance[1], {"batch": 2}]
    plain = [generate(subject, pipe, **call) for call in calls]
    with jitaccel.apply(pipe, DENSE):
        for call, latents in zip(calls, plain, strict=True):
            assert torch.equal(generate(subject, pipe, **call), latents)
    assert torch.equal(generate(subject, pipe), plain[0])


@pytest.mark.parametrize("config", [PRESETS["few-steps"], SHORT], ids=["few-steps", "short"])
def test_sparse_generation_is_the_methods(subject: Subject, config: JiTConfig) -> None:
    pipe = subject.make()
    expected = by_hand(subject, pipe, config, noise_of(subject, pipe))
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(subject, pipe), expected) < 3e-5  # Z-Image is given 1 - level
    stats = handle.stats()
    assert stats.grid == GRID and stats.batch == 1 and 0 < stats.flops < stats.dense_step_flops * 2 * config.steps
    assert all(step.calls == 2 for step in stats.steps)


def test_picture_of_a_batch_is_the_one_made_alone(subject: Subject) -> None:
    pipe = subject.make()
    with jitaccel.apply(pipe, SHORT):
        together = generate(subject, pipe, batch=2)
        anchors = jitaccel.handle_of(pipe).stats().anchors
        for image in range(2):
            alone = generate(subject, pipe, alone=image)
            assert relative_error(together[image : image + 1], alone) < 1e-5
    assert not torch.equal(anchors[1][0], anchors[1][1])


def test_what_is_compiled_is_said(subject: Subject) -> None:
    pipe = subject.make()
    with jitaccel.apply(pipe, SHORT):
        eager = generate(subject, pipe)
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager"}, strict=True) as handle:
        assert relative_error(generate(subject, pipe), eager) < 1e-6
    compiled = handle.stats().compiled
    assert compiled is not None and compiled.eager_calls == 0
    assert compiled.what == ("stages" if subject is SUBJECTS["AuraFlowPipeline"] else "blocks")


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
