"""Mochi of diffusers, text to video. Its timestep and its scheduler's levels rise while noise falls.

Tokens are made frame by frame. Attention is joint over video and text. One rotary table serves all videos of a batch,
so videos with different anchors run one by one. The pipeline passes both guidance branches as one batch, and requests
custom levels from its scheduler: half of the steps are near full noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..cutting import Adapter, Places, put, rows
from ..layout import PatchLayout
from .model import Config, Model, channels_out

_NOISE = 0.025  # how far the first half of the steps goes, a constant of the pipeline


def _layout(config: Config) -> PatchLayout:
    return PatchLayout((1, config["patch_size"], config["patch_size"]))


def _frames(x: Tensor, places: Places) -> Tensor:
    """Returns the anchors (B, M, D) of tokens that come frame by frame, (B * T, h * w, D); the model joins frames."""
    return places.take(x.reshape(-1, places.num_tokens, x.shape[2]), 1)


def _levels(steps: int) -> Sequence[float]:
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    levels: Sequence[float] = linear_quadratic_schedule(steps, _NOISE)
    return levels


def _flops(config: Config, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one forward: matrix products of blocks, embedding and last projection.

    This is a formula because the model reads which text tokens are padding, so that it cannot be traced. A multiply-add
    counts as two. Embedding the text is left out. Padding of the text is counted in attention,
    although the model skips it there.
    """
    width, narrow = config["num_attention_heads"] * config["attention_head_dim"], config["pooled_projection_dim"]
    hidden, narrow_hidden = 8 * width // 3, 8 * narrow // 3
    depth = config["num_layers"]
    image = depth * (image_tokens * (4 * width**2 + 3 * hidden * width) + 4 * width**2)
    text = depth * text_tokens * 3 * width * narrow
    # The last block returns no text.
    text += (depth - 1) * (text_tokens * (width + 3 * narrow_hidden) + 4 * width) * narrow + width * narrow
    attention = depth * 2 * (image_tokens + text_tokens) ** 2 * width
    ends = image_tokens * config["patch_size"] ** 2 * (config["in_channels"] + channels_out(config)) * width
    ends += image_tokens * 3 * width // 2  # learned frequencies times positions
    return 2 * (image + text + attention + ends + 2 * width**2)


MOCHI = Model(
    name="MochiTransformer3DModel",
    pipelines=("MochiPipeline",),
    adapter=Adapter(
        outputs={"patch_embed": _frames, "rope": rows(0), "proj_out": put},
        has_one_table=True,
        rows=("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
    ),
    layout=_layout,
    grid=lambda config, arguments: _layout(config).grid(arguments["hidden_states"].shape),
    channels=channels_out,
    is_inverted=True,
    sign=-1,
    inverts_levels=True,
    spacings=(_levels,),
    frames="time",
    branches="batch",
    cost=_flops,
    captures=False,
)
MODELS = (MOCHI,)
