"""Bria 3 and Bria FIBO of diffusers, text to image. Latents are tokens, with position ids like FLUX.1's.

Attention is joint over text and picture. One rotary table, text first, serves all pictures of a batch, so pictures with
different anchors run one by one. The pipelines pass both guidance branches as one batch. Bria 3 requests custom levels
from its scheduler, and its `normalize` needs whole guided pictures, so each branch is lifted first. FIBO gives each
block a different layer of the text encoder, and masks text padding through `joint_attention_kwargs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cutting import Adapter, Places, put, rows
from ..flux.arguments import grid_of_ids
from ..layout import TokenLayout
from .model import Arguments, Model, Words


def _after_text(tables: tuple[Tensor, ...], places: Places) -> tuple[Tensor, ...]:
    """Returns the rows of the text and the anchors from tables (T + N, D) in which text comes first."""
    return tuple(places.take(x, 0, before=len(x) - places.num_tokens) for x in tables)


def _seen(mask: Tensor, places: Places) -> Tensor:
    """Cuts a mask of keys (B, 1, 1, T + N) to the text and the anchors."""
    return places.take(mask, 3, before=mask.shape[3] - places.num_tokens)


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns position ids for another grid, and a mask for its number of tokens that hides no image token."""
    axes = [torch.arange(side, device=arguments["img_ids"].device) for side in (1, *grid)]
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    resized: dict[str, Any] = {"img_ids": ids.to(arguments["img_ids"].dtype)}
    if (mask := arguments.get("attention_mask")) is not None:
        text = mask.shape[3] - arguments["hidden_states"].shape[1]
        resized["attention_mask"] = mask[..., : text + len(ids)]
    return resized


def _with_mask(arguments: Arguments) -> Arguments:
    """Returns the arguments with the mask as an argument of its own."""
    joint = dict(arguments.get("joint_attention_kwargs") or {})
    return {**arguments, "attention_mask": joint.pop("attention_mask", None), "joint_attention_kwargs": joint}


def _without_mask(arguments: Arguments) -> Arguments:
    own = {name: value for name, value in arguments.items() if name != "attention_mask"}
    mask, joint = arguments.get("attention_mask"), dict(arguments.get("joint_attention_kwargs") or {})
    return {**own, "joint_attention_kwargs": joint if mask is None else {**joint, "attention_mask": mask}}


def _levels(steps: int) -> Sequence[float]:
    from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas

    return [float(level) for level in get_original_sigmas(num_inference_steps=steps)]


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
FIBO = Model(
    name="BriaFiboTransformer2DModel",
    pipelines=("BriaFiboPipeline",),
    adapter=Adapter(
        outputs=BRIA.adapter.outputs,
        arguments={"attention_mask": _seen},
        has_one_table=True,
        rows=(*BRIA.adapter.rows, "attention_mask"),
        lists=("text_encoder_layers",),
    ),
    words=Words(read=_with_mask, write=_without_mask),
    layout=lambda config: TokenLayout(side=1),
    grid=BRIA.grid,
    channels=BRIA.channels,
    branches="batch",
    resized=_resized,
    schedule="beta",
)
MODELS = (BRIA, FIBO)
