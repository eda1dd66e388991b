"""Artificial rows and records of `jitaccel eval`."""

from __future__ import annotations

from typing import Any

import numpy as np

from jitaccel.evaluation.quality.labels import Box

DEFAULT = [
    "dense:50", "dense:7", "beta:6", "beta:4", "beta:3", "dense:5", "7x", "4x", "beta:5", "beta:7", "beta:11",
    "dense:4", "dense:10", "dense:14", "dense:20", "dense:28", "half", "cache",
]  # fmt: skip
COSTS = {"7x": 6.5, "4x": 10.96, "half": 13.0, "cache": 25.0}


def row(method: str, prompt: int, shown: int = 3, perceptual: float = 0.1, **fields: Any) -> dict[str, Any]:
    family, _, steps = method.partition(":")
    rng = np.random.default_rng([prompt, *method.encode()])
    config = {
        "dense": {"densities": [1.0], "schedule": "native"},
        "beta": {"densities": [1.0], "schedule": "beta"},
        "7x": {"densities": [0.3, 1.0], "schedule": "beta"},
        "4x": {"densities": [0.4, 1.0], "schedule": "beta"},
    }.get(family, {"rival": family})
    beside = {} if method == "dense:50" else {"psnr_db": float(rng.uniform(15, 30)), "perceptual": perceptual}
    return {
        "benchmark": "quality", "method": method, "steps": int(steps or 11), "config": config, "prompt_index": prompt,
        "prompt": f"prompt {prompt}", "claimed": 5, "shown": shown, **beside, "seam": None, "denoise_s": 0.5,
        "features": rng.standard_normal(4).tolist(), "gflop": 11.0 * COSTS.get(method, float(steps or 1)),
        "token_steps": 100, "seed": 3, "commit": "abc", "device": "a device", "date": f"2026-11-{prompt % 2 + 1:02d}",
        **fields,
    }  # fmt: skip


def record(method: str, kind: str, cost: float, value: float, low: float, high: float, name: str = "psnr_db") -> Any:
    quality = {name: {"value": value, "low": low, "high": high}}
    return {
        "method": method, "kind": kind, "cost_dense_steps": cost, "reference": "dense:50", "prompts": 9,
        "qualities": quality,
    }  # fmt: skip


def pixels_of(picture: Any, colour: tuple[int, int, int], box: Box) -> np.ndarray[Any, Any]:
    """Returns x and y, (n, 2), of the pixels inside a box that have exactly this colour."""
    pixels = np.asarray(picture)
    y, x = np.nonzero((pixels == colour).all(axis=2))
    inside = (x >= box.left) & (x <= box.right) & (y >= box.top) & (y <= box.bottom)
    return np.stack([x[inside], y[inside]], axis=1)


def default_rows(prompts: int = 6) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [row(name, k, int(rng.integers(0, 6)), float(rng.uniform(0, 1))) for name in DEFAULT for k in range(prompts)]
