"""Recorded generations of tiny pipelines for reports, and the data in a report's page."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import torch

import jitaccel
from jitaccel import JiTConfig
from jitaccel.view import Playback
from tests.support import tiny
from tests.support.tiny import SHORT

POOLED = JiTConfig(densities=(0.25, 1.0), boundaries=(0.5, 1.0), steps=4, pooling=(2, 1))
DENSE = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=6)
CONFIGS = {"dense": DENSE, "subset": SHORT, "pooled": POOLED}
PROMPT = "a red circle"


def recorded(config: JiTConfig | str, image: int = 0, seed: int = 0, **call: Any) -> tuple[Any, Any]:
    """Returns the handle of a recorded generation of a tiny FluxPipeline, which it keeps alive, and the latents."""
    pipe = tiny.pipeline()
    handle = jitaccel.apply(pipe, config).record(image)
    latents = tiny.generate(pipe, seed, **call)
    return _Kept(handle, pipe), latents


class _Kept:
    """A handle together with its pipeline, which the handle itself does not keep alive."""

    def __init__(self, handle: Any, pipe: Any) -> None:
        self._handle, self.pipe = handle, pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


@functools.cache
def playback(name: str) -> Playback:
    """Returns one of the generations of `CONFIGS`."""
    handle, _ = recorded(CONFIGS[name])
    found: Playback = handle.playback(name, prompt=PROMPT, progress=False)
    return found


def data_of(page: str) -> Any:
    """Returns the data that the script of a report's page reads."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def video_playback() -> Playback:
    """Returns a generation of a tiny Wan without an autoencoder."""
    from tests.support import video

    pipe = video.wan_pipeline(video.euler())
    with jitaccel.apply(pipe, SHORT.replace(schedule="native")) as handle:
        handle.record()
        with torch.no_grad():
            video.generate(pipe)
        found: Playback = handle.playback("video", progress=False)
    return found
