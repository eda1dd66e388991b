"""Wan 2.1 and 2.2 of diffusers: text to video, image to video, TI2V with a timestep for every token, and VACE.

Self-attention covers video tokens only; text and image tokens enter by cross-attention. The rotary table (1, N, 1, D)
is broadcast over the batch, so videos can have different anchors in one forward. In image to video, the condition is
given as further channels (mask and first frame, 20 of 36) or, with a timestep for every token, as a first frame at
timestep 0 in place of the state's; the tokens of that frame are anchors in every step. VACE also makes tokens of a
control video.
"""

from __future__ import annotations

from torch import Tensor

from ..cutting import Adapter, each_token, put, rows, volume
from ..layout import PatchLayout
from .model import Arguments, Config, Model, channels_out


def _layout(config: Config) -> PatchLayout:
    return PatchLayout(tuple(config["patch_size"]))


def _given_frames(config: Config, arguments: Arguments) -> Tensor | None:
    """Returns the tokens (B, N) whose timestep is 0, which belong to a given frame."""
    timestep: Tensor = arguments["timestep"]
    return timestep == 0 if timestep.ndim == 2 and timestep.shape[1] > 1 else None


WAN = Model(
    name="WanTransformer3DModel",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    adapter=Adapter(
        outputs={"patch_embedding": volume, "rope": rows(1), "proj_out": put},
        arguments={"timestep": each_token},
    ),
    layout=_layout,
    grid=lambda config, arguments: _layout(config).grid(arguments["hidden_states"].shape),
    channels=channels_out,
    frames="time",
    forced=_given_frames,
    text=("encoder_hidden_states", "encoder_hidden_states_image"),
    divides=True,
)
VACE = Model(
    name="WanVACETransformer3DModel",
    pipelines=("WanVACEPipeline",),
    adapter=Adapter(
        outputs={"patch_embedding": volume, "vace_patch_embedding": volume, "rope": rows(1), "proj_out": put}
    ),
    layout=_layout,
    grid=WAN.grid,
    channels=channels_out,
    frames="time",
    text=WAN.text,
    beside=("control_hidden_states",),
)
MODELS = (WAN, VACE)
