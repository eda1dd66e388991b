"""LTX-Video of diffusers, from text: latents are packed tokens, whose grid the call names.

Self-attention is on video tokens alone, text comes by cross-attention; rotary tables are (B, N, D), so that videos may
have anchors of their own in one forward. The pipeline brings both branches of guidance as one batch. Its rescaling
weighs whole guided videos: each branch is lifted before it.
"""

from __future__ import annotations

from ..cutting import Adapter, each_token, put, rows
from ..layout import TokenLayout
from .model import Arguments, Config, Model

_SIDES = ("num_frames", "height", "width")


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    return tuple(int(arguments[side]) for side in _SIDES)


LTX = Model(
    name="LTXVideoTransformer3DModel",
    pipelines=("LTXPipeline",),
    adapter=Adapter(
        outputs={"proj_in": rows(1), "rope": rows(1), "proj_out": put},
        arguments={"timestep": each_token},
    ),
    layout=lambda config: TokenLayout(side=1),
    grid=_grid,
    channels=lambda config: int(config["in_channels"]),
    frames="time",
    branches="batch",
    resized=lambda arguments, grid: dict(zip(_SIDES, grid, strict=True)),
    refused={"video_coords": "positions of its own for every token (video_coords)"},
)
MODELS = (LTX,)
