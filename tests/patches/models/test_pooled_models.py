"""Pooled stages of cut models, against the model's own forward on a smaller picture or video made by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jitaccel
from jitaccel.execution.options import Execution
from jitaccel.method.run import Run
from jitaccel.method.steps import Step
from jitaccel.patches.layout import patchify, unpatchify
from jitaccel.patches.models import MODELS
from jitaccel.patches.models.calls import CutCalls
from tests.support import hunyuan, qwen, sd3, video
from tests.support.every_model import CASES
from tests.support.pooled import POOLED, denoise_pooled
from tests.support.tiny import relative_error
from tests.support.video import prompts

LEVELS = jitaccel.noise_levels(POOLED)
SCALE = 4.0


def halved(latents: Tensor) -> Tensor:
    """Returns (B, C, T, H, W) of half the height and width, frame by frame."""
    return F.avg_pool3d(latents, (1, 2, 2))


def doubled(latents: Tensor) -> Tensor:
    frames = latents.transpose(1, 2).flatten(0, 1)
    large = F.interpolate(frames, scale_factor=2, mode="bilinear")
    return large.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)


def end_of(model: Callable[[Tensor, float, bool], Tensor], latents: Tensor) -> Tensor:
    """Returns the end of POOLED by hand. model: (latents, noise level, whether they are small) -> velocity."""
    for i, (level, after) in enumerate(pairwise(LEVELS)):
        if POOLED.stage_of_step(i, 5) == 0:
            small, small_level = halved(latents) / (1 - level / 2), (level / 2) / (1 - level / 2)
            clean = small - small_level * model(small, small_level, True)
            velocity = (latents - doubled(clean)) / level
        else:
            velocity = model(latents, level, False)
        latents = latents + (after - level) * velocity
    return latents


def guided(pipe: Any, shown: Tensor, timestep: Tensor) -> Tensor:
    """Returns the guided output of Wan's transformer."""
    positive, negative = (
        pipe.transformer(hidden_states=shown, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        for text in prompts().values()
    )
    return negative + SCALE * (positive - negative)


# Models whose latents are already tokens are tested separately: below, in test_ltx.py, test_picture_pipelines.py.
# Those of HiDream that are not square are in test_hidream.py.
ELSEWHERE = ("QwenImage", "LTX", "Bria", "HiDreamImageTransformer2DModel, not square")
PATCHED = [name for name in CASES if not name.startswith(ELSEWHERE)]


@pytest.mark.parametrize("name", PATCHED)
@torch.no_grad()
def test_every_model_is_shown_the_smaller_picture(name: str) -> None:
    """One call: all that has the size of the picture is averaged, by hand; of the state the level is taken out."""
    case, level = CASES[name], 0.7
    module = case.make().eval()
    model = next(model for model in MODELS if model.name == name.partition(",")[0])
    calls, call = CutCalls(model, [module], Execution()), case.call(case.grid, 2)
    given = calls.given(module, call)
    step = Step(index=0, stage=0, noise_level=level, next_level=0.6, may_end_stage=False)
    run = Run(POOLED, case.grid, step, given.tokens, patch=given.layout.side)
    answer = calls.call(module, module.forward, given).evaluate(run, given.tokens)
    small_grid, channels = (*case.grid[:-2], case.grid[-2] // 2, case.grid[-1] // 2), given.latents.shape[1]
    small = case.call(small_grid, 2)
    for key, value in call.items():
        if isinstance(value, Tensor) and value.ndim >= 4 and not key.startswith("encoder"):
            small[key] = F.avg_pool2d(value.flatten(0, -4), 2).unflatten(0, value.shape[:-3])
    is_given = torch.zeros(2, 1, *small["hidden_states"].shape[2:], dtype=torch.bool)
    if call["timestep"].ndim > 1 or case.num_given:
        is_given[:, :, 0] = True
    state = small["hidden_states"][:, :channels]
    shown = torch.where(is_given, state, state / (1 - level / 2))
    small["hidden_states"] = torch.cat([shown, small["hidden_states"][:, channels:]], dim=1)
    small_level = (level / 2) / (1 - level / 2)
    shown_level = torch.where(small["timestep"] == 0, 0.0, small_level * model.per_level)
    small["timestep"] = model.per_level - shown_level if model.is_inverted else shown_level
    output = module(**model.words.write(small), return_dict=False)[0]
    expected = given.layout.to_tokens(model.words.tensor(output))
    assert relative_error(answer.values, model.sign * expected[:, : run.num_active]) < 1e-5


@pytest.mark.parametrize("scheduler", video.SCHEDULERS)
@torch.no_grad()
def test_video_is_the_smaller_one_made_by_hand(scheduler: str) -> None:
    pipe = video.wan_pipeline(video.SCHEDULERS[scheduler]())
    start = torch.randn(1, 4, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    expected = end_of(lambda x, level, _: guided(pipe, x, torch.tensor([1000 * level])), start)
    with jitaccel.apply(pipe, POOLED) as handle:
        assert relative_error(video.generate(pipe), expected) < 1e-5
        assert [step.tokens for step in handle.stats().steps] == [36, 36, 144, 144, 144]


@torch.no_grad()
def test_further_channels_are_averaged_with_the_video() -> None:
    pipe = video.image_pipeline(expand_timesteps=False)
    given = video.first_input(pipe)
    start, condition = given[:, :16], given[:, 16:]

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        beside = halved(condition) if is_small else condition
        return guided(pipe, torch.cat([x, beside], dim=1), torch.tensor([1000 * level]))

    expected = end_of(model, start)
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(video.generate(pipe, image=video.image()), expected) < 1e-5


@torch.no_grad()
def test_frame_that_is_given_holds_no_noise_and_is_averaged_as_it_is() -> None:
    pipe = video.image_pipeline(expand_timesteps=True)
    start = video.first_input(pipe)
    frame = start[:, :, :1]

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        shown = torch.cat([halved(frame) if is_small else frame, x[:, :, 1:]], dim=2)
        tokens = x.shape[3] // 2 * (x.shape[4] // 2)
        timestep = torch.tensor([0.0] * tokens + [1000 * level] * (2 * tokens))[None]
        return guided(pipe, shown, timestep)

    expected = torch.cat([frame, end_of(model, start)[:, :, 1:]], dim=2)
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(video.generate(pipe, image=video.image()), expected) < 1e-5


@torch.no_grad()
def test_compiled_pooled_stage_is_one_graph() -> None:
    pipe = video.wan_pipeline()
    with jitaccel.apply(pipe, POOLED):
        expected = video.generate(pipe)
    with jitaccel.apply(pipe, POOLED, compile={"backend": "eager", "graphs": False}) as handle:
        assert relative_error(video.generate(pipe), expected) < 1e-5
        compiled = handle.stats().compiled
    assert compiled is not None and (compiled.signatures, compiled.graphs) == (2, 2)


@torch.no_grad()
def test_control_video_is_averaged_as_it_is() -> None:
    pipe = video.vace_pipeline()
    control, start = video.first_input(pipe, "control_hidden_states"), video.first_input(pipe)

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        given = {"timestep": torch.tensor([1000 * level]), "return_dict": False}
        given["control_hidden_states"] = halved(control) if is_small else control
        positive, negative = (
            pipe.transformer(hidden_states=x, encoder_hidden_states=text, **given)[0] for text in prompts().values()
        )
        return negative + SCALE * (positive - negative)

    expected = end_of(model, start)
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(video.generate(pipe), expected) < 1e-5


@torch.no_grad()
def test_branches_in_one_batch_are_shown_the_same_smaller_picture() -> None:
    pipe = sd3.pipeline()
    start = torch.randn(1, 4, 20, 28, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        positive, negative = (
            pipe.transformer(
                hidden_states=x[:, :, 0],
                timestep=torch.tensor([1000 * level]),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            for text, pooled in sd3.prompts()
        )
        return (negative + 3.0 * (positive - negative))[:, :, None]

    expected = end_of(model, start[:, :, None])[:, :, 0]
    with jitaccel.apply(pipe, POOLED) as handle:
        assert relative_error(sd3.generate(pipe), expected) < 1e-5
        assert [step.calls for step in handle.stats().steps] == [2] * 5


@pytest.mark.parametrize("name", hunyuan.PIPELINES)
@torch.no_grad()
def test_hunyuan_is_shown_a_smaller_video(name: str) -> None:
    pipe = hunyuan.pipeline(name)
    size = (3, 12, 16) if name == "HunyuanVideoPipeline" else video.GRID
    start = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        positive, negative = (
            pipe.transformer(**hunyuan.arguments(name, x, level, text), return_dict=False)[0]
            for text in hunyuan.prompts(name)
        )
        return negative + 3.0 * (positive - negative)

    expected = end_of(model, start)
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(hunyuan.generate(pipe), expected) < 1e-5


@pytest.mark.parametrize("name", hunyuan.FROM_IMAGES)
@torch.no_grad()
def test_hunyuan_is_shown_a_smaller_image(name: str) -> None:
    pipe = hunyuan.pipeline(name)
    given = hunyuan.first_input(pipe)
    is_replaced = name == "HunyuanVideoImageToVideoPipeline"
    pixels = given[:, :4, :1] if is_replaced else given[:, 4:]  # the first frame, or further channels

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        beside = halved(pixels) if is_small else pixels
        shown = torch.cat([beside, x[:, :, 1:]], dim=2) if is_replaced else torch.cat([x, beside], dim=1)
        image = {"image_embeds": hunyuan.image_embeds()} if "15" in name else {}
        positive, negative = (
            pipe.transformer(
                **{**hunyuan.arguments(name, x, level, text), "hidden_states": shown, **image}, return_dict=False
            )[0]
            for text in hunyuan.prompts(name)
        )
        return negative + 3.0 * (positive - negative)

    expected = end_of(model, given[:, :4])
    with jitaccel.apply(pipe, POOLED):
        made = hunyuan.generate(pipe)
    moved = slice(-2, None) if "15" not in name else slice(None)  # of the first frame nothing is made, or kept
    assert relative_error(made[:, :, moved], expected[:, :, moved]) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_qwen_is_shown_a_smaller_picture_with_its_own_shape(scale: float) -> None:
    pipe = qwen.qwen_pipeline()

    def velocity(tokens: Tensor, grid: tuple[int, int], level: float) -> Tensor:
        branches = [
            pipe.transformer(
                hidden_states=tokens,
                img_shapes=[[(1, *grid)]],
                timestep=torch.tensor([level]),
                encoder_hidden_states=text,
                encoder_hidden_states_mask=torch.ones(1, text.shape[1], dtype=torch.bool),
                return_dict=False,
            )[0]
            for text in qwen.prompts()[: 1 if scale == 1.0 else 2]
        ]
        if scale == 1.0:
            return branches[0]
        mixed = branches[1] + scale * (branches[0] - branches[1])
        return mixed * branches[0].norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)

    grid, start = qwen.GRID, qwen.first_input(pipe)
    expected = denoise_pooled(velocity, lambda s, level: velocity(s, grid, level), POOLED, start, LEVELS, grid)
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(qwen.generate(pipe, true_cfg_scale=scale), expected) < 1e-5


@torch.no_grad()
def test_qwen_is_shown_smaller_layers_with_the_whole_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen.small_references(monkeypatch, qwen.LAYERED)
    pipe, patch, layers = qwen.qwen_pipeline(qwen.LAYERED), (1, 2, 2), qwen.LAYERS + 1
    start, references = qwen.first_input(pipe).split([layers * 140, 140], dim=1)

    def model(x: Tensor, level: float, is_small: bool) -> Tensor:
        tokens, shape = patchify(x, patch), (1, x.shape[3] // 2, x.shape[4] // 2)
        positive, negative = (
            pipe.transformer(
                hidden_states=torch.cat([tokens, references], dim=1),
                img_shapes=[[*[shape] * layers, (1, *qwen.GRID)]],
                timestep=torch.tensor([level]),
                encoder_hidden_states=text,
                additional_t_cond=torch.tensor([0]),
                return_dict=False,
            )[0][:, : tokens.shape[1]]
            for text in qwen.prompts()
        )
        return unpatchify(negative + 3.0 * (positive - negative), (layers, *shape[1:]), patch)

    expected = end_of(model, unpatchify(start, (layers, *qwen.GRID), patch))
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(qwen.generate(pipe), patchify(expected, patch)) < 1e-5
