"""Lumina2, Mochi, Bria, HiDream and HunyuanImage, tiny and random, with one call; `every_model` has the others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.models import TEXT, noise, randomised, text_mask


def lumina2_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
        "axes_dim_rope": (2, 2, 2), "axes_lens": (32, 32, 32), "cap_feat_dim": 16,
    }  # fmt: skip
    return randomised(diffusers.Lumina2Transformer2DModel(**{**settings, **overrides}))


def lumina2_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": torch.full((batch,), 0.3),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch, TEXT).long(),
    }


def mochi_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
        "pooled_projection_dim": 12, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8,
    }  # fmt: skip
    return randomised(diffusers.MochiTransformer3DModel(**{**settings, **overrides}))


def mochi_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": noise(1, batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 300.0),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch, TEXT).bool(),
    }


def bria_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": [0, 4, 4],
    }  # fmt: skip
    return randomised(diffusers.BriaTransformer2DModel(**{**settings, **overrides}))


def raster_ids(grid: tuple[int, ...]) -> Tensor:
    """Returns the position ids (N, 3) of a picture's tokens."""
    axes = [torch.arange(side, dtype=torch.float32) for side in (1, *grid)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def bria_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, torch.Size(grid).numel(), 16),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "img_ids": raster_ids(grid),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def crop_bria(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    kept = call["hidden_states"].unflatten(1, grid)[:, : small[0], : small[1]].flatten(1, 2)
    return {**call, "hidden_states": kept, "img_ids": raster_ids(small)}


def fibo_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": [0, 4, 4], "text_encoder_dim": 12,
    }  # fmt: skip
    return randomised(diffusers.BriaFiboTransformer2DModel(**{**settings, **overrides}))


def fibo_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    num_tokens = torch.Size(grid).numel()
    mask = torch.cat([text_mask(batch, TEXT), torch.ones(batch, num_tokens)], dim=1).bool()
    return {
        **bria_call(grid, batch),
        "hidden_states": noise(1, batch, num_tokens, 4),
        "text_encoder_layers": [noise(seed, batch, TEXT, 12) for seed in (3, 4)],
        "attention_mask": mask[:, None, None],
    }


def crop_fibo(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    seen = TEXT + torch.Size(small).numel()
    return {**crop_bria(call, grid, small), "attention_mask": call["attention_mask"][..., :seen]}


def hidream_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "caption_channels": (16, 16), "text_emb_dim": 8, "axes_dims_rope": (4, 2, 2),
        "max_resolution": (32, 32), "llama_layers": (0, 1),
    }  # fmt: skip
    return randomised(diffusers.HiDreamImageTransformer2DModel(**{**settings, **overrides}))


def hidream_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states_t5": noise(2, batch, TEXT, 16),
        "encoder_hidden_states_llama3": noise(3, 2, batch, TEXT, 16),
        "pooled_embeds": noise(4, batch, 8),
    }


def hunyuan_image_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": (1, 1), "text_embed_dim": 16,
        "text_embed_2_dim": 8, "rope_axes_dim": (4, 4),
    }  # fmt: skip
    return randomised(diffusers.HunyuanImageTransformer2DModel(**{**settings, **overrides}))


def hunyuan_image_call(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, batch, 4, *grid),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch, TEXT),
        "encoder_hidden_states_2": noise(3, batch, 4, 8),
        "encoder_attention_mask_2": text_mask(batch, 4),
    }
