"""Rows of what variants made, in the fields of `jitaccel eval`, so that its table and pictures show them too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jitaccel.evaluation.quality import metrics
from jitaccel.evaluation.quality.rows import Row
from jitaccel.evaluation.scenes.judge import Judge, compare

from .sampler import Bench, Sampled


def judged(
    bench: Bench, judge: Judge, made: Sampled, reference: Sampled, shared: Mapping[str, Any], *, first: int = 0
) -> Iterator[Row]:
    """Yields a row for each picture. shared: fields of all of them. first: the index of the first prompt."""
    maps, of_reference = judge.features(made.pictures), judge.features(reference.pictures)
    for k, seen in enumerate(judge(made.pictures)):
        text, claims = bench.prompts[k]
        score = compare(seen, claims)
        picture, other = made.pictures[k] / 255.0, reference.pictures[k] / 255.0
        beside = {} if made is reference else {
            "psnr_db": metrics.psnr_db(picture, other),
            "ssim": metrics.ssim(picture, other),
            "perceptual": metrics.perceptual_distance(maps[k], of_reference[k]),
            "spectrum_db": metrics.spectrum_error_db(picture, other),
        }  # fmt: skip
        stages = made.stages[k]
        yield {
            **shared,
            "benchmark": "quality",
            "prompt_index": first + k,
            "prompt": text,
            "claimed": score.claimed.total(),
            "shown": score.shown.total(),
            **beside,
            "seam": metrics.seam_ratio(picture, stages) if stages.any() else None,
            "features": [round(float(value), 5) for value in maps[k].mean(axis=(1, 2))],
            "gflop": float(made.gflop[k]),
        }
