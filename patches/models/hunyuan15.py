"""HunyuanVideo-1.5 of diffusers, from text or an image.

Attention is joint over video, text and image, with one rotary table like HunyuanVideo's. Each attention layer makes its
own mask, which shrinks with the anchors. An image is given as further channels (33 of 65) and as tokens after the text.
"""

from __future__ import annotations

import math

from ..cutting import Adapter
from .hunyuan import OUTPUTS, grid, layout
from .model import Config, Model, channels_out

TWO_TEXTS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)


def mean_flow_problem(config: Config) -> str | None:
    """Returns why a transformer distilled to the mean velocity of a step cannot be accelerated; None for others."""
    if not config.get("use_meanflow"):
        return None
    return (
        "transformer must predict the velocity at its noise level, from which clean tokens are estimated, got the mean "
        "velocity of a whole step (use_meanflow=True)"
    )


def flops(config: Config, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one forward: matrix products of blocks, embedding of latents and last projection.

    This is a formula because the model reads values, so that it cannot be traced. A multiply-add counts as two. The
    preparation of the text, which is small and constant, is left out.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = math.prod(config["patch_size"] if "patch_size_t" not in config else layout(config).patch)
    tokens, blocks = image_tokens + text_tokens, config["num_layers"] + config.get("num_single_layers", 0)
    hidden = int(config["mlp_ratio"] * width)
    block = tokens * (4 * width**2 + 2 * hidden * width) + 2 * tokens**2 * width + 2 * 6 * width**2
    ends = image_tokens * patch * (config["in_channels"] + channels_out(config)) * width
    return 2 * (blocks * block + ends)


HUNYUAN_15 = Model(
    name="HunyuanVideo15Transformer3DModel",
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    adapter=Adapter(
        outputs=OUTPUTS,
        has_one_table=True,
        rows=(*TWO_TEXTS, "image_embeds"),
    ),
    layout=layout,
    grid=grid,
    channels=channels_out,
    frames="time",
    text=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
    cost=flops,
    blocks=("transformer_blocks",),
    problem=mean_flow_problem,
)
MODELS = (HUNYUAN_15,)
