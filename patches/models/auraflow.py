"""AuraFlow of diffusers.

Positions are added to the tokens of each image when the tokens are made. Attention is joint over text and image, with
eight register tokens before the text. The pipeline passes both guidance branches as one batch.
"""

from __future__ import annotations

from ..cutting import Adapter, put, rows
from ..layout import PatchLayout
from .model import Config, Model, channels_out


def _layout(config: Config) -> PatchLayout:
    return PatchLayout((config["patch_size"], config["patch_size"]))


AURAFLOW = Model(
    name="AuraFlowTransformer2DModel",
    pipelines=("AuraFlowPipeline",),
    adapter=Adapter(outputs={"pos_embed": rows(1), "proj_out": put}),
    layout=_layout,
    grid=lambda config, arguments: _layout(config).grid(arguments["hidden_states"].shape),
    channels=channels_out,
    per_level=1.0,
    branches="batch",
    schedule="beta",
)
MODELS = (AURAFLOW,)
