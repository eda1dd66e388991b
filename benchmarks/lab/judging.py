"""Rows for the pictures of variants, with the fields of `jitaccel eval`, so that its table and plots show them too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jitaccel.evaluation.quality import metrics
from jitaccel.evaluation.quality.rows import Row
from jitaccel.evaluation.scenes.judge import Judge, compare

from .sampler import GRID, PATCH, Bench, Sampled

_AREA = 4  # tokens along a side of the areas whose means are the layout


def judged(
    bench: Bench, judge: Judge, made: Sampled, reference: Sampled, shared: Mapping[str, Any], *, first: int = 0
) -> Iterator[Row]:
    """Yields a row for each picture, with the fields `shared`; `first` is the index of the first prompt."""
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
            **_latent_errors(made, reference, k),
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


def _latent_errors(made: Sampled, reference: Sampled, k: int) -> Row:
    """Returns the distance of a picture's latents from the reference's, relative to the reference's mean square.

    `latent_mse` is the mean squared error, and `layout_mse` its part in the means of areas of 4x4 tokens.
    """
    if made.latents is None or reference.latents is None:
        return {}
    own, other = made.latents[k], reference.latents[k]
    power = float((other**2).mean())
    return {
        "latent_mse": float(((own - other) ** 2).mean()) / power,
        "layout_mse": float((_layout(own - other) ** 2).mean()) / power,
    }


def _layout(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the mean of each channel over each area, from tokens (N, D) with 2x2 latents per channel."""
    height, width = (side // _AREA for side in GRID)
    areas = tokens.reshape(height, _AREA, width, _AREA, -1, PATCH**2)
    return np.asarray(areas.mean(axis=(1, 3, 5)))
