"""Every pipeline of a cut model, tiny and random, with one way to call all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.support import hunyuan, ltx, ltx2, picture_pipelines, qwen, sd3, video


@dataclass(frozen=True)
class Generation:
    """One pipeline.

    Attributes:
        make: Makes the pipeline.
        generate: Returns its final latents, from the pipeline, seed, batch and further arguments.
        alone: Returns the prompts of one image from a batch of two, as arguments of `generate`.
        unguided: Arguments of a call without guidance.
    """

    make: Callable[[], Any]
    generate: Callable[..., Tensor]
    alone: Callable[[int], dict[str, Any]]
    unguided: dict[str, Any]


def _row(prompts: dict[str, Any], image: int) -> dict[str, Any]:
    return {name: each[image : image + 1] for name, each in prompts.items()}


def _pairs(image: int, pairs: Any, *names: str) -> dict[str, Any]:
    """Returns the prompts of one image from (positive, negative), each with one part for each of `names`."""
    positive, negative = ([part] if isinstance(part, Tensor) else list(part) for part in pairs)
    given = {name: each[image : image + 1] for name, each in zip(names, positive, strict=True)}
    return given | {f"negative_{name}": each[image : image + 1] for name, each in zip(names, negative, strict=True)}


def _qwen(name: str) -> Generation:
    return Generation(
        make=functools.partial(qwen.qwen_pipeline, name),
        generate=qwen.generate,
        alone=lambda image: _pairs(image, qwen.prompts(2), "prompt_embeds"),
        unguided={"true_cfg_scale": 1.0},
    )


def _sd3(name: str) -> Generation:
    return Generation(
        make=functools.partial(sd3.pipeline, name),
        generate=sd3.generate,
        alone=lambda image: _pairs(image, sd3.prompts(2), "prompt_embeds", "pooled_prompt_embeds"),
        unguided={"guidance_scale": 1.0},
    )


def _hunyuan(name: str) -> Generation:
    def alone(image: int) -> dict[str, Any]:
        positive, negative = (_row(part, image) for part in hunyuan.prompts(name, 2))
        return {**positive, **{f"negative_{key}": value for key, value in negative.items()}}

    return Generation(
        make=functools.partial(hunyuan.pipeline, name),
        generate=hunyuan.generate,
        alone=alone,
        unguided={"true_cfg_scale": 1.0},
    )


def _picture(name: str) -> Generation:
    subject = picture_pipelines.SUBJECTS[name]

    def alone(image: int) -> dict[str, Any]:
        positive, negative = (picture_pipelines.row(subject.prompts(seed, 2), image) for seed in (20, 40))
        return {**positive, **{f"negative_{key}": value for key, value in negative.items()}}

    return Generation(
        make=subject.make,
        generate=functools.partial(picture_pipelines.generate, subject),
        alone=alone,
        unguided=subject.guidance[1],
    )


GENERATIONS: dict[str, Generation] = {
    "WanPipeline": Generation(
        make=video.wan_pipeline,
        generate=video.generate,
        alone=lambda image: _row(video.prompts(2), image),
        unguided={"guidance_scale": 1.0},
    ),
    "LTXPipeline": Generation(
        make=ltx.pipeline,
        generate=ltx.generate,
        alone=lambda image: _pairs(image, ltx.prompts(2), "prompt_embeds"),
        unguided={"guidance_scale": 1.0},
    ),
    "LTX2Pipeline": Generation(
        make=ltx2.pipeline,
        generate=ltx2.generate,
        alone=lambda image: _pairs(image, ltx2.prompts(2), "prompt_embeds"),
        unguided=dict(ltx2.UNGUIDED),
    ),
    **{name: _qwen(name) for name in ("QwenImagePipeline", "QwenImageImg2ImgPipeline")},
    **{name: _qwen(name) for name in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline", qwen.LAYERED)},
    **{name: _sd3(name) for name in sd3.PIPELINES},
    **{name: _hunyuan(name) for name in (*hunyuan.PIPELINES, *hunyuan.FROM_IMAGES)},
    **{name: _picture(name) for name in picture_pipelines.SUBJECTS},
}
