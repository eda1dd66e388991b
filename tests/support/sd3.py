"""Tiny random pipelines of Stable Diffusion 3, one way to call them, and its transformer's layers called directly."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.every_model import TEXT, sd3_transformer
from tests.support.models import noise

GRID = (10, 14)
PIXELS = 4  # along a token's side
PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")


def pipeline(name: str = PIPELINES[0]) -> Any:
    """Returns a silent pipeline of this class."""
    kind = getattr(diffusers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            shift_factor=0.0,
            scaling_factor=1.0,
        )
    parts = {
        "transformer": sd3_transformer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae.eval(),
    }
    pipe = kind(**{part: parts.get(part) for part in inspect.signature(kind).parameters})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Returns the embeddings of prompts and of negative prompts, each with its pooled embedding."""
    return [(noise(seed, batch, TEXT, 16), noise(seed + 1, batch, 8)) for seed in (40, 50)]


def _picture() -> Tensor:
    return noise(3, 1, 3, PIXELS * GRID[0], PIXELS * GRID[1]).clamp(-1, 1) / 2 + 0.5


def generate(pipe: Any, steps: int = 5, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents (B, C, H, W) of one call."""
    (positive, pooled), (negative, negative_pooled) = prompts(batch)
    settings: dict[str, Any] = {
        "prompt_embeds": positive, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled, "guidance_scale": 3.0, "height": PIXELS * GRID[0],
        "width": PIXELS * GRID[1], "num_inference_steps": steps, "output_type": "latent", "return_dict": False,
        "image": _picture().expand(batch, -1, -1, -1), "strength": 0.8,
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(batch)],
    }  # fmt: skip
    known = inspect.signature(type(pipe).__call__).parameters
    latents: Tensor = pipe(**{key: value for key, value in {**settings, **call}.items() if key in known})[0]
    return latents


def sd3_on_tokens(
    model: Any, tokens: Tensor, at: Tensor, level: float, text: tuple[Tensor, Tensor], skipped: tuple[int, ...] = ()
) -> Tensor:
    """Returns the velocity (1, M, D) of some tokens (1, M, D), by calling the layers directly, without hook or forward.

    `at` has their raster indices (M,), `text` the embeddings and pooled embeddings, `skipped` the blocks to leave out.
    """
    embed, side = model.pos_embed.proj, model.config.pos_embed_max_size
    top, left = ((side - inner) // 2 for inner in GRID)
    table = model.pos_embed.pos_embed.view(side, side, -1)[top : top + GRID[0], left : left + GRID[1]].flatten(0, 1)
    hidden = F.linear(tokens, embed.weight.flatten(1), embed.bias) + table[at]
    time = model.time_text_embed(torch.tensor([1000.0 * level]), text[1])
    condition = model.context_embedder(text[0])
    for index, block in enumerate(model.transformer_blocks):
        if index not in skipped:
            condition, hidden = block(hidden_states=hidden, encoder_hidden_states=condition, temb=time)
    out = model.proj_out(model.norm_out(hidden, time))
    # The model's output has a token's channels last; latents have them first.
    return out.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)
