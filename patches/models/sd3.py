"""Stable Diffusion 3 and 3.5 of diffusers.

Positions are added to the tokens of each image when the tokens are made, so images can have different anchors in one
forward. Attention is joint over text and image. The pipelines pass both guidance branches as one batch, and the
skip-layer branch in a further call.
"""

from __future__ import annotations

from ..cutting import Adapter, put, rows
from ..layout import PatchLayout
from .model import Config, Model, channels_out


def _layout(config: Config) -> PatchLayout:
    return PatchLayout((config["patch_size"], config["patch_size"]))


SD3 = Model(
    name="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    adapter=Adapter(outputs={"pos_embed": rows(1), "proj_out": put}),
    layout=_layout,
    grid=lambda config, arguments: _layout(config).grid(arguments["hidden_states"].shape),
    channels=channels_out,
    branches="batch",
    schedule="beta",
    refused={"block_controlnet_hidden_states": "ControlNet residuals"},
)
MODELS = (SD3,)
