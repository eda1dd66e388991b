"""Every diffusers pipeline of FLUX.1, FLUX.2 and Chroma, tiny and random, with one call of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.models import chroma_transformer, flux2_transformer, noise, randomised
from tests.support.tiny import CHANNELS, GRID, NUM_TOKENS, TEXT_TOKENS, WIDTH


def parts_of(name: str, transformer: Any) -> dict[str, Any]:
    import inspect

    kind = getattr(diffusers, name)
    given = {**tiny.pipeline().components, "transformer": transformer, "scheduler": tiny.scheduler()}
    if "ControlNet" in name:
        given["controlnet"] = randomised(
            diffusers.FluxControlNetModel(
                in_channels=CHANNELS,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        )
    return {part: given.get(part) for part in inspect.signature(kind).parameters if part in given}


def flux_pipeline(name: str) -> Any:
    channels = {"Fill": 3, "FluxControl": 2}
    factor = next((n for word, n in channels.items() if word in name and "ControlNet" not in name), 1)
    model = tiny.transformer(in_channels=factor * CHANNELS, out_channels=CHANNELS)
    pipe = getattr(diffusers, name)(**parts_of(name, model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int) -> Tensor:
    return noise(seed, 1, 3, *(4 * side for side in GRID)).clamp(-1, 1) / 2 + 0.5


def mask_picture() -> Tensor:
    mask = torch.zeros(1, 1, *(4 * side for side in GRID))
    mask[..., 12:32, 8:24] = 1.0
    return mask


def call_of(name: str) -> dict[str, Any]:
    call: dict[str, Any] = {
        "prompt": "a red circle", "height": 4 * GRID[0], "width": 4 * GRID[1], "max_sequence_length": TEXT_TOKENS,
        "output_type": "latent", "num_inference_steps": 8, "return_dict": False,
    }  # fmt: skip
    takes = {"image": picture(1), "control_image": picture(2), "mask_image": mask_picture()}
    import inspect

    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    call |= {argument: value for argument, value in takes.items() if argument in parameters}
    if "strength" in parameters and "Fill" not in name:
        call["strength"] = 0.7
    if "_auto_resize" in parameters:
        call |= {"_auto_resize": False, "max_area": 16 * NUM_TOKENS}  # otherwise a picture of a million pixels
    return {argument: value for argument, value in call.items() if argument in parameters}


def run_pipeline(pipe: Any, **changed: Any) -> Tensor:
    call = {**call_of(type(pipe).__name__), **changed}
    latents: Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return latents


def flux2_pipeline(name: str) -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, latent_channels=CHANNELS // 4,
    )  # fmt: skip
    # Only set if it differs from the default, because diffusers 0.36 has neither this setting nor klein.
    model = flux2_transformer(**({} if name == "Flux2Pipeline" else {"guidance_embeds": False}))
    pipe = getattr(diffusers, name)(
        scheduler=tiny.scheduler(), vae=vae.eval(), text_encoder=None, tokenizer=None, transformer=model
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chroma_pipeline(name: str) -> Any:
    parts = {part: given for part, given in tiny.pipeline().components.items() if part in ("vae", "scheduler")}
    pipe = getattr(diffusers, name)(**parts, text_encoder=None, tokenizer=None, transformer=chroma_transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe
