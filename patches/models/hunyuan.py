"""HunyuanVideo of diffusers, from text or an image.

Attention is joint over video and text. One rotary table (N, D) serves all videos of a batch, so videos with different
anchors run one by one. The attention mask follows the number of tokens that the embedding returns, so it shrinks with
the anchors. An image is given as further channels (17 of 33) or, with `token_replace`, as the first frame with a
separate timestep. The tokens of that frame are anchors in every step; they come first, where the blocks expect them.
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
    """Returns the tokens (B, N) of the first frame if it is given in place of the state's; otherwise None."""
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
