"""HunyuanVideo-1.5 of diffusers, from text or an image.

Attention is joint over video, text and image, with one rotary table as HunyuanVideo's. Each attention makes a mask of
its own, which shrinks with the anchors. An image is further channels (33 of 65), and tokens after the text's.
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
    """Returns why a transformer that is distilled to the mean velocity of a step cannot be accelerated; else None."""
    if not config.get("use_meanflow"):
        return None
    return (
        "transformer must predict the velocity at its noise level, from which clean tokens are estimated, got the mean "
        "velocity of a whole step (use_meanflow=True)"
    )


def flops(config: Config, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one forward of a model that looks at values, so that it cannot be traced.

    Matrix products of the blocks, the embedding of latents and the last projection; a multiply-add is two. Left out:
    what prepares the text, which is small and always the same.
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
