"""LTX-2 of diffusers, text to video with audio. Only the video is sparse; the audio is always computed in full.

Latents are packed tokens; the call's arguments give their grid. Video attends to itself, to text and to audio, and
audio attends to video. Rotary tables are (B, N, D), or (B, H, N, D / 2) for each head. The pipeline passes text
guidance as one batch, and spatio-temporal and modality guidance in further calls; its guidance rescaling needs whole
guided videos. The audio is a second output of every forward. It is returned to the pipeline unchanged, and the pipeline
steps it with a copy of the scheduler. In sparse steps, audio attends only to the anchors of the video.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cutting import Adapter, Places, each_token, put, rows
from ..layout import TokenLayout
from .model import Arguments, Config, Model

_SIDES = ("num_frames", "height", "width")


def _tables(x: tuple[Tensor, ...], places: Places) -> tuple[Tensor, ...]:
    """Cuts rotary tables, whose second-last axis holds the tokens, to the anchors."""
    return tuple(places.take(table, table.ndim - 2) for table in x)


def _grid(config: Config, arguments: Arguments) -> tuple[int, ...]:
    return tuple(int(arguments[side]) for side in _SIDES)


def _resized(arguments: Arguments, grid: tuple[int, ...]) -> Arguments:
    """Returns the sides of a smaller video, from which the model makes positions, and the level of the audio."""
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
