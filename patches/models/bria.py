"""Bria 3 of diffusers, from text: latents are packed tokens, with position ids as FLUX.1's.

Attention is joint over text and picture, with one rotary table for all pictures of a batch, text first: pictures whose
anchors differ are run one by one. The pipeline brings both branches of guidance as one batch, and asks its scheduler
for levels of its own. Its `normalize` weighs whole guided pictures: each branch is lifted before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cutting import Adapter, Places, put, rows
from ..flux.arguments import grid_of_ids
from ..layout import TokenLayout
from .model import Arguments, Model


def _after_text(tables: tuple[Tensor, ...], places: Places) -> tuple[Tensor, ...]:
    """Returns the anchors' rows of tables (T + N, D) in which text comes first, and the text's."""
    return tuple(places.take(x, 0, before=len(x) - places.num_tokens) for x in tables)


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the position ids of another grid."""
    axes = [torch.arange(side, device=arguments["img_ids"].device) for side in (1, *grid)]
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return {"img_ids": ids.to(arguments["img_ids"].dtype)}


def _levels(steps: int) -> Sequence[float]:
    from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas

    levels: Any = get_original_sigmas(num_inference_steps=steps)
    return [float(level) for level in levels]


BRIA = Model(
    name="BriaTransformer2DModel",
    pipelines=("BriaPipeline",),
    adapter=Adapter(
        outputs={"x_embedder": rows(1), "pos_embed": _after_text, "proj_out": put},
        has_one_table=True,
        rows=("hidden_states", "encoder_hidden_states", "timestep", "guidance"),
    ),
    layout=lambda config: TokenLayout(),
    grid=lambda config, arguments: grid_of_ids(arguments["img_ids"], arguments["hidden_states"].shape[1]),
    channels=lambda config: int(config["in_channels"]),
    spacings=(_levels,),
    branches="batch",
    resized=_resized,
    schedule="beta",
    refused={
        "controlnet_block_samples": "ControlNet residuals",
        "controlnet_single_block_samples": "ControlNet residuals",
    },
)
MODELS = (BRIA,)
