"""Writes docs/models.md, which lists the supported models and the cost of the presets on each in operations.

`python -m benchmarks.models` writes the page, and a test compares it. Torch counts the operations on tensors without
data, at the full size of each model, from the configuration of its checkpoint. They are quadratic in the number of
tokens, so three counts are enough for every preset. No time is measured here, and no weights are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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

from .model_rows import ROWS, Row, Shapes

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
