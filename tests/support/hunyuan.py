"""Tiny random pipelines of HunyuanVideo and HunyuanVideo-1.5, one way to call them, and their layers by hand."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.every_model import TEXT, hunyuan15_transformer, hunyuan_transformer
from tests.support.models import noise
from tests.support.video import GRID

BYT5, IMAGE = 4, 3
PIPELINES = ("HunyuanVideoPipeline", "HunyuanVideo15Pipeline")


def _scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)


def pipeline(name: str) -> Any:
    """Returns a silent pipeline of this class, whose videos have tokens of GRID."""
    if name == "HunyuanVideoPipeline":
        pipe = diffusers.HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=hunyuan_transformer(),
            vae=None,
            scheduler=_scheduler(),
            text_encoder_2=None,
            tokenizer_2=None,
        )
    else:
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1, spatial_compression_ratio=16
        )
        pipe = diffusers.HunyuanVideo15Pipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=hunyuan15_transformer(),
            vae=vae,
            scheduler=_scheduler(),
            text_encoder_2=None,
            tokenizer_2=None,
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        )
        pipe.vision_num_semantic_tokens = IMAGE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(name: str, batch: int = 1) -> list[dict[str, Tensor]]:
    """Returns the embeddings of prompts and of negative prompts."""
    parts = []
    for seed in (20, 30):
        part = {"prompt_embeds": noise(seed, batch, TEXT, 16)}
        if name == "HunyuanVideoPipeline":
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
    }  # fmt: skip
    if name == "HunyuanVideoPipeline":
        settings |= {"true_cfg_scale": 3.0, "guidance_scale": 6.0}
    latents: Tensor = pipe(**{**settings, **call})[0]
    return latents


def arguments(name: str, latents: Tensor, level: float, text: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of a call of the transformer on latents (1, C, T, H, W), as the pipelines give them."""
    given = {
        "hidden_states": latents,
        "timestep": torch.tensor([1000.0 * level]),
        "encoder_hidden_states": text["prompt_embeds"],
        "encoder_attention_mask": torch.ones(1, TEXT),
    }
    if name == "HunyuanVideoPipeline":
        return given | {"pooled_projections": text["pooled_prompt_embeds"], "guidance": torch.tensor([6000.0])}
    shown = torch.cat([latents, torch.zeros(1, 5, *latents.shape[2:])], dim=1)
    return given | {
        "hidden_states": shown,
        "encoder_hidden_states_2": text["prompt_embeds_2"],
        "encoder_attention_mask_2": text["prompt_embeds_mask_2"],
        "image_embeds": torch.zeros(1, IMAGE, 12),
    }


def velocity_on_tokens(
    name: str, model: Any, tokens: Tensor, at: Tensor, level: float, text: dict[str, Tensor]
) -> Tensor:
    """Returns the velocity (1, M, D) of some tokens (1, M, D) in a straight line: layers, and no hook or forward.

    at: their raster indices (M,). text: of `prompts`, without padding.
    """
    time = torch.tensor([1000.0 * level])
    condition = model.context_embedder(text["prompt_embeds"], time, torch.ones(1, TEXT))
    if name == "HunyuanVideoPipeline":
        shape = (1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
        modulation, replaced = model.time_text_embed(time, text["pooled_prompt_embeds"], torch.tensor([6000.0]))
        blocks, further = [*model.transformer_blocks, *model.single_transformer_blocks], (replaced, 0)
        length = len(at) + TEXT
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    else:
        shape = (1, 9, *GRID)
        tokens = F.pad(tokens, (0, 5))  # a video from text is given zeros for its condition
        modulation, blocks, further = model.time_embed(time), [*model.transformer_blocks], ()
        byt5, image = (
            model.context_embedder_2(text["prompt_embeds_2"]),
            0.0 * model.image_embedder(torch.zeros(1, IMAGE, 12)),
        )
        kinds = [model.cond_type_embed(torch.tensor([[kind]])) for kind in range(3)]
        # Valid entries come first: no image, ByT5, the language model; then what is masked out.
        condition = torch.cat([byt5 + kinds[1], condition + kinds[0], image + kinds[2]], dim=1)
        mask = (torch.arange(BYT5 + TEXT + IMAGE) < BYT5 + TEXT)[None]
    embed = model.x_embedder.proj
    hidden = F.linear(tokens, embed.weight.flatten(1), embed.bias)
    rotary = tuple(table[at] for table in model.rope(torch.empty(shape)))
    for block in blocks:
        hidden, condition = block(hidden, condition, modulation, mask, rotary, *further)
    out: Tensor = model.proj_out(model.norm_out(hidden, modulation))
    return out
