"""The tables of docs/models.md, made of what patches/ says of each model; no rows are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jitaccel.patches.flux.kinds import PIPELINES
from jitaccel.patches.models import MODELS
from jitaccel.patches.models.refused import REFUSED

_FAMILIES = {
    "FluxTransformer2DModel": ("FLUX.1", "image", "packed"),
    "Flux2Transformer2DModel": ("FLUX.2", "image", "indexed"),
    "ChromaTransformer2DModel": ("Chroma", "image", "indexed"),
    "WanTransformer3DModel": ("Wan 2.1, 2.2", "video", "indexed"),
    "WanVACETransformer3DModel": ("Wan VACE", "video", "indexed"),
    "QwenImageTransformer2DModel": ("Qwen-Image", "image", "indexed"),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideo", "video", "indexed"),
    "HunyuanVideo15Transformer3DModel": ("HunyuanVideo 1.5", "video", "indexed"),
    "SD3Transformer2DModel": ("Stable Diffusion 3, 3.5", "image", "indexed"),
    "LTXVideoTransformer3DModel": ("LTX-Video", "video", "indexed"),
}


def models(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each transformer that can be accelerated. A transformer without a name for people has its class's."""
    pipelines = {**PIPELINES, **{model.name: model.pipelines for model in MODELS}}
    lines = [["model", "makes", "transformer of diffusers", "pipelines", "runs", "real weights"], ["---"] * 6]
    for name, known in pipelines.items():
        family, kind, execution = _FAMILIES.get(name, (name, "", "indexed"))
        listed = ", ".join(f"`{pipeline}`" for pipeline in known)
        lines.append([family, kind, f"`{name}`", listed, execution, "none yet"])
    return _lines(lines)


def refused(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each transformer that is refused by name."""
    return _lines([["transformer", "reason"], ["---"] * 2, *([f"`{name}`", why] for name, why in REFUSED.items())])


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
