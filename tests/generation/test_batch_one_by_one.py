"""`generate_batch` if requests cannot share forwards: each gets the same bits as from the patched pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, ConfigError, JiTConfig, Request, UnsupportedModelError, generate_batch
from tests.support import ltx2, qwen, tiny, video
from tests.support.every_model import wan_transformer
from tests.support.tiny import SHORT, TEXT_TOKENS

SIDE = 12 * tiny.PIXELS_PER_TOKEN
VIDEO = {"height": 96, "width": 128}
PICTURE = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")


def asked(**fields: Any) -> Request:
    size = {"height": SIDE, "width": SIDE, "max_sequence_length": TEXT_TOKENS}
    return Request(**{"prompt": "a red circle", "preset": SHORT, **size, **fields})


def image_to_image() -> Any:
    return FluxImg2ImgPipeline(**tiny.pipeline().components)


def by_hand(pipe: Any, config: JiTConfig, seed: int, call: dict[str, Any]) -> Tensor:
    with jitaccel.apply(pipe, config):
        generator = torch.Generator().manual_seed(seed)
        made: Tensor = pipe(**call, generator=generator, output_type="latent", return_dict=False)[0]
    return made[0]


def test_image_to_image_takes_its_picture_and_strength_as_options() -> None:
    pipe = image_to_image()
    options = [{"image": PICTURE, "strength": strength} for strength in (1.0, 0.8)]
    requests = [asked(seed=seed, options=each) for seed, each in enumerate(options)]
    outcomes = generate_batch(pipe, requests, output_type="latent")
    for seed, (each, outcome) in enumerate(zip(options, outcomes, strict=True)):
        call = {"prompt": "a red circle", "height": SIDE, "width": SIDE, "max_sequence_length": TEXT_TOKENS, **each}
        assert torch.equal(outcome.image, by_hand(pipe, SHORT, seed, {**call, "num_inference_steps": SHORT.steps}))
        assert outcome.token_steps > 0
    assert jitaccel.handle_of(pipe) is None


def test_requests_of_flux_with_options_run_beside_those_that_share_forwards() -> None:
    pipe = tiny.pipeline()
    steps: list[tuple[int, int, int]] = []
    requests = [asked(options={"prompt_2": "blue"}, seed=1), asked(seed=2)]
    mixed = generate_batch(pipe, requests, output_type="latent", on_step=lambda *step: steps.append(step))
    alone = [generate_batch(pipe, [each], output_type="latent")[0].image for each in requests]
    assert all(torch.equal(outcome.image, image) for outcome, image in zip(mixed, alone, strict=True))
    other = generate_batch(pipe, [asked(seed=1)], output_type="latent")[0].image
    assert not torch.equal(mixed[0].image, other)
    assert sorted(steps) == [(index, step + 1, SHORT.steps) for index in (0, 1) for step in range(SHORT.steps)]


def test_other_models_run_with_presets_and_guidance_of_their_own() -> None:
    pipe = qwen.qwen_pipeline()
    positive, negative = qwen.prompts()
    options = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    size = {"height": qwen.GRID[0] * qwen.PIXELS, "width": qwen.GRID[1] * qwen.PIXELS}
    settings: dict[str, Any] = {"prompt": None, **size, "seed": 3, "preset": SHORT, "options": options}
    requests = [Request(**settings, true_cfg_scale=scale) for scale in (1.0, 3.0)]
    outcomes = generate_batch(pipe, requests, output_type="latent")
    for outcome, scale in zip(outcomes, (1.0, 3.0), strict=True):
        call = {**options, **size, "true_cfg_scale": scale, "num_inference_steps": SHORT.steps}
        assert torch.equal(outcome.image, by_hand(pipe, SHORT, 3, call))


def test_video_is_a_list_of_frames_on_the_levels_of_its_sampler() -> None:
    pipe = video.text_pipeline(wan_transformer(in_channels=16, out_channels=16))
    request = Request(prompt="green mountains", **VIDEO, seed=1, preset="few-steps", steps=4, options={"num_frames": 5})
    told: list[int] = []
    frames = generate_batch(pipe, [request], on_outcome=lambda index, _: told.append(index))[0].image
    assert len(frames) == 5 and all(isinstance(frame, Image.Image) for frame in frames) and told == [0]
    latents = generate_batch(pipe, [request], output_type="latent")[0].image
    call = {"prompt": "green mountains", **VIDEO, "num_frames": 5, "num_inference_steps": 4}
    config = PRESETS["few-steps"].replace(steps=4, schedule="native")
    assert torch.equal(latents, by_hand(pipe, config, 1, call))


def test_request_that_fails_or_is_dropped_ends_alone_and_leaves_the_pipeline_unpatched() -> None:
    pipe = image_to_image()
    good = {"image": PICTURE, "strength": 1.0}
    requests = [asked(options={**good, "strength": 7.0}), asked(options=good), asked(options=good)]

    def drop(index: int, step: int, steps: int) -> None:
        if index == 1 and step == 2:
            raise LookupError("nobody awaits it")

    outcomes = generate_batch(pipe, requests, output_type="latent", on_step=drop)
    assert isinstance(outcomes[0].error, ValueError) and isinstance(outcomes[1].error, LookupError)
    assert outcomes[2].error is None and jitaccel.handle_of(pipe) is None


def test_what_a_call_does_not_take_is_named_before_any_is_run() -> None:
    pipe = image_to_image()
    requests = [
        asked(options={"image": PICTURE, "strenght": 0.5}),
        asked(options={"image": PICTURE, "generator": torch.Generator()}),
        asked(options={"image": PICTURE, "height": 64}),
    ]
    with tiny.counted(pipe.transformer) as seen, pytest.raises(ConfigError) as raised:
        generate_batch(pipe, requests)
    first, second, third = str(raised.value).splitlines()
    assert "requests[0]: options must be arguments of FluxImg2ImgPipeline, got 'strenght'" in first
    assert 'did you mean "strength"?' in first
    assert "requests[1]: options must not have 'generator'; use seed=" in second
    assert "requests[2]: options must not have 'height'; use height=" in third
    with pytest.raises(ConfigError, match=r"options must be arguments of FluxPipeline, got 'num_frames'"):
        generate_batch(tiny.pipeline(), [asked(options={"num_frames": 5})])
    with pytest.raises(ConfigError, match=r"true_cfg_scale must be left out for WanPipeline, whose calls have none"):
        generate_batch(video.wan_pipeline(), [Request(prompt="a", true_cfg_scale=2.0)])
    assert seen == []


BAD: list[dict[str, Any]] = [
    {"options": [1]}, {"options": {1: 2}}, {"options": None}, {"prompt": None}, {"prompt": None, "options": {}}
]


@pytest.mark.parametrize("fields", BAD)
def test_options_are_a_dict_and_stand_in_for_a_prompt_only_with_embeddings(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"requests\[0\]: (options must be a dict|prompt must be one text)"):
        generate_batch(tiny.pipeline(), [asked(**fields)])


def test_patched_pipelines_and_those_that_cannot_be_accelerated_are_refused() -> None:
    pipe = image_to_image()
    with jitaccel.apply(pipe, SHORT), pytest.raises(ConfigError, match="must not be patched"):
        generate_batch(pipe, [asked(options={"image": PICTURE})])
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(UnsupportedModelError):
        generate_batch(pipe, [asked(options={"image": PICTURE})])


@pytest.mark.parametrize("field", ["height", "width", "guidance_scale", "true_cfg_scale", "max_sequence_length"])
def test_what_is_none_is_the_default_of_the_pipeline(field: str) -> None:
    pipe = tiny.pipeline()
    defaults = {
        "height": pipe.default_sample_size * pipe.vae_scale_factor,
        "width": pipe.default_sample_size * pipe.vae_scale_factor,
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
        "max_sequence_length": 512,
    }
    left, given = (asked(steps=3, **{field: value}) for value in (None, defaults[field]))
    first, second = (outcome.image for outcome in generate_batch(pipe, [left, given], output_type="latent"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_sound_of_a_video_is_kept(output_type: Any) -> None:
    pipe = ltx2.sounding_pipeline()
    options = {**ltx2.UNGUIDED, "num_frames": 9}
    scale = options.pop("guidance_scale")
    settings: dict[str, Any] = {"prompt": "waves", "height": 64, "width": 96, "guidance_scale": scale}
    request = Request(**settings, seed=1, preset="dense", steps=2, options=options)
    (outcome,) = generate_batch(pipe, [request], output_type=output_type)
    call = {**settings, "num_inference_steps": 2, "output_type": output_type}
    with jitaccel.apply(pipe, "dense", steps=2):
        made = pipe(**call, **options, generator=torch.Generator().manual_seed(1))
    assert outcome.sound is not None
    assert torch.equal(outcome.sound.samples, made.audio[0]) and outcome.sound.rate == ltx2.RATE
    assert len(outcome.image) == len(made.frames[0])


def test_picture_has_no_sound_and_a_failed_request_raises_its_error() -> None:
    assert generate_batch(tiny.pipeline(), [asked()], output_type="latent")[0].sound is None
    with pytest.raises(RuntimeError, match="broken"):
        jitaccel.Outcome(asked(), RuntimeError("broken")).sound  # noqa: B018
