"""HunyuanImage-2.1 of diffusers: joint attention, one rotary table, and whole-picture guidance unless distilled."""

from __future__ import annotations

from ..cutting import Adapter
from ..layout import PatchLayout
from .hunyuan import OUTPUTS
from .hunyuan15 import TWO_TEXTS, flops, mean_flow_problem
from .model import Model, channels_out

HUNYUAN_IMAGE = Model(
    name="HunyuanImageTransformer2DModel",
    pipelines=("HunyuanImagePipeline",),
    adapter=Adapter(
        outputs=OUTPUTS,
        has_one_table=True,
        rows=(*TWO_TEXTS, "guidance"),
    ),
    layout=lambda config: PatchLayout(tuple(config["patch_size"])),
    grid=lambda config, arguments: PatchLayout(tuple(config["patch_size"])).grid(arguments["hidden_states"].shape),
    channels=channels_out,
    text=("encoder_hidden_states", "encoder_hidden_states_2"),
    schedule="beta",
    cost=flops,
    blocks=("transformer_blocks", "single_transformer_blocks"),
    problem=mean_flow_problem,
)
MODELS = (HUNYUAN_IMAGE,)
