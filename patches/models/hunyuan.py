"""HunyuanVideo and HunyuanVideo-1.5 of diffusers, from text or an image.

Attention is joint over video and text, with one rotary table (N, D) for all videos of a batch: videos whose anchors
differ are run one by one. HunyuanVideo makes its attention mask from the number of tokens that its embedding returns,
HunyuanVideo-1.5 makes one in each attention: both shrink with the anchors. An image is further channels (17 of 33; 33
of 65), or with `token_replace` the first frame, at a timestep of its own: its tokens are anchors in every step, and the
first of them, where the blocks look for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cutting import Adapter, put, rows
from ..layout import PatchLayout
from .model import Arguments, Config, Model, channels_out

OUTPUTS = {"x_embedder": rows(1), "rope": rows(0), "proj_out": put}
TWO_TEXTS = (
    "hidden_states",
    "timestep",
    "timestep_r",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)


def _layout(config: Config) -> PatchLayout:
    return PatchLayout((config["patch_size_t"], config["patch_size"], config["patch_size"]))


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    return _layout(config).grid(arguments["hidden_states"].shape)


def _given_frame(config: Config, arguments: Arguments) -> Tensor | None:
    """Returns the tokens (B, N) of the first frame, where the model is given it in the place of the state's."""
    if config["image_condition_type"] != "token_replace":
        return None
    hidden, (frames, *sides) = arguments["hidden_states"], _grid(config, arguments)
    is_first = torch.arange(frames, device=hidden.device) == 0
    return is_first.repeat_interleave(math.prod(sides)).expand(len(hidden), -1)


def flops(config: Config, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one forward of a model that looks at values, so that it cannot be traced.

    Matrix products of the blocks, the embedding of latents and the last projection; a multiply-add is two. Left out:
    what prepares the text, which is small and always the same.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = math.prod(config["patch_size"] if "patch_size_t" not in config else _layout(config).patch)
    tokens, blocks = image_tokens + text_tokens, config["num_layers"] + config.get("num_single_layers", 0)
    hidden = int(config["mlp_ratio"] * width)
    block = tokens * (4 * width**2 + 2 * hidden * width) + 2 * tokens**2 * width + 2 * 6 * width**2
    ends = image_tokens * patch * (config["in_channels"] + channels_out(config)) * width
    return 2 * (blocks * block + ends)


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
    layout=_layout,
    grid=_grid,
    channels=channels_out,
    frames="time",
    forced=_given_frame,
)
HUNYUAN_15 = Model(
    name="HunyuanVideo15Transformer3DModel",
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    adapter=Adapter(
        outputs=OUTPUTS,
        has_one_table=True,
        rows=(*TWO_TEXTS, "image_embeds"),
    ),
    layout=_layout,
    grid=_grid,
    channels=channels_out,
    frames="time",
    text=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
    cost=flops,
    blocks=("transformer_blocks",),
)
MODELS = (HUNYUAN, HUNYUAN_15)
