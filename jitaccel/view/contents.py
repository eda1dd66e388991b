"""The content of a report as numbers and words, for its page and its JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..method.grid import name_of, num_tokens_of
from .playback import Playback

if TYPE_CHECKING:
    from ..generation.stats import Stats, StepStats


def contents_of(playback: Playback, uris: Sequence[str]) -> dict[str, Any]:
    """Returns the data of one generation that the page's script reads.

    Args:
        playback: The generation.
        uris: For each step in turn the noisy and the clean picture, and at the end the finished one.
    """
    stats = playback.stats
    costs = costs_of(stats, [moment.stats for moment in playback.moments])
    steps = [
        {**_step_of(moment.stats), "cost": round(cost, 4), "noisy": uris[2 * k], "clean": uris[2 * k + 1]}
        for k, (moment, cost) in enumerate(zip(playback.moments, costs, strict=True))
    ]
    return {
        "name": playback.name,
        "grid": stats.grid,
        "frames": len(playback.final),
        "size": playback.final.shape[1:3],
        "steps": steps,
        "stages": [_stage_of(stats, stage, playback.image) for stage in range(len(stats.anchors))],
        "final": uris[-1],
        "cost": round(costs[-1], 4) if costs else 0.0,
    }


def costs_of(stats: Stats, steps: Sequence[StepStats]) -> list[float]:
    """Returns the cumulative cost after each step, in dense steps of one branch."""
    return [flops / max(1, stats.dense_step_flops) for flops in accumulate(step.flops for step in steps)]


def _step_of(step: StepStats) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "level": round(step.noise_level, 6),
        "next": round(step.next_level, 6),
        "tokens": step.tokens,
        "ms": round(1000.0 * (step.network_s + step.outside_s), 2),
    }


def _stage_of(stats: Stats, stage: int, image: int) -> dict[str, Any]:
    """Returns how a stage showed the picture; `ran` is a bit per token, in raster order, only for a subset."""
    kind, _, factor = stats.shown(stage).partition(" ")
    anchors = stats.anchors[stage][image].cpu().numpy()
    known: dict[str, Any] = {"kind": kind, "factor": int(factor or 1), "tokens": len(anchors)}
    if kind == "subset":
        ran = np.zeros(num_tokens_of(stats.grid), bool)
        ran[anchors] = True
        known["ran"] = base64.b64encode(np.packbits(ran, bitorder="little").tobytes()).decode()
    return known


def described(kind: str, factor: int = 1) -> str:
    """Returns in words how a stage shows the picture."""
    if kind == "pooled":
        size = {2: "half", 4: "a quarter of"}.get(factor)
        return f"a picture of {size} the size" if size else f"a picture {factor} times smaller"
    return {"dense": "every token", "subset": "some of the tokens"}[kind]


def facts_of(stats: Stats) -> list[tuple[str, str]]:
    """Returns the facts of a whole generation as (name, value) pairs."""
    if not stats.steps:
        return [("codebase", stats.codebase), ("generations", str(stats.generations))]
    execution = stats.execution + (f" with {stats.attention}" if stats.attention else "")
    facts = [
        ("codebase", stats.codebase),
        ("execution", execution),
        ("tokens", f"{num_tokens_of(stats.grid)} ({name_of(stats.grid)})"),
        ("steps", str(len(stats.steps))),
        ("cost", f"{stats.dense_steps:.2f} dense steps"),
        ("time", f"{stats.network_s + stats.outside_s:.2f} s"),
    ]
    return [*facts, ("batch", str(stats.batch))] if stats.batch > 1 else facts
