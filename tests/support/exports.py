"""Tiny and short exports, which are traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import jitaccel
from tests.support import tiny
from tests.support.tiny import GRID, SHORT, TEXT_TOKENS, generate

SIZE = (GRID[0] * tiny.PIXELS_PER_TOKEN, GRID[1] * tiny.PIXELS_PER_TOKEN)
TWO_STAGES = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
GUIDED: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 3.0}


def export(pipe: Any, folder: Path, preset: Any = SHORT, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"size": SIZE, "format": "torchscript", "text_tokens": TEXT_TOKENS}
    return jitaccel.export(pipe, folder, preset, **{**defaults, **settings})


def eager(pipe: Any, config: Any = SHORT, **call: Any) -> torch.Tensor:
    with jitaccel.apply(pipe, config):
        return generate(pipe, **call)


def stop(*_: Any) -> dict[str, Any]:
    raise RuntimeError("stop")
