"""Tiny random transformers of FLUX.2 and Chroma, and noise from a seed and sizes; FLUX.1's are in `tiny`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support.tiny import CHANNELS, WIDTH

TEXT = 7
VIDEO = (3, 6, 8)
"""Frames, rows and columns of tokens, all different."""


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_mask(batch: int, length: int) -> Tensor:
    """Returns a text mask (B, T) in which the last prompt is two tokens shorter."""
    mask = torch.ones(batch, length)
    mask[-1, -2:] = 0.0
    return mask


def randomised(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


def flux2_transformer(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "in_channels": CHANNELS, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 16,
    }  # fmt: skip
    return randomised(diffusers.Flux2Transformer2DModel(**{**settings, **overrides}))


def chroma_transformer() -> Any:
    return randomised(
        diffusers.ChromaTransformer2DModel(
            in_channels=CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_hidden_dim=16,
            approximator_num_channels=8,
            approximator_layers=2,
        )
    )
