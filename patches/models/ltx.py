"""LTX-Video of diffusers, text to video. Latents are packed tokens; the call's arguments give their grid.

Self-attention covers video tokens only, and text enters by cross-attention. Rotary tables are (B, N, D), so videos can
have different anchors in one forward. The pipeline passes both guidance branches as one batch. Its guidance rescaling
needs whole guided videos, so each branch is lifted first.
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
