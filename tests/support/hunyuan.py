"""Tiny random pipelines of HunyuanVideo and HunyuanVideo-1.5, one way to call them, and their layers by hand."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.every_model import TEXT, hunyuan15_transformer, hunyuan_transformer
from tests.support.models import noise
from tests.support.video import GRID

BYT5, IMAGE = 4, 3
PIPELINES = ("HunyuanVideoPipeline", "HunyuanVideo15Pipeline")
CONCATENATED = "HunyuanVideoImageToVideoPipeline, latent_concat"
FROM_IMAGES = ("HunyuanVideoImageToVideoPipeline", CONCATENATED, "HunyuanVideo15ImageToVideoPipeline")
"""The first pipeline replaces the first frame; the others use further channels."""


def _scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)


@functools.cache
def _autoencoder(is_15: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if is_15:
            vae = diffusers.AutoencoderKLHunyuanVideo15(
                latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1, spatial_compression_ratio=16
            )
        else:
            vae = diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=4,
                block_out_channels=(8,) * 4,
                layers_per_block=1,
                norm_num_groups=4,
                mid_block_add_attention=False,
            )
    return vae.eval()


def pipeline(name: str) -> Any:
    """Returns a silent pipeline of this class, whose videos have the token grid GRID."""
    kind, is_15 = getattr(diffusers, name.partition(",")[0]), "15" in name
    parts = dict.fromkeys(inspect.signature(kind).parameters)
    parts |= {"vae": _autoencoder(is_15), "scheduler": _scheduler()}
    if is_15:
        parts |= {
            "transformer": hunyuan15_transformer(target_size=112),  # 7 x 7 tokens of 16 pixels, about as many as 6 x 8
            "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        }
    elif name == CONCATENATED:
        parts["transformer"] = hunyuan_transformer(in_channels=9, image_condition_type="latent_concat")
    else:
        replaced = {"image_condition_type": "token_replace"} if name in FROM_IMAGES else {}
        parts["transformer"] = hunyuan_transformer(**replaced)
    pipe = kind(**parts)
    pipe.vision_num_semantic_tokens = IMAGE
    if is_15 and name in FROM_IMAGES:  # replaces SigLIP
        pipe.encode_image = lambda image, batch_size, **_: image_embeds().repeat(batch_size, 1, 1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_embeds() -> Tensor:
    return noise(9, 1, IMAGE, 12)


def picture(name: str, batch: int = 1) -> Any:
    """Returns the input of an image-to-video pipeline: one image for all, or for HunyuanVideo one for each video."""
    values = noise(8, 1, 3, 16 * GRID[1], 16 * GRID[2]).clamp(-1, 1) / 2 + 0.5
    if "15" not in name:
        return values.expand(batch, -1, -1, -1)
    return PIL.Image.fromarray((values[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def prompts(name: str, batch: int = 1) -> list[dict[str, Tensor]]:
    """Returns the embeddings of prompts and of negative prompts."""
    parts = []
    for seed in (20, 30):
        part = {"prompt_embeds": noise(seed, batch, TEXT, 16)}
        if "15" not in name:
            part |= {
                "pooled_prompt_embeds": noise(seed + 1, batch, 8),
                "prompt_attention_mask": torch.ones(batch, TEXT),
            }
        else:
            part |= {
                "prompt_embeds_mask": torch.ones(batch, TEXT),
                "prompt_embeds_2": noise(seed + 2, batch, BYT5, 8),
                "prompt_embeds_mask_2": torch.ones(batch, BYT5),
            }
        parts.append(part)
    return parts


def generate(pipe: Any, steps: int = 5, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents (B, C, T, H, W) of one call, guided by a second forward."""
    name = type(pipe).__name__
    positive, negative = prompts(name, batch)
    settings: dict[str, Any] = {
        **positive, **{f"negative_{key}": value for key, value in negative.items()},
        "height": 16 * GRID[1], "width": 16 * GRID[2], "num_frames": 4 * (GRID[0] - 1) + 1,
        "num_inference_steps": steps, "output_type": "latent", "return_dict": False,
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(batch)],
        "true_cfg_scale": 3.0, "guidance_scale": 6.0, "image": picture(name, batch),
    }  # fmt: skip
    known = inspect.signature(type(pipe).__call__).parameters
    latents: Tensor = pipe(**{key: value for key, value in {**settings, **call}.items() if key in known})[0]
    return latents


def first_input(pipe: Any) -> Tensor:
    """Returns the transformer's input in the first step."""
    seen: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    generate(pipe, 1)
    hook.remove()
    return seen[0]


def arguments(name: str, latents: Tensor, level: float, text: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of a transformer call on latents (1, C, T, H, W), as the pipelines make them."""
    given = {
        "hidden_states": latents,
        "timestep": torch.tensor([1000.0 * level]),
        "encoder_hidden_states": text["prompt_embeds"],
        "encoder_attention_mask": torch.ones(1, TEXT),
    }
    if "15" not in name:
        return given | {"pooled_projections": text["pooled_prompt_embeds"], "guidance": torch.tensor([6000.0])}
    shown = torch.cat([latents, torch.zeros(1, 5, *latents.shape[2:])], dim=1)
    return given | {
        "hidden_states": shown,
        "encoder_hidden_states_2": text["prompt_embeds_2"],
        "encoder_attention_mask_2": text["prompt_embeds_mask_2"],
        "image_embeds": torch.zeros(1, IMAGE, 12),
    }


def velocity_on_tokens(
    name: str,
    model: Any,
    tokens: Tensor,
    at: Tensor,
    level: float,
    text: dict[str, Tensor],
    shown: Tensor | None = None,
) -> Tensor:
    """Returns the velocity (1, M, D) of some tokens (1, M, D), by calling the layers directly, without hook or forward.

    Args:
        name: The pipeline's class.
        model: The transformer.
        tokens: (1, M, D).
        at: Their raster indices (M,).
        level: Noise level.
        text: From `prompts`, without padding.
        shown: (1, M, E), further channels of the tokens.
    """
    time = torch.tensor([1000.0 * level])
    condition = model.context_embedder(text["prompt_embeds"], time, torch.ones(1, TEXT))
    if "15" not in name:
        shape = (1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
        modulation, replaced = model.time_text_embed(time, text["pooled_prompt_embeds"], torch.tensor([6000.0]))
        num_replaced = int((at < GRID[1] * GRID[2]).sum())
        blocks, further = [*model.transformer_blocks, *model.single_transformer_blocks], (replaced, num_replaced)
        length = len(at) + TEXT
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    else:
        shape = (1, 9, *GRID)
        if shown is None:
            tokens = F.pad(tokens, (0, 5))  # for text to video the condition is zeros
        modulation, blocks, further = model.time_embed(time), [*model.transformer_blocks], ()
        byt5, embeds = model.context_embedder_2(text["prompt_embeds_2"]), image_embeds()
        image = 0.0 * model.image_embedder(0.0 * embeds) if shown is None else model.image_embedder(embeds)
        kinds = [model.cond_type_embed(torch.tensor([[kind]])) for kind in range(3)]
        # Valid entries come first (image, ByT5, language model), followed by masked ones.
        parts = [byt5 + kinds[1], condition + kinds[0]]
        condition = torch.cat([*parts, image + kinds[2]] if shown is None else [image + kinds[2], *parts], dim=1)
        mask = (torch.arange(BYT5 + TEXT + IMAGE) < BYT5 + TEXT + (0 if shown is None else IMAGE))[None]
    tokens = tokens if shown is None else torch.cat([tokens, shown], dim=2)
    embed = model.x_embedder.proj
    hidden = F.linear(tokens, embed.weight.flatten(1), embed.bias)
    rotary = tuple(table[at] for table in model.rope(torch.empty(shape)))
    for block in blocks:
        hidden, condition = block(hidden, condition, modulation, mask, rotary, *further)
    out: Tensor = model.proj_out(model.norm_out(hidden, modulation))
    return out
