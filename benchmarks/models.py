"""Writes docs/models.md, which lists the supported models and the cost of the presets on each in operations.

`python -m benchmarks.models` writes the page, and a test compares it. Torch counts the operations on tensors without
data, at the full size of each model, from the configuration of its checkpoint. They are quadratic in the number of
tokens, so three counts are enough for every preset. No time is measured here, and no weights are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from jitaccel.method.grid import name_of, num_tokens_of
from jitaccel.method.presets import DENSE_STEPS, PRESETS
from jitaccel.patches.cutting import Cut, places_of
from jitaccel.patches.flux.kinds import KINDS, PIPELINES, Kind
from jitaccel.patches.models import MODELS
from jitaccel.patches.models.model import Model
from jitaccel.patches.models.refused import REFUSED
from jitaccel.speed.cost import loop_seconds

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
_FAMILIES = {  # the common name of each transformer, and what it generates
    "FluxTransformer2DModel": ("FLUX.1", "images"),
    "Flux2Transformer2DModel": ("FLUX.2", "images"),
    "ChromaTransformer2DModel": ("Chroma", "images"),
    "WanTransformer3DModel": ("Wan 2.1, 2.2", "video"),
    "WanVACETransformer3DModel": ("Wan VACE", "video"),
    "QwenImageTransformer2DModel": ("Qwen-Image", "images"),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideo", "video"),
    "HunyuanVideo15Transformer3DModel": ("HunyuanVideo-1.5", "video"),
    "HunyuanImageTransformer2DModel": ("HunyuanImage-2.1", "images"),
    "SD3Transformer2DModel": ("Stable Diffusion 3, 3.5", "images"),
    "ZImageTransformer2DModel": ("Z-Image", "images"),
    "AuraFlowTransformer2DModel": ("AuraFlow", "images"),
    "LTXVideoTransformer3DModel": ("LTX-Video", "video"),
    "LTX2VideoTransformer3DModel": ("LTX-2", "video with audio"),
    "Lumina2Transformer2DModel": ("Lumina Image 2.0", "images"),
    "MochiTransformer3DModel": ("Mochi", "video"),
    "BriaTransformer2DModel": ("Bria 3", "images"),
    "BriaFiboTransformer2DModel": ("Bria FIBO", "images"),
    "HiDreamImageTransformer2DModel": ("HiDream-I1", "images"),
}
_PRESETS = tuple(name for name, config in PRESETS.items() if config.num_stages > 1)
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


@dataclass(frozen=True)
class Counted:
    """Operations of one forward: the total by number of tokens, and those of attention in a dense forward."""

    of: Callable[[int], float]
    attention: float
    text_tokens: int


@functools.cache
def counted(row: Row) -> Counted:
    """Returns the operations of one forward of a row; a multiply-add counts as two."""
    num_tokens = num_tokens_of(row.grid)
    with torch.device("meta"), torch.no_grad():
        module = getattr(diffusers, row.kind)(**row.config).eval()
        call = row.call(row.grid)
        text = row.model.num_text(call)
        if row.model.cost is not None:  # it reads values, which tensors without data do not have
            formula = functools.partial(row.model.cost, module.config, text_tokens=text)
            # The part that grows with the square of the tokens; one hundredth too high for blocks without text.
            curve = (
                formula(image_tokens=2 * num_tokens) - 2 * formula(image_tokens=num_tokens) + formula(image_tokens=0)
            )
            attention = curve / 2 / num_tokens**2 * (num_tokens + text) ** 2
            return Counted(lambda tokens: float(formula(image_tokens=tokens)), attention, text)
        tokens = (num_tokens // 4, num_tokens // 2, num_tokens)
        counts = [_count(module, row.model, call, num_tokens, active) for active in tokens]
    totals = np.polyfit(np.array(tokens) / num_tokens, [total for total, _ in counts], 2)
    return Counted(lambda active: float(np.polyval(totals, active / num_tokens)), counts[-1][1], text)


def _count(module: Any, model: Model, call: Shapes, num_tokens: int, active: int) -> tuple[int, int]:
    """Returns the operations of a forward on some of its tokens, and those of attention alone."""
    cut = Cut(module, model.adapter)
    places = None if active == num_tokens else places_of(torch.arange(active)[None], num_tokens, are_shared=True)
    given = call if places is None else cut.arguments(call, places)
    try:
        with cut.at(places), FlopCounterMode(display=False) as counter:
            module(**model.words.write(given))
    finally:
        cut.remove()
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(count for kind, count in by_kind.items() if "attention" in str(kind) or "bmm" in str(kind))
    return int(counter.get_total_flops()), int(attention)


def dense_steps(row: Row, preset: str) -> float:
    """Returns the cost of a preset on a row in dense steps of the same model, by operations."""
    tokens, of = num_tokens_of(row.grid), counted(row).of
    return loop_seconds(PRESETS[preset], tokens, of) / of(tokens)


def size_line(row: Row) -> str:
    """Returns a row of the first table."""
    cost, tokens = counted(row), num_tokens_of(row.grid)
    dense = cost.of(tokens)
    return (
        f"| {row.name} | {row.size} | {name_of(row.grid)} = {tokens:,} | {cost.text_tokens:,} | {dense / 1e12:,.0f} | "
        f"{cost.attention / dense:.0%} | {row.steps} |"
    )


def cost_line(row: Row) -> str:
    """Returns a row of the second table."""
    costs = [dense_steps(row, name) for name in _PRESETS]
    default = costs[_PRESETS.index("7x")]
    each = " | ".join(f"{cost:.2f}" for cost in costs)
    return f"| {row.name}, {row.size} | {each} | {DENSE_STEPS / default:.1f} | {row.steps / default:.1f} |"


def model_line(model: Model) -> str:
    """Returns a row of the first table, for a cut model."""
    levels = {"native": "the sampler's own", "beta": "the preset's"}[model.schedule]
    guidance = {"calls": "a call each", "batch": "one batch"}[model.branches]
    compiled = "nothing" if model.uncompiled else "its blocks" if model.blocks else "whole stages"
    return _model_row(model.name, model.pipelines, levels, guidance, compiled)


def flux_line(kind: Kind) -> str:
    """Returns a row of the first table, for FLUX and related models."""
    compiled = "whole stages" if kind.packs else "nothing"
    return _model_row(kind.model, PIPELINES[kind.model], "the preset's", "a call each", compiled)


def _model_row(name: str, pipelines: Sequence[str], levels: str, guidance: str, compiled: str) -> str:
    family, makes = _FAMILIES[name]
    listed = ", ".join(f"`{pipeline}`" for pipeline in pipelines)
    return f"| {family} | {makes} | `{name}` | {listed} | {levels} | {guidance} | {compiled} | none yet |"


def _table(head: str, lines: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *lines])


def page() -> str:
    """Returns the whole page."""
    sizes = _table(
        "| model | default size | tokens | text tokens | TFLOP per dense step | attention | steps |",
        [size_line(row) for row in ROWS],
    )
    costs = _table(
        f"| model | {' | '.join(_PRESETS)} | {DENSE_STEPS} dense steps / 7x | default steps / 7x |",
        [cost_line(row) for row in ROWS],
    )
    models = _table(
        "| model | makes | transformer | pipelines | levels of presets | branches of guidance | "
        "`compile=True` compiles | real weights |",
        [*map(flux_line, KINDS), *map(model_line, MODELS)],
    )
    refused = _table("| transformer | reason |", [f"| `{name}` | {reason} |" for name, reason in REFUSED.items()])
    return _TEXT.format(sizes=sizes, costs=costs, models=models, refused=refused)


_TEXT = """<!-- Written by `python -m benchmarks.models`; edit benchmarks/models.py. -->

# Models

One row for each transformer of diffusers that `jitaccel.apply` takes. Black Forest Labs' own code and ComfyUI are in
[codebases](codebases.md), with what was verified for each pipeline. jitaccel runs each model's own forward on a part
of its tokens; FLUX.1 also packs the images of a batch into one forward. [Adding a model](adding-a-model.md) takes one
entry of data and a test run.

No model has been tested with its released weights: the tests use tiny random ones. On these a dense run equals the
unpatched pipeline bit for bit, and a sparse run gives the method's result. FLUX.1 has also run as the embedded model
(9.1 million parameters). Quality and time on the large models are not measured.

{models}

Guidance that uses statistics of whole pictures (`guidance_rescale`, `cfg_normalization`, the APG guiders) works too:
each branch is lifted to all tokens before the pipeline combines them.

`jitaccel.Auto(speedup=8)` times the pipeline's first call of its transformer, and plans from it. It works for
pipelines that start from noise. Pipelines with a `strength`, and bare transformers other than FLUX, are refused with
an error. `export` works for FLUX only; other models raise an error.

Pipelines with UniPC or DPM-Solver++ keep the noise levels of their scheduler. By default jitaccel takes the steps
itself. With `solver="caller"` the scheduler takes them, and starts again for newly activated tokens (orders 1 and 2).

## Size

Operations of one forward, for one picture or video and one branch of guidance. They are counted, not measured; a
multiply-add counts as two. Bria is left out, because the configurations of its checkpoints were not available.

{sizes}

## What presets cost

Cost in dense steps of the same model, by the operations of the network. The last two columns divide the operations of
50 dense steps, and of the pipeline's default number of steps, by those of `7x`. Actual speed-ups are lower, because
other parts than the network take time too.

{costs}

## Not supported

{refused}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
