"""HunyuanVideo of diffusers, from text or an image.

Attention is joint over video and text, with one rotary table (N, D) for all videos of a batch: videos whose anchors
differ are run one by one. The attention mask is made from the number of tokens that the embedding returns, so that it
shrinks with the anchors. An image is further channels (17 of 33), or with `token_replace` the first frame, at a
timestep of its own: its tokens are anchors in every step, and the first of them, where the blocks look for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cutting import Adapter, put, rows
from ..layout import PatchLayout
from .model import Arguments, Config, Model, channels_out

OUTPUTS = {"x_embedder": rows(1), "rope": rows(0), "proj_out": put}


def layout(config: Config) -> PatchLayout:
    return PatchLayout((config["patch_size_t"], config["patch_size"], config["patch_size"]))


def grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    return layout(config).grid(arguments["hidden_states"].shape)


def _given_frame(config: Config, arguments: Arguments) -> Tensor | None:
    """Returns the tokens (B, N) of the first frame, where the model is given it in the place of the state's."""
    if config.get("image_condition_type") != "token_replace":
        return None
    hidden, (frames, *sides) = arguments["hidden_states"], grid(config, arguments)
    is_first = torch.arange(frames, device=hidden.device) == 0
    return is_first.repeat_interleave(math.prod(sides)).expand(len(hidden), -1)


HUNYUAN = Model(
    name="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    adapter=Adapter(
        outputs=OUTPUTS,
        has_one_table=True,
        rows=(
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "pooled_projections",
            "guidance",
        ),
    ),
    layout=layout,
    grid=grid,
    channels=channels_out,
    frames="time",
    forced=_given_frame,
)
MODELS = (HUNYUAN,)
