"""Every model that is cut, tiny and random, and one call of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.models import noise, randomised

TEXT = 7
VIDEO = (3, 6, 8)
"""Frames, rows and columns of tokens; no two alike."""


@dataclass(frozen=True)
class Case:
    """One way to call a model.

    make: the model. call: arguments for a batch of images of a grid. small: the grid of the sub-rectangle that is
    compared with the model on cropped latents; None where positions depend on the size. crop: the arguments of the
    sub-rectangle, which starts at the first token. is_one_graph: whether the whole forward compiles.
    """

    make: Callable[[], Any]
    grid: tuple[int, ...]
    call: Callable[[tuple[int, ...], int], dict[str, Any]]
    small: tuple[int, ...] | None
    crop: Callable[[dict[str, Any], tuple[int, ...], tuple[int, ...]], dict[str, Any]]
    is_one_graph: bool = True


def wan_transformer(seed: int = 0, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return randomised(diffusers.WanTransformer3DModel(**{**settings, **overrides}), seed)


def _wan_call(grid: tuple[int, ...], batch: int, channels: int = 4) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": noise(1, batch, channels, frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "timestep": torch.full((batch,), 700.0),
    }


def _wan_per_token(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    timestep = torch.full((batch, *grid), 700.0)
    timestep[:, 0] = 0.0
    return {**_wan_call(grid, batch), "timestep": timestep.flatten(1)}


def _wan_image(grid: tuple[int, ...], batch: int) -> dict[str, Any]:
    # The model takes the last 512 tokens of text for text, what comes before for the image's.
    given = {"encoder_hidden_states": noise(2, batch, 512, 16), "encoder_hidden_states_image": noise(3, batch, 5, 8)}
    return {**_wan_call(grid, batch, channels=9), **given}


def _crop_video(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    frames, height, width = small
    cropped = {**call, "hidden_states": call["hidden_states"][:, :, :frames, : 2 * height, : 2 * width]}
    if call["timestep"].ndim > 1:
        cropped["timestep"] = call["timestep"].unflatten(1, grid)[:, :frames, :height, :width].flatten(1)
    return cropped


def qwen_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
        "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4),
    }  # fmt: skip
    return randomised(diffusers.QwenImageTransformer2DModel(**{**settings, **overrides}))


def _qwen_call(grid: tuple[int, ...], batch: int, references: int = 0) -> dict[str, Any]:
    height, width = grid
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    shapes = [(1, height, width), *([(1, 2, references // 2)] if references else [])]
    return {
        "hidden_states": noise(1, batch, height * width + references, 16),
        "encoder_hidden_states": noise(2, batch, TEXT, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.7),
        "img_shapes": [shapes] * batch,
    }


def _no_crop(call: dict[str, Any], grid: tuple[int, ...], small: tuple[int, ...]) -> dict[str, Any]:
    raise AssertionError("there is no sub-rectangle to compare with")


CASES: dict[str, Case] = {
    "QwenImageTransformer2DModel": Case(qwen_transformer, (10, 14), _qwen_call, None, _no_crop),
    "QwenImageTransformer2DModel, references and a second modulation": Case(
        lambda: qwen_transformer(zero_cond_t=True),
        (10, 14),
        functools.partial(_qwen_call, references=6),
        None,
        _no_crop,
    ),
    "WanTransformer3DModel": Case(wan_transformer, VIDEO, _wan_call, (2, 3, 4), _crop_video),
    "WanTransformer3DModel, a timestep for every token": Case(
        wan_transformer, VIDEO, _wan_per_token, (2, 3, 4), _crop_video
    ),
    "WanTransformer3DModel, image to video": Case(
        lambda: wan_transformer(in_channels=9, added_kv_proj_dim=24, image_dim=8),
        VIDEO,
        _wan_image,
        (2, 3, 4),
        _crop_video,
    ),
}


def region(grid: tuple[int, ...], small: tuple[int, ...]) -> Tensor:
    """Returns the raster indices (M,) of the sub-rectangle of a grid that starts at its first token."""
    index = torch.arange(torch.Size(grid).numel()).view(grid)
    return index[tuple(slice(side) for side in small)].flatten()


def row_of(call: dict[str, Any], image: int) -> dict[str, Any]:
    """Returns a call of one image out of a batch."""
    return {
        name: value[image : image + 1] if isinstance(value, (Tensor, list)) else value for name, value in call.items()
    }
