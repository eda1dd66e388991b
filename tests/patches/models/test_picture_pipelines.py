"""Image pipelines of cut models, and Mochi: whole generations, also against the method by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from jitaccel.patches.diffusers.asked import evenly_spaced, refuse_custom_levels, with_steps
from jitaccel.patches.layout import patchify, unpatchify
from jitaccel.patches.models import model_of
from tests.support import video
from tests.support.more_models import raster_ids
from tests.support.picture_pipelines import GRID, SCALE, SUBJECTS, Subject, by_hand, generate, hunyuan_image, noise_of
from tests.support.pooled import POOLED, denoise_pooled
from tests.support.tiny import DENSE, SHORT, relative_error

NAMES = [*SUBJECTS]


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@pytest.mark.parametrize("config", [PRESETS["few-steps"], SHORT], ids=["few-steps", "short"])
def test_sparse_generation_is_the_methods(subject: Subject, config: JiTConfig) -> None:
    pipe = subject.make()
    expected = by_hand(subject, pipe, config, noise_of(subject))
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(subject, pipe), expected) < 3e-5  # Z-Image is given 1 - level
    stats = handle.stats()
    assert stats.grid == subject.grid and stats.batch == 1
    assert 0 < stats.flops < stats.dense_step_flops * 2 * config.steps
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


def as_spread(positive: Tensor, negative: Tensor) -> Tensor:
    """Bria's: 0.7 of it is as spread as the guiding picture."""
    mixed = negative + SCALE * (positive - negative)
    return mixed * (0.7 * positive.std() / mixed.std()) + 0.3 * mixed


@pytest.mark.parametrize(
    ("name", "guided", "call"),
    [
        ("ZImagePipeline", limited, {"cfg_normalization": 0.8}),
        ("Lumina2Pipeline", as_long_rows, {"cfg_normalization": True}),
        ("BriaPipeline", as_spread, {"normalize": True}),
    ],
    ids=["Z-Image", "Lumina2", "Bria"],
)
def test_guidance_of_whole_pictures_weighs_lifted_branches(
    name: str, guided: Callable[[Tensor, Tensor], Tensor], call: dict[str, Any]
) -> None:
    subject = SUBJECTS[name]
    pipe = subject.make()
    expected = by_hand(subject, pipe, SHORT, noise_of(subject), guided, mixes=True)
    plain = generate(subject, pipe, **call)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(subject, pipe, **call), plain)
    with jitaccel.apply(pipe, SHORT):
        got = generate(subject, pipe, **call)
    assert relative_error(got, expected) < 1e-5
    # Zeros at inactive tokens would have changed the norms.
    unlifted = by_hand(subject, pipe, SHORT, noise_of(subject), guided, mixes=True, lifts=False)
    assert relative_error(got, unlifted) > 2e-5


def test_bare_transformer_in_an_euler_loop_is_the_methods(subject: Subject) -> None:
    pipe, levels = subject.make(), jitaccel.noise_levels(SHORT)
    latents, model = noise_of(subject), model_of(pipe.transformer)
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


@pytest.mark.parametrize("name", ["BriaPipeline", "BriaFiboPipeline"])
@torch.no_grad()
def test_bria_is_shown_a_smaller_picture_with_its_own_ids(name: str) -> None:
    subject = SUBJECTS[name]
    pipe = subject.make()
    model = model_of(pipe.transformer)
    assert model is not None

    def velocity(tokens: Tensor, grid: tuple[int, ...], level: float) -> Tensor:
        branches = []
        for seed in (20, 40):
            call = {**subject.text(subject.prompts(seed, 1)), "img_ids": raster_ids(grid)}
            if "attention_mask" in call:
                call["attention_mask"] = call["attention_mask"][..., : call["txt_ids"].shape[0] + tokens.shape[1]]
            call |= {"hidden_states": tokens, "timestep": torch.tensor([1000.0 * level])}
            branches.append(pipe.transformer(**model.words.write(call), return_dict=False)[0])
        return subject.guided(*branches)

    levels, start, patch = jitaccel.noise_levels(POOLED), noise_of(subject), subject.patch[0]
    expected = denoise_pooled(
        velocity, lambda state, level: velocity(state, GRID, level), POOLED, start, levels, GRID, patch
    )
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(generate(subject, pipe), expected) < 1e-5


def test_levels_of_bria_are_its_own_where_that_is_asked() -> None:
    subject, config = SUBJECTS["BriaPipeline"], PRESETS["few-steps"].replace(schedule="native")
    pipe, scheduler = subject.make(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=get_original_sigmas(num_inference_steps=config.steps))
    with jitaccel.apply(pipe, config) as handle:
        generate(subject, pipe, num_inference_steps=5)
    assert [step.noise_level for step in handle.stats().steps] == scheduler.sigmas[:-1].tolist()


def test_residuals_of_bria_are_refused() -> None:
    subject = SUBJECTS["BriaPipeline"]
    model = subject.make().transformer
    call = {**subject.text(subject.prompts(20, 1)), "hidden_states": noise_of(subject), "timestep": torch.ones(1)}
    with torch.no_grad(), jitaccel.apply(model, SHORT), pytest.raises(UnsupportedModelError, match="ControlNet resid"):
        model(**call, controlnet_block_samples=[torch.zeros(1, 140, 16)])


def test_half_precision_runs(subject: Subject) -> None:
    pipe = subject.make()
    pipe.transformer.to(torch.bfloat16)

    def half(value: Any) -> Any:
        if isinstance(value, list):
            return [half(each) for each in value]
        return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run() -> Tensor:
        prompts = {
            f"{sign}{name}": half(value)
            for sign, seed in (("", 20), ("negative_", 40))
            for name, value in subject.prompts(seed, 2).items()
        }
        return generate(subject, pipe, batch=2, **prompts)

    plain = run()
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(run(), plain)
    with jitaccel.apply(pipe, SHORT):
        got = run()
    assert got.dtype == plain.dtype and got.isfinite().all()


@pytest.mark.parametrize("config", [DENSE, SHORT], ids=["dense", "short"])
def test_hidream_runs_with_its_multistep_scheduler(config: JiTConfig) -> None:
    subject = SUBJECTS["HiDreamImagePipeline"]
    pipe = subject.make()
    pipe.scheduler = video.unipc()
    expected = generate(subject, pipe) if config is DENSE else by_hand(subject, pipe, config, noise_of(subject))
    with jitaccel.apply(pipe, config):
        assert relative_error(generate(subject, pipe), expected) <= (0.0 if config is DENSE else 1e-5)


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
    with jitaccel.apply(pipe, SHORT), pytest.raises(UnsupportedModelError, match="an unknown guider"):
        generate(subject, pipe)


def test_levels_of_mochi_are_its_own() -> None:
    subject, config = SUBJECTS["MochiPipeline"], PRESETS["few-steps"]
    pipe = subject.make()
    assert jitaccel.apply(pipe, "few-steps").config == config.replace(schedule="native")
    levels = (*linear_quadratic_schedule(config.steps, 0.025), 0.0)
    expected = by_hand(subject, pipe, config, noise_of(subject), levels=levels)
    for steps in (5, config.steps):  # the pipeline's own number does not matter
        assert relative_error(generate(subject, pipe, num_inference_steps=steps), expected) < 1e-5
    handle = jitaccel.apply(pipe, DENSE)
    generate(subject, pipe, num_inference_steps=4)
    own = (*linear_quadratic_schedule(4, 0.025), 0.0)
    assert [step.noise_level for step in handle.stats().steps] == pytest.approx(own[:-1], abs=1e-6)
    handle.remove()


def test_custom_levels_are_refused_next_to_others() -> None:
    own = linear_quadratic_schedule(4, 0.025)
    spacings = (lambda steps: linear_quadratic_schedule(steps, 0.025), evenly_spaced)
    for sigmas in (own, evenly_spaced(4)):
        refuse_custom_levels({"sigmas": sigmas}, 4, spacings)
    assert with_steps({"sigmas": own}, 6, spacings)["sigmas"].tolist() == linear_quadratic_schedule(6, 0.025)
    assert with_steps({"sigmas": evenly_spaced(4)}, 2, spacings)["sigmas"].tolist() == [1.0, 0.5]
    with pytest.raises(jitaccel.ConfigError, match="levels must come from one place"):
        refuse_custom_levels({"sigmas": [1.0, 0.9, 0.8, 0.3]}, 4, spacings)


def test_clock_of_a_scheduler_has_to_be_the_models() -> None:
    mochi, other = SUBJECTS["MochiPipeline"].make(), SUBJECTS["AuraFlowPipeline"].make()
    other.scheduler = mochi.scheduler
    with pytest.raises(UnsupportedModelError, match="invert_sigmas=False, got True"):
        jitaccel.apply(other, SHORT)
    mochi.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedModelError, match="invert_sigmas=True, got False"):
        jitaccel.apply(mochi, SHORT)
