"""The transformers of LTX-Video and LTX-2, tiny and random, and one call of each; `every_model` has the others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.support.models import TEXT, noise, randomised, text_mask


def ltx_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16, "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip
    return randomised(diffusers.LTXVideoTransformer3DModel(**{**settings, **overrides}))


def ltx_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, torch.Size(grid).numel(), 4),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch, TEXT),
        "timestep": torch.full((batch,), 700.0),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
    }


def crop_tokens(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    frames, height, width = small
    kept = call["hidden_states"].unflatten(1, grid)[:, :frames, :height, :width].flatten(1, 3)
    return {**call, "hidden_states": kept, "num_frames": frames, "height": height, "width": width}


def ltx2_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "audio_in_channels": 6, "audio_out_channels": 6, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 16,
    }  # fmt: skip
    return randomised(diffusers.LTX2VideoTransformer3DModel(**{**settings, **overrides}))


def ltx2_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    call = ltx_call(grid, batch)
    return {
        **call,
        "audio_hidden_states": noise(3, batch, 5, 6),
        "audio_encoder_hidden_states": noise(4, batch, TEXT, 16),
        "audio_encoder_attention_mask": call["encoder_attention_mask"],
        "audio_num_frames": 5,
    }


def ltx23_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        **ltx2_call(grid, batch),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "audio_encoder_hidden_states": noise(4, batch, TEXT, 8),
        "sigma": torch.full((batch,), 700.0),
        "use_cross_timestep": True,
    }
