"""Tiny random pipelines of cut models, one way to call each, and the method by hand with its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

import jitaccel
from jitaccel.method.config import JiTConfig
from jitaccel.method.lift import lift, make_lift_plan
from jitaccel.patches.cutting import Cut, places_of
from jitaccel.patches.layout import patchify
from jitaccel.patches.models import model_of
from tests.support import reference, sd3
from tests.support.every_model import (
    auraflow_transformer,
    hunyuan_image_transformer,
    row_of,
    z_image_transformer,
)
from tests.support.models import TEXT, VIDEO, noise
from tests.support.more_models import (
    bria_transformer,
    fibo_call,
    fibo_transformer,
    hidream_transformer,
    lumina2_transformer,
    mochi_transformer,
    raster_ids,
)

SCALE = 3.0
GRID = (10, 14)
_SQUARE = (10, 10)


@dataclass(frozen=True)
class Subject:
    """One pipeline.

    Attributes:
        make: Makes the pipeline.
        pixels: Pixels along a token's side.
        prompts: Returns the pipeline's prompt arguments from (seed, batch); negative prompts have the prefix
            `negative_`.
        text: Returns the arguments of a single prompt for the model.
        guided: Combines two branches like the pipeline.
        guidance: Arguments of a guided call, and of an unguided one.
        over: Whether the pipeline adds guidance to the positive branch.
        grid, patch: The token grid, and the patch of a token.
        is_packed: Whether the pipeline's latents are tokens.
    """

    make: Callable[[], Any]
    pixels: int
    prompts: Callable[[int, int], dict[str, Any]]
    text: Callable[[dict[str, Any]], dict[str, Any]]
    guidance: tuple[dict[str, Any], dict[str, Any]]
    over: bool = False
    grid: tuple[int, ...] = GRID
    patch: tuple[int, ...] = (2, 2)
    is_packed: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the latents."""
        return tuple(side * step for side, step in zip(self.grid, self.patch, strict=True))

    def guided(self, positive: Tensor, negative: Tensor) -> Tensor:
        return (positive if self.over else negative) + SCALE * (positive - negative)


def _silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _auraflow() -> Any:
    return _silent(
        diffusers.AuraFlowPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=auraflow_transformer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def _z_image() -> Any:
    return _silent(
        diffusers.ZImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=z_image_transformer(),
        )
    )


def _lumina2() -> Any:
    return _silent(
        diffusers.Lumina2Pipeline(
            transformer=lumina2_transformer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def _lumina2_prompts(seed: int, batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[:, -2:] = seed == 20  # shorter: negative prompts, and the first prompt of a batch
    mask[0, -1] = 0
    return {"prompt_embeds": noise(seed, batch, TEXT, 16), "prompt_attention_mask": mask}


def _mochi() -> Any:
    return _silent(
        diffusers.MochiPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=mochi_transformer(),
        )
    )


def _mochi_prompts(seed: int, batch: int) -> dict[str, Any]:
    prompts = _lumina2_prompts(seed, batch)
    return {**prompts, "prompt_attention_mask": prompts["prompt_attention_mask"].bool()}


def _bria() -> Any:
    return _silent(
        diffusers.BriaPipeline(
            transformer=bria_transformer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=sd3.pipeline().vae,
            text_encoder=None,
            tokenizer=None,
        )
    )


def _fibo() -> Any:
    pipe = diffusers.BriaFiboPipeline(
        transformer=fibo_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )

    def encoded(texts: list[str]) -> tuple[Tensor, Tensor, list[Tensor]]:
        parts = [_fibo_text(text) for text in texts]
        embeddings, masks = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        layers = [torch.cat(each).to(pipe.dtype) for each in zip(*(part[2] for part in parts), strict=True)]
        return embeddings.to(pipe.dtype), masks, layers

    def encode(prompt: list[str], negative_prompt: list[str], guidance_scale: float, **_: Any) -> tuple[Any, ...]:
        (positive, mask, layers), negative = encoded(prompt), encoded(negative_prompt)
        ids = torch.zeros(len(prompt), TEXT, 3)
        others = negative if guidance_scale > 1 else (None, None, None)
        return positive, others[0], ids, mask, others[1], layers, others[2]

    pipe.encode_prompt = encode  # replaces the language model
    return _silent(pipe)


def _fibo_text(prompt: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns embeddings (1, T, E), mask (1, T) and layers (1, T, F) for a prompt, which is a number here."""
    seed = int(prompt)
    mask = torch.ones(1, TEXT)
    mask[:, TEXT - seed % 3 :] = 0.0
    return noise(seed, 1, TEXT, 16), mask, [noise(seed + further, 1, TEXT, 12) for further in (1, 2)]


def _fibo_arguments(prompts: dict[str, Any]) -> dict[str, Any]:
    embeddings, mask, layers = _fibo_text(prompts["prompt"][0])
    whole = torch.cat([mask, torch.ones(1, GRID[0] * GRID[1])], dim=1).bool()[:, None, None]
    beside = {name: value for name, value in fibo_call(GRID, 1).items() if name.endswith("_ids")}
    return {**beside, "encoder_hidden_states": embeddings, "text_encoder_layers": layers, "attention_mask": whole}


def _hidream() -> Any:
    parts = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")}
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        transformer=hidream_transformer(),
        **parts,
    )
    pipe.default_sample_size = 2 * _SQUARE[0]  # pictures have this area, whatever the requested size
    return _silent(pipe)


def hunyuan_image(guider: Any = None) -> Any:
    """Returns a HunyuanImagePipeline with a guider, by default one that weights each token separately."""
    return _silent(
        diffusers.HunyuanImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=hunyuan_image_transformer(),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=SCALE) if guider is None else guider,
        )
    )


def _hunyuan_prompts(seed: int, batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(seed, batch, TEXT, 16),
        "prompt_embeds_mask": torch.ones(batch, TEXT),
        "prompt_embeds_2": noise(seed + 1, batch, 4, 8),
        "prompt_embeds_mask_2": torch.ones(batch, 4),
    }


SUBJECTS: dict[str, Subject] = {
    "AuraFlowPipeline": Subject(
        make=_auraflow,
        pixels=16,
        prompts=lambda seed, batch: {
            "prompt_embeds": noise(seed, batch, TEXT, 16),
            "prompt_attention_mask": torch.ones(batch, TEXT),
        },
        text=lambda prompts: {"encoder_hidden_states": prompts["prompt_embeds"]},
        guidance=({"guidance_scale": SCALE}, {"guidance_scale": 1.0}),
    ),
    "ZImagePipeline": Subject(
        make=_z_image,
        pixels=16,
        prompts=lambda seed, batch: {"prompt_embeds": [noise(seed + 7 * k, TEXT + k, 16) for k in range(batch)]},
        text=lambda prompts: {"cap_feats": prompts["prompt_embeds"]},
        guidance=({"guidance_scale": SCALE}, {"guidance_scale": 0.0}),
        over=True,
    ),
    "Lumina2Pipeline": Subject(
        make=_lumina2,
        pixels=16,
        prompts=_lumina2_prompts,
        text=lambda prompts: {
            "encoder_hidden_states": prompts["prompt_embeds"],
            "encoder_attention_mask": prompts["prompt_attention_mask"],
        },
        guidance=({"guidance_scale": SCALE, "cfg_normalization": False}, {"guidance_scale": 1.0}),
    ),
    "HunyuanImagePipeline": Subject(
        make=hunyuan_image,
        pixels=32,
        prompts=_hunyuan_prompts,
        text=lambda prompts: {
            "encoder_hidden_states": prompts["prompt_embeds"],
            "encoder_attention_mask": prompts["prompt_embeds_mask"],
            "encoder_hidden_states_2": prompts["prompt_embeds_2"],
            "encoder_attention_mask_2": prompts["prompt_embeds_mask_2"],
        },
        guidance=({}, {}),
        patch=(1, 1),
    ),
    "HiDreamImagePipeline": Subject(
        make=_hidream,
        pixels=16,
        prompts=lambda seed, batch: {
            "prompt_embeds_t5": noise(seed, batch, TEXT, 16),
            "prompt_embeds_llama3": noise(seed + 1, 2, batch, TEXT, 16),
            "pooled_prompt_embeds": noise(seed + 2, batch, 8),
        },
        text=lambda prompts: {
            "encoder_hidden_states_t5": prompts["prompt_embeds_t5"],
            "encoder_hidden_states_llama3": prompts["prompt_embeds_llama3"],
            "pooled_embeds": prompts["pooled_prompt_embeds"],
        },
        guidance=({"guidance_scale": SCALE}, {"guidance_scale": 1.0}),
        grid=_SQUARE,
    ),
    "BriaPipeline": Subject(
        make=_bria,
        pixels=4,
        prompts=lambda seed, batch: {"prompt_embeds": noise(seed, batch, TEXT, 16)},
        text=lambda prompts: {
            "encoder_hidden_states": prompts["prompt_embeds"],
            "img_ids": raster_ids(GRID),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        guidance=({"guidance_scale": SCALE}, {"guidance_scale": 1.0}),
        is_packed=True,
    ),
    "BriaFiboPipeline": Subject(
        make=_fibo,
        pixels=16,
        prompts=lambda seed, batch: {"prompt": [str(seed + 5 * image) for image in range(batch)]},
        text=_fibo_arguments,
        guidance=({"guidance_scale": SCALE}, {"guidance_scale": 1.0}),
        patch=(1, 1),
        is_packed=True,
    ),
    "MochiPipeline": Subject(
        make=_mochi,
        pixels=16,
        prompts=_mochi_prompts,
        text=lambda prompts: {
            "encoder_hidden_states": prompts["prompt_embeds"],
            "encoder_attention_mask": prompts["prompt_attention_mask"],
        },
        guidance=({"guidance_scale": SCALE, "num_frames": 6 * (VIDEO[0] - 1) + 1}, {"guidance_scale": 1.0}),
        grid=VIDEO,
        patch=(1, 2, 2),
    ),
}


def noise_of(subject: Subject) -> Tensor:
    """Returns a pipeline's start noise for seed 0."""
    latents = torch.randn(1, 4, *subject.sizes, generator=torch.Generator().manual_seed(0))
    return patchify(latents, subject.patch) if subject.is_packed else latents


def row(prompts: dict[str, Any], image: int) -> dict[str, Any]:
    return row_of(prompts, image)


def generate(subject: Subject, pipe: Any, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents (B, C, H, W) of one call."""
    positive, negative = (subject.prompts(start, batch) for start in (20, 40))
    settings: dict[str, Any] = {
        **positive, **{f"negative_{name}": value for name, value in negative.items()}, **subject.guidance[0],
        "height": subject.pixels * subject.grid[-2], "width": subject.pixels * subject.grid[-1],
        "num_inference_steps": 5,
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(batch)],
        "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    latents: Tensor = pipe(**{**settings, **call})[0]
    return latents


def by_hand(
    subject: Subject,
    pipe: Any,
    config: JiTConfig,
    start: Tensor,
    guided: Callable[[Tensor, Tensor], Tensor] | None = None,
    mixes: bool = False,
    lifts: bool = True,
    levels: tuple[float, ...] | None = None,
) -> Tensor:
    """Returns the method's latents for one picture or video from the noise `start`, (1, C, *sizes).

    The model is cut by `Cut`, which test_every_model.py compares with the unpatched model on cropped latents. Levels,
    guidance, lift, moves and steps are the reference's. `guided` combines (positive, negative) at the anchors. With
    `mixes`, it combines whole pictures (1, N, D), which are lifted or zero outside the anchors.
    """
    model, module = model_of(pipe.transformer), pipe.transformer
    assert model is not None
    layout, cut = model.layout(module.config), Cut(module, model.adapter)
    texts = [subject.text(subject.prompts(seed, 1)) for seed in (20, 40)]
    weigh, num_tokens = subject.guided if guided is None else guided, torch.Size(subject.grid).numel()

    def branch(tokens: Tensor, anchors: Tensor, level: float, text: dict[str, Any]) -> Tensor:
        whole = torch.zeros(1, num_tokens, tokens.shape[2]).index_copy(1, anchors, tokens)
        share = 1.0 - level if model.is_inverted else level
        arguments = {
            "hidden_states": layout.to_latents(whole, like=start),
            "timestep": torch.tensor([model.per_level * share]),
            **text,
        }
        places = places_of(anchors[None], num_tokens)
        with cut.at(places):
            output = module(**model.words.write(cut.arguments(arguments, places)), return_dict=False)[0]
        return model.sign * layout.to_tokens(model.words.tensor(output))[:, anchors]

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        branches = [branch(tokens, anchors, level, text) for text in texts]
        if not mixes:
            return weigh(*branches)
        plan = make_lift_plan(anchors[None], subject.grid, config.blur_scale)
        zero = torch.zeros(1, num_tokens, tokens.shape[2])
        wholes = [lift(values, plan) if lifts else zero.index_copy(1, anchors, values) for values in branches]
        return weigh(*wholes)[:, anchors]

    try:
        with torch.no_grad():
            levels = jitaccel.noise_levels(config) if levels is None else levels
            state = reference.denoise(velocity, config, subject.grid, layout.to_tokens(start), levels).states[-1]
    finally:
        cut.remove()
    return layout.to_latents(state, like=start)
