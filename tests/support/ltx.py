"""Tiny random pipelines of LTX-Video, one way to call them, and its transformer's layers called directly."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.ltx_models import ltx_transformer
from tests.support.models import TEXT, noise
from tests.support.video import GRID

FRAME_RATE = 25
SCALE = (8 / FRAME_RATE, 32, 32)
"""The factors of positions."""


def pipeline() -> Any:
    """Returns a silent LTXPipeline."""
    pipe = diffusers.LTXPipeline(
        scheduler=tiny.scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=ltx_transformer()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch: int = 1) -> list[Tensor]:
    """Returns the embeddings of prompts and of negative prompts."""
    return [noise(seed, batch, TEXT, 16) for seed in (60, 70)]


def generate(pipe: Any, steps: int = 5, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents (B, N, D) of one call."""
    positive, negative = prompts(batch)
    settings: dict[str, Any] = {
        "prompt_embeds": positive, "prompt_attention_mask": torch.ones(batch, TEXT),
        "negative_prompt_embeds": negative, "negative_prompt_attention_mask": torch.ones(batch, TEXT),
        "guidance_scale": 3.0, "num_frames": 8 * (GRID[0] - 1) + 1, "height": 32 * GRID[1], "width": 32 * GRID[2],
        "frame_rate": FRAME_RATE, "num_inference_steps": steps, "output_type": "latent", "return_dict": False,
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(batch)],
    }  # fmt: skip
    latents: Tensor = pipe(**{**settings, **call})[0]
    return latents


def arguments(tokens: Tensor, grid: tuple[int, ...], level: float, text: Tensor) -> dict[str, Any]:
    """Returns the arguments of a call of the transformer on all tokens (1, N, D) of a grid."""
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(1, TEXT),
        "timestep": torch.tensor([1000.0 * level]),
        "rope_interpolation_scale": SCALE,
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
    }


def ltx_on_tokens(model: Any, tokens: Tensor, at: Tensor, level: float, text: Tensor) -> Tensor:
    """Returns the velocity (1, M, D) of some tokens (1, M, D), by calling the layers directly, without hook or forward.

    `at` has their raster indices (M,); `text` is (1, T, E), without padding.
    """
    whole = tokens.new_zeros(1, torch.Size(GRID).numel(), tokens.shape[2])
    rotary = tuple(table[:, at] for table in model.rope(whole, *GRID, SCALE))
    hidden = model.proj_in(tokens)
    modulation, time = model.time_embed(torch.tensor([1000.0 * level]), batch_size=1, hidden_dtype=hidden.dtype)
    condition = model.caption_projection(text)
    for block in model.transformer_blocks:
        hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=condition,
            temb=modulation[:, None],
            image_rotary_emb=rotary,
            encoder_attention_mask=None,
        )
    shift, scale = (model.scale_shift_table[None] + time[:, None]).unbind(1)
    out: Tensor = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)
    return out
