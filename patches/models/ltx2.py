"""LTX-2 of diffusers, from text: video and audio together; the audio stays whole.

Latents are packed tokens, whose grid the call names. Video attends to itself, to text and to the audio, which attends
back; rotary tables are (B, N, D), or (B, H, N, D / 2) for each head. The pipeline brings text guidance as one batch,
and spatio-temporal and modality guidance in further calls; its rescaling weighs whole guided videos. The audio is a
second output of every forward and goes back to the pipeline as it is, which steps it with a copy of the scheduler. In
sparse steps it attends to the anchors alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cutting import Adapter, Places, each_token, put, rows
from ..layout import TokenLayout
from .model import Arguments, Config, Model

_SIDES = ("num_frames", "height", "width")


def _tables(x: tuple[Tensor, ...], places: Places) -> tuple[Tensor, ...]:
    """Returns rotary tables, whose last axis but one holds the tokens, at the anchors."""
    return tuple(places.take(table, table.ndim - 2) for table in x)


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    return tuple(int(arguments[side]) for side in _SIDES)


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the sides of a smaller video, whose positions the model makes itself, and the level of the audio."""
    further: dict[str, Any] = {"video_coords": None}
    for audio, own in (("audio_timestep", "timestep"), ("audio_sigma", "sigma")):
        given = arguments.get(audio)
        further[audio] = arguments.get(own) if given is None else given
    return {**dict(zip(_SIDES, grid, strict=True)), **further}


def _result(sample: Tensor, audio: Tensor) -> object:
    from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

    return AudioVisualModelOutput(sample=sample, audio_sample=audio)


LTX2 = Model(
    name="LTX2VideoTransformer3DModel",
    pipelines=("LTX2Pipeline",),
    adapter=Adapter(
        outputs={"proj_in": rows(1), "rope": _tables, "cross_attn_rope": _tables, "proj_out": put},
        arguments={"timestep": each_token},
    ),
    layout=lambda config: TokenLayout(side=1),
    grid=_grid,
    channels=lambda config: int(config["in_channels"]),
    frames="time",
    branches="batch",
    text=("encoder_hidden_states", "audio_hidden_states"),
    levels=("timestep", "sigma"),
    resized=_resized,
    result=_result,
    refused={
        "video_self_attention_mask": "a mask between its own tokens (video_self_attention_mask)",
        "video_keyframes_mask": "keyframes (video_keyframes_mask)",
    },
)
MODELS = (LTX2,)
