"""Transformers that cannot be cut are refused by name; for unknown ones the error lists possible places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import jitaccel
from jitaccel import UnsupportedModelError
from jitaccel.patches.models import MODELS
from jitaccel.patches.models.refused import REFUSED, remark_on
from tests.support.every_model import hunyuan15_transformer, hunyuan_image_transformer
from tests.support.video import euler, wan_pipeline

REASONS = {
    "SanaTransformer2DModel": "3x3 convolution over the grid",
    "SanaVideoTransformer3DModel": "3x3 convolution over the grid",
    "CogVideoXTransformer3DModel": "not predict the velocity of flow matching",
    "PixArtTransformer2DModel": "not predict the velocity of flow matching",
}


def model_of(name: str) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, name)(num_layers=1)


@pytest.mark.parametrize("name", REASONS)
def test_transformer_is_refused_by_name_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be accelerated: .*{REASONS[name]}"):
        jitaccel.apply(model_of(name))


def test_pipeline_of_one_is_refused_with_the_reason() -> None:
    transformer = model_of("SanaTransformer2DModel")
    pipe = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=euler()
    )
    with pytest.raises(UnsupportedModelError, match=r"one of FluxPipeline.* WanPipeline.*3x3 convolution"):
        jitaccel.apply(pipe)


@pytest.mark.parametrize("make", [hunyuan15_transformer, hunyuan_image_transformer])
def test_model_of_the_mean_velocity_of_a_step_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="mean velocity of a whole step"):
        jitaccel.apply(make(use_meanflow=True), noise_levels=(1.0, 0.5, 0.0), steps=2)


def test_refused_and_known_are_different() -> None:
    assert REASONS.keys() == REFUSED.keys() and not REFUSED.keys() & {model.name for model in MODELS}


def test_unknown_transformer_is_refused_with_the_places_found() -> None:
    class Unheard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x_embedder, self.rope, self.proj_out = nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)

    words = (
        r"Unheard has x_embedder \(makes tokens\), rope \(knows positions\), proj_out \(projects last\), so support "
        r"can probably be added: see docs/adding-a-model.md"
    )
    with pytest.raises(UnsupportedModelError, match=words):
        jitaccel.apply(Unheard())
    assert remark_on(nn.Linear(2, 2)) == ""


def test_pipeline_of_a_known_kind_with_another_transformer_is_refused() -> None:
    pipe = wan_pipeline()
    pipe.transformer = model_of("PixArtTransformer2DModel")
    with pytest.raises(UnsupportedModelError, match="transformer must be a WanTransformer3DModel, got PixArt"):
        jitaccel.apply(pipe)
