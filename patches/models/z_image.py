"""Z-Image of diffusers: lists of pictures and prompts, and a timestep that rises while noise falls.

A method of the model makes tokens of pictures and pads them to a multiple of 32; its result is cut and padded again.
Each picture has its own position ids, so pictures can have different anchors in one forward. The pipeline passes both
guidance branches as one batch, and may scale whole guided pictures (`cfg_normalization`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cutting import Adapter, Places
from ..layout import PatchLayout
from .model import Arguments, Config, Model, Words

_MULTIPLE = 32  # the model pads pictures and prompts to a multiple of this
_LAYOUT = PatchLayout((2, 2))


def _read(arguments: Arguments) -> Arguments:
    """Returns the arguments with pictures (B, C, H, W) instead of a list of (C, 1, H, W)."""
    others = {name: value for name, value in arguments.items() if name not in ("x", "t")}
    return {**others, "hidden_states": torch.stack(list(arguments["x"]))[:, :, 0], "timestep": arguments["t"]}


def _write(arguments: Arguments) -> Arguments:
    others = {name: value for name, value in arguments.items() if name not in ("hidden_states", "timestep")}
    return {**others, "x": _returned(arguments["hidden_states"]), "t": arguments["timestep"]}


def _returned(pictures: Tensor) -> list[Tensor]:
    return list(pictures[:, :, None].unbind(0))


def _tokens(made: tuple[Any, ...], places: Places) -> tuple[Any, ...]:
    """Cuts the result of `patchify_and_embed` to the anchors' tokens, ids and padding of each picture."""
    pictures, prompts, sizes, ids, prompt_ids, _, prompt_padding = made
    anchors = places.anchors.expand(len(pictures), -1)
    short = -anchors.shape[1] % _MULTIPLE
    is_padding = torch.arange(anchors.shape[1] + short, device=anchors.device) >= anchors.shape[1]
    shown = [picture[at] for picture, at in zip(pictures, anchors, strict=True)]
    shown = [torch.cat([tokens, tokens[-1:].expand(short, -1)]) for tokens in shown]
    shown_ids = [torch.cat([own[at], own.new_zeros(short, 3)]) for own, at in zip(ids, anchors, strict=True)]
    return shown, prompts, sizes, shown_ids, prompt_ids, [is_padding] * len(shown), prompt_padding


def _put(x: Tensor, places: Places) -> Tensor:
    """Scatters the anchors' rows back; the rows of padding and prompt after them are not read."""
    return places.put(x[:, : places.anchors.shape[1]])


def _problem(config: Config) -> str | None:
    if tuple(config["all_patch_size"]) != (2,) or tuple(config["all_f_patch_size"]) != (1,):
        return f"transformer must have 2 x 2 patches only, got all_patch_size={config['all_patch_size']}"
    return None


Z_IMAGE = Model(
    name="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline",),
    adapter=Adapter(outputs={"all_final_layer.2-1": _put}, methods={"patchify_and_embed": _tokens}),
    words=Words(read=_read, write=_write, tensor=lambda made: torch.stack(list(made))[:, :, 0], returned=_returned),
    layout=lambda config: _LAYOUT,
    grid=lambda config, arguments: _LAYOUT.grid(arguments["hidden_states"].shape),
    channels=lambda config: int(config["in_channels"]),
    per_level=1.0,
    is_inverted=True,
    sign=-1,
    branches="batch",
    text=("cap_feats",),
    schedule="beta",
    refused={
        "controlnet_block_samples": "ControlNet residuals",
        "siglip_feats": "reference pictures (siglip_feats)",
        "image_noise_mask": "reference pictures (image_noise_mask)",
    },
    blocks=("noise_refiner", "context_refiner", "layers"),
    problem=_problem,
)
MODELS = (Z_IMAGE,)
