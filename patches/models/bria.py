"""Bria 3 and Bria FIBO of diffusers, from text: latents are tokens, with position ids as FLUX.1's.

Attention is joint over text and picture, with one rotary table for all pictures of a batch, text first: pictures whose
anchors differ are run one by one. The pipelines bring both branches of guidance as one batch. Bria 3 asks its scheduler
for levels of its own, and its `normalize` weighs whole guided pictures: each branch is lifted before it. FIBO gives
each block a layer of the text encoder, and hides padding of the text by a mask among `joint_attention_kwargs`.
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
    """Returns the anchors' rows of tables (T + N, D) in which text comes first, and the text's."""
    return tuple(places.take(x, 0, before=len(x) - places.num_tokens) for x in tables)


def _seen(mask: Tensor, places: Places) -> Tensor:
    """Returns a mask of keys (B, 1, 1, T + N) for the text and the anchors."""
    return places.take(mask, 3, before=mask.shape[3] - places.num_tokens)


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the position ids of another grid, and a mask for as many tokens; of the picture it hides none."""
    axes = [torch.arange(side, device=arguments["img_ids"].device) for side in (1, *grid)]
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    resized: dict[str, Any] = {"img_ids": ids.to(arguments["img_ids"].dtype)}
    if (mask := arguments.get("attention_mask")) is not None:
        text = mask.shape[3] - arguments["hidden_states"].shape[1]
        resized["attention_mask"] = mask[..., : text + len(ids)]
    return resized


def _with_mask(arguments: Arguments) -> Arguments:
    """Returns the arguments with the mask as one of them."""
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
