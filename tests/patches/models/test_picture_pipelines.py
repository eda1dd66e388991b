"""Z-Image, AuraFlow, HunyuanImage-2.1 and Lumina2 through their pipelines: whole generations, also by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from jitaccel.patches.layout import patchify, unpatchify
from jitaccel.patches.models import model_of
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


def limited(positive: Tensor, negative: Tensor) -> Tensor:
    """Z-Image's: no longer than 0.8 of the guiding picture."""
    mixed = positive + SCALE * (positive - negative)
    return mixed * (0.8 * positive.norm() / mixed.norm()).clamp(max=1.0)


def as_long_rows(positive: Tensor, negative: Tensor) -> Tensor:
    """Lumina2's: each row of a channel as long as that of the guiding picture."""
    mixed = unpatchify(negative + SCALE * (positive - negative), GRID, (2, 2))
    rows = unpatchify(positive, GRID, (2, 2)).norm(dim=3, keepdim=True)
    return patchify(mixed * rows / mixed.norm(dim=3, keepdim=True), (2, 2))


@pytest.mark.parametrize(
    ("name", "guided", "setting"),
    [("ZImagePipeline", limited, 0.8), ("Lumina2Pipeline", as_long_rows, True)],
    ids=["Z-Image", "Lumina2"],
)
def test_guidance_of_whole_pictures_weighs_lifted_branches(
    name: str, guided: Callable[[Tensor, Tensor], Tensor], setting: Any
) -> None:
    subject = SUBJECTS[name]
    pipe = subject.make()
    expected = by_hand(subject, pipe, SHORT, noise_of(subject, pipe), guided, mixes=True)
    call = {"cfg_normalization": setting}
    plain = generate(subject, pipe, **call)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(subject, pipe, **call), plain)
    with jitaccel.apply(pipe, SHORT):
        got = generate(subject, pipe, **call)
    assert relative_error(got, expected) < 1e-5
    # Zeros at inactive tokens would have changed the norms.
    unlifted = by_hand(subject, pipe, SHORT, noise_of(subject, pipe), guided, mixes=True, lifts=False)
    assert relative_error(got, unlifted) > 1e-4


def test_bare_transformer_in_an_euler_loop_is_the_methods(subject: Subject) -> None:
    pipe, levels = subject.make(), jitaccel.noise_levels(SHORT)
    latents, model = noise_of(subject, pipe), model_of(pipe.transformer)
    assert model is not None
    expected = by_hand(subject, pipe, SHORT, latents, guided=lambda positive, negative: positive)
    with torch.no_grad(), jitaccel.apply(pipe.transformer, SHORT, noise_levels=levels):
        for level, after in itertools.pairwise(levels):
            share = 1.0 - level if model.is_inverted else level
            call = {
                **subject.text(subject.prompts(20, 1)),
                "hidden_states": latents,
                "timestep": torch.tensor([model.per_level * share]),
            }
            output = pipe.transformer(**model.words.write(call), return_dict=False)[0]
            latents = latents + (after - level) * model.sign * model.words.tensor(output)
    assert relative_error(latents, expected) < 3e-5


def test_guidance_may_end_early_on_lumina() -> None:
    subject = SUBJECTS["Lumina2Pipeline"]
    pipe = subject.make()
    with jitaccel.apply(pipe, SHORT) as handle:
        assert generate(subject, pipe, cfg_normalization=True, cfg_trunc_ratio=0.5).isfinite().all()
    assert [step.calls for step in handle.stats().steps] == [2, 2, 1, 1, 1]


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
