"""HiDream-I1 of diffusers, with a mixture of experts in every block.

Experts are chosen for each token separately, with no limit on the tokens per expert. The result for an anchor therefore
does not depend, through the experts, on which other tokens are in the call. Attention is joint over picture and text.
Each picture has its own position ids, so pictures can have different anchors in one forward. The pipeline passes both
guidance branches as one batch, and negates the output.

Pictures that are not square are padded to `max_resolution`, 4,096 tokens. The keys of the padding are zero, but
attention does not mask it. A stage keeps its share of the padding (`fill.py`).
"""

from __future__ import annotations

import math

from ..cutting import Adapter, put
from ..layout import PatchLayout
from .fill import embedded, with_fill
from .model import Arguments, Config, Model, Words, channels_out

_MULTIPLE = 256  # the width inside an expert is a multiple of this
_LAYERS = "encoder_hidden_states_llama3"


def _layout(config: Config) -> PatchLayout:
    return PatchLayout((config["patch_size"], config["patch_size"]))


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    return _layout(config).grid(arguments["hidden_states"].shape)


def _fill(config: Config, grid: tuple[int, ...]) -> int:
    """Returns the number of tokens that the model adds to those of a grid."""
    if grid[0] == grid[1]:
        return 0
    return math.prod(config["max_resolution"]) // config["patch_size"] ** 2 - math.prod(grid)


def _renamed(arguments: Arguments, old: str, new: str) -> Arguments:
    return {new if name == old else name: value for name, value in arguments.items()}


def _flops(config: Config, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one forward: matrix products of blocks, embedding and last projection.

    This is a formula because the model reads how many tokens each expert has, so that it cannot be traced. A
    multiply-add counts as two. Embedding the text is left out.
    """
    width, both = config["num_attention_heads"] * config["attention_head_dim"], image_tokens + text_tokens
    doubles, singles = config["num_layers"], config["num_single_layers"]

    def expert(hidden: int) -> int:
        return 3 * width * -(-(2 * hidden // 3) // _MULTIPLE) * _MULTIPLE

    experts = config["num_activated_experts"] * expert(4 * width) + expert(2 * width)
    experts += width * config["num_routed_experts"]
    projections, attention = 4 * width**2, 2 * both**2 * width
    double = both * projections + image_tokens * experts + text_tokens * expert(4 * width) + 12 * width**2
    single = both * (projections + experts) + 6 * width**2
    ends = image_tokens * config["patch_size"] ** 2 * (config["in_channels"] + channels_out(config)) * width
    return 2 * (doubles * (double + attention) + singles * (single + attention) + ends + 2 * width**2)


def _problem(config: Config) -> str | None:
    if config["num_routed_experts"] > 0:
        return None
    return "transformer must have experts (num_routed_experts), got none"


HIDREAM = Model(
    name="HiDreamImageTransformer2DModel",
    pipelines=("HiDreamImagePipeline",),
    adapter=Adapter(
        outputs={"x_embedder": embedded, "pe_embedder": with_fill, "final_layer": put},
        blocks={name: {"hidden_states_masks": with_fill} for name in ("double_stream_blocks", "single_stream_blocks")},
    ),
    words=Words(
        read=lambda arguments: _renamed(arguments, "timesteps", "timestep"),
        write=lambda arguments: _renamed(arguments, "timestep", "timesteps"),
    ),
    layout=_layout,
    grid=_grid,
    channels=channels_out,
    sign=-1,
    branches="batch",
    text=("encoder_hidden_states_t5", _LAYERS, _LAYERS),  # Llama's last layer, and its layer for each block
    schedule="beta",
    refused={"hidden_states_masks": "packed latents (hidden_states_masks)", "img_ids": "packed latents (img_ids)"},
    cost=_flops,
    fill=_fill,
    uncompiled="its experts read how many tokens they have",
    problem=_problem,
)
MODELS = (HIDREAM,)
