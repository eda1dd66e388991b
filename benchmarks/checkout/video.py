"""Measures whether saved operations save time, on a random transformer of Wan's shape in its pipeline.

`speedup_over_operations` is the measured speed-up divided by the ratio of operations. `outside_share` is the method's
share of time outside the network. `over_by_hand` is the time of a sparse forward in the pipeline with its hooks,
divided by the time of calling the same layers on the same tokens directly.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import jitaccel
from jitaccel.generation.stats import Stats
from jitaccel.generation.stopwatch import wait_for
from jitaccel.method.grid import name_of, num_tokens_of

from ..registry import Case, Measurement, Options, percentiles

_PRESETS = ("7x", "7x-paper")
_TEXT, _STEPS = 64, 50


def _pipeline(width: int, layers: int, options: Options) -> Any:
    from tests.support.every_model import wan_transformer
    from tests.support.video import wan_pipeline

    pipe = wan_pipeline()
    model = wan_transformer(
        options.seed,
        num_attention_heads=width // 128,
        attention_head_dim=128,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=1024,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)  # the fixture's weights are scaled for narrow layers
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    pipe.transformer = model.to(options.device, dtype)
    return pipe


@torch.no_grad()
def measure(
    options: Options, width: int, layers: int, grid: tuple[int, ...], timed_steps: int
) -> Iterator[Measurement]:
    """Yields a row for each preset; its generations alternate with dense ones and with forwards by hand."""
    from tests.support.video import wan_on_tokens

    pipe = _pipeline(width, layers, options)
    dtype, tokens = pipe.transformer.dtype, num_tokens_of(grid)
    generator = torch.Generator().manual_seed(options.seed)
    text = torch.randn(1, _TEXT, 16, generator=generator).to(options.device, dtype)

    def generate(steps: int) -> None:
        pipe(
            prompt_embeds=text,
            guidance_scale=1.0,
            num_frames=4 * (grid[0] - 1) + 1,
            height=16 * grid[1],
            width=16 * grid[2],
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="latent",
        )

    def by_hand(anchors: torch.Tensor) -> Callable[[], object]:
        shown = torch.randn(1, len(anchors), 16, generator=generator).to(options.device, dtype)
        time_ = torch.tensor([500.0], device=options.device)
        return functools.partial(wan_on_tokens, pipe.transformer, shown, anchors, grid, time_, text)

    for preset in _PRESETS:
        dense, sparse, hand, hooks, outside = [], [], [], [], []
        stats: Stats | None = None
        for turn in range(1 + options.repeat):  # the first warms up
            dense_s = _seconds(functools.partial(generate, timed_steps), options)
            with jitaccel.apply(pipe, preset) as handle:
                steps = handle.config.steps
                assert isinstance(steps, int)
                sparse_s = _seconds(functools.partial(generate, steps), options)
                stats = handle.stats()
            hand_s = None
            if stats.shown(0) == "subset":
                hand_s = _seconds(by_hand(stats.anchors[0][0]), options)
            if turn == 0:
                continue
            dense.append(dense_s * _STEPS / timed_steps)
            sparse.append(sparse_s)
            outside.append(stats.outside_s / (stats.outside_s + stats.network_s))
            if hand_s is not None:
                first = [step for step in stats.steps if step.stage == 0]
                hooks.append(sum(step.network_s / step.calls for step in first) / len(first))
                hand.append(hand_s)
        assert stats is not None
        yield _row(preset, stats, (width, layers, grid, tokens), (dense, sparse, outside, hooks, hand), options)


def _seconds(run: Callable[[], object], options: Options) -> float:
    wait_for(options.device)
    start = time.perf_counter()
    run()
    wait_for(options.device)
    return time.perf_counter() - start


def _row(
    preset: str,
    stats: Stats,
    shape: tuple[int, int, tuple[int, ...], int],
    times: tuple[list[float], list[float], list[float], list[float], list[float]],
    options: Options,
) -> Measurement:
    width, layers, grid, tokens = shape
    (median, low, high), dense = percentiles(times[1]), percentiles(times[0])[0]
    operations, outside = _STEPS / stats.dense_steps, percentiles(times[2])[0]
    over = percentiles(times[3])[0] / percentiles(times[4])[0] if times[4] else None
    fields: dict[str, Any] = {
        "method": preset,
        "way": "diffusers WanPipeline, random transformer",
        "steps": stats.config.steps,
        "width": width,
        "layers": layers,
        "grid": grid,
        "tokens": tokens,
        "text_tokens": _TEXT,
        "seed": options.seed,
        "repeats": options.repeat,
        "denoise_median_s": round(median, 5),
        "denoise_p20_s": round(low, 5),
        "denoise_p80_s": round(high, 5),
        "dense_50_s": round(dense, 5),
        "speedup_to_dense": round(dense / median, 3),
        "speedup_of_operations": round(operations, 3),
        "speedup_over_operations": round(dense / median / operations, 4),
        "outside_share": round(outside, 5),
        "over_by_hand": None if over is None else round(over, 4),
    }
    by_hand = "" if over is None else f"  a sparse forward {over:.3f} of one by hand"
    line = (
        f"Wan's shape, {name_of(grid)}, {preset:9}{median:8.3f} s ({low:.3f} to {high:.3f})  dense 50 {dense:8.3f} s  "
        f"{dense / median:5.2f}x = {dense / median / operations:.3f} of the operations' {operations:.2f}x  "
        f"outside the network {outside:.2%}{by_hand}"
    )
    return Measurement(line=line, fields=fields)


CASES: tuple[Case, ...] = (
    Case(
        group="codebases",
        size="video",
        name="random transformer of Wan's shape, width 512 and 3 blocks, 4x16x16 tokens",
        run=functools.partial(measure, width=512, layers=3, grid=(4, 16, 16), timed_steps=3),
        why_not=lambda options: None,
    ),
    Case(
        group="codebases",
        size="video-480p",
        name="random transformer of Wan 1.3B's shape, 21x30x52 tokens",
        run=functools.partial(measure, width=1536, layers=30, grid=(21, 30, 52), timed_steps=2),
        why_not=lambda options: None if options.device.type == "cuda" else "it needs a CUDA device",
        is_long=True,
    ),
)
