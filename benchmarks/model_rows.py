"""Checkpoints of the supported models: what docs/models.md counts the operations of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jitaccel.method.grid import num_tokens_of
from jitaccel.method.presets import DENSE_STEPS
from jitaccel.patches.models import MODELS
from jitaccel.patches.models.model import Model

Shapes = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One checkpoint at its pipeline's default size.

    Attributes:
        name: The name in the table.
        size: The size in the table.
        kind: The transformer.
        config: Its configuration.
        grid: Its token grid.
        call: Makes its arguments without data, under `torch.device("meta")`.
        steps: The pipeline's default number of steps.
    """

    name: str
    size: str
    kind: str
    config: Mapping[str, Any]
    grid: tuple[int, ...]
    call: Callable[[tuple[int, ...]], Shapes]
    steps: int = DENSE_STEPS

    @property
    def model(self) -> Model:
        return next(model for model in MODELS if model.name == self.kind)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape)


def _text(length: int, width: int, **further: Any) -> Shapes:
    return {"encoder_hidden_states": _empty(1, length, width), "timestep": _empty(1), **further}


def _wan(name: str, size: str, dim: int, layers: int, ffn: int, grid: tuple[int, ...], channels: int = 16) -> Row:
    config = {
        "num_attention_heads": dim // 128, "in_channels": channels, "out_channels": channels, "ffn_dim": ffn,
        "num_layers": layers,
    }  # fmt: skip
    return Row(
        name=name,
        size=size,
        kind="WanTransformer3DModel",
        config=config,
        grid=grid,
        call=lambda g: {"hidden_states": _empty(1, channels, g[0], 2 * g[1], 2 * g[2]), **_text(512, 4096)},
    )


def _hunyuan15(size: str, grid: tuple[int, ...]) -> Row:
    def call(g: tuple[int, ...]) -> Shapes:
        further = {"encoder_hidden_states_2": _empty(1, 256, 1472), "image_embeds": _empty(1, 729, 1152)}
        return {"hidden_states": _empty(1, 65, *g), **_text(1000, 3584), **further}

    return Row(
        name="HunyuanVideo-1.5", size=size, kind="HunyuanVideo15Transformer3DModel", config={}, grid=grid, call=call
    )


def _sd3(name: str, layers: int, **further: Any) -> Row:
    config = {
        "sample_size": 128, "num_layers": layers, "num_attention_heads": layers, "in_channels": 16,
        "caption_projection_dim": 64 * layers, "pos_embed_max_size": 192, **further,
    }  # fmt: skip
    return Row(
        name=name,
        size="1024x1024",
        kind="SD3Transformer2DModel",
        config=config,
        grid=(64, 64),
        call=lambda g: {
            "hidden_states": _empty(1, 16, 2 * g[0], 2 * g[1]),
            **_text(333, 4096, pooled_projections=_empty(1, 2048)),
        },
        steps=28,
    )


def _mochi(frames: int, grid: tuple[int, ...]) -> Row:
    return Row(
        name="Mochi",
        size=f"848x480, {frames} frames",
        kind="MochiTransformer3DModel",
        config={},
        grid=grid,
        call=lambda g: {"hidden_states": _empty(1, 12, g[0], 2 * g[1], 2 * g[2]), **_text(256, 4096)},
        steps=64,
    )


ROWS: tuple[Row, ...] = (
    _wan("Wan 2.1 T2V 1.3B", "832x480, 81 frames", 1536, 30, 8960, (21, 30, 52)),
    _wan("Wan 2.1, 2.2 T2V 14B", "832x480, 81 frames", 5120, 40, 13824, (21, 30, 52)),
    _wan("Wan 2.1, 2.2 T2V 14B", "1280x720, 81 frames", 5120, 40, 13824, (21, 45, 80)),
    _wan("Wan 2.2 TI2V 5B", "1280x704, 121 frames", 3072, 30, 14336, (31, 22, 40), channels=48),
    Row(
        name="HunyuanVideo",
        size="1280x720, 129 frames",
        kind="HunyuanVideoTransformer3DModel",
        config={},
        grid=(33, 45, 80),
        call=lambda g: {
            "hidden_states": _empty(1, 16, g[0], 2 * g[1], 2 * g[2]),
            **_text(256, 4096, encoder_attention_mask=_empty(1, 256), pooled_projections=_empty(1, 768)),
            "guidance": _empty(1),
        },
    ),
    _hunyuan15("848x480, 121 frames", (31, 30, 53)),
    _hunyuan15("1280x720, 121 frames", (31, 45, 80)),
    Row(
        name="LTX-Video 2B",
        size="704x512, 161 frames",
        kind="LTXVideoTransformer3DModel",
        config={},
        grid=(21, 16, 22),
        call=lambda g: {
            "hidden_states": _empty(1, num_tokens_of(g), 128),
            **_text(128, 4096, encoder_attention_mask=_empty(1, 128)),
            **dict(zip(("num_frames", "height", "width"), g, strict=True)),
        },
    ),
    Row(
        name="LTX-2 19B",
        size="768x512, 121 frames",
        kind="LTX2VideoTransformer3DModel",
        config={},
        grid=(16, 16, 24),
        call=lambda g: {
            "hidden_states": _empty(1, num_tokens_of(g), 128),
            "audio_hidden_states": _empty(1, 126, 128),
            **_text(1024, 3840, audio_encoder_hidden_states=_empty(1, 1024, 3840)),
            **dict(zip(("num_frames", "height", "width"), g, strict=True)),
            "audio_num_frames": 126,
        },
        steps=30,
    ),
    Row(
        name="Qwen-Image",
        size="1328x1328",
        kind="QwenImageTransformer2DModel",
        config={},
        grid=(83, 83),
        call=lambda g: {
            "hidden_states": _empty(1, num_tokens_of(g), 64),
            **_text(256, 3584, img_shapes=[[(1, *g)]]),
        },
    ),
    Row(
        name="Qwen-Image Layered",
        size="640x640, 4 layers",
        kind="QwenImageTransformer2DModel",
        config={"use_layer3d_rope": True, "use_additional_t_cond": True},
        grid=(5, 40, 40),
        call=lambda g: {
            "hidden_states": _empty(1, num_tokens_of(g) + 1600, 64),
            **_text(256, 3584, img_shapes=[[(1, *g[1:])] * (g[0] + 1)]),
            "additional_t_cond": torch.zeros(1, dtype=torch.long),
        },
    ),
    _sd3("Stable Diffusion 3 medium", 24),
    _sd3("Stable Diffusion 3.5 large", 38, qk_norm="rms_norm"),
    Row(
        name="Z-Image",
        size="1024x1024",
        kind="ZImageTransformer2DModel",
        config={},
        grid=(64, 64),
        call=lambda g: {
            "hidden_states": _empty(1, 16, 2 * g[0], 2 * g[1]),
            "timestep": _empty(1),
            "cap_feats": [_empty(128, 2560)],
        },
    ),
    Row(
        name="AuraFlow",
        size="1024x1024",
        kind="AuraFlowTransformer2DModel",
        config={"pos_embed_max_size": 4096},
        grid=(64, 64),
        call=lambda g: {"hidden_states": _empty(1, 4, 2 * g[0], 2 * g[1]), **_text(256, 2048)},
    ),
    Row(
        name="HunyuanImage-2.1",
        size="2048x2048",
        kind="HunyuanImageTransformer2DModel",
        config={"patch_size": (1, 1), "text_embed_2_dim": 1472},
        grid=(64, 64),
        call=lambda g: {
            "hidden_states": _empty(1, 64, *g),
            **_text(1000, 3584, encoder_hidden_states_2=_empty(1, 128, 1472)),
        },
    ),
    Row(
        name="Lumina Image 2.0",
        size="1024x1024",
        kind="Lumina2Transformer2DModel",
        config={"cap_feat_dim": 2304},
        grid=(64, 64),
        call=lambda g: {"hidden_states": _empty(1, 16, 2 * g[0], 2 * g[1]), **_text(256, 2304)},
        steps=30,
    ),
    _mochi(19, (4, 30, 53)),
    _mochi(163, (28, 30, 53)),
    Row(
        name="HiDream-I1",
        size="1024x1024",
        kind="HiDreamImageTransformer2DModel",
        config={"patch_size": 2, "in_channels": 16, "caption_channels": (4096, 4096), "llama_layers": range(48)},
        grid=(64, 64),
        call=lambda g: {
            "hidden_states": _empty(1, 16, 2 * g[0], 2 * g[1]),
            "timestep": _empty(1),
            "encoder_hidden_states_t5": _empty(1, 128, 4096),
            "encoder_hidden_states_llama3": _empty(32, 1, 128, 4096),
        },
    ),
)
