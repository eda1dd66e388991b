"""Reproducible targets of every registered patch, and their expected pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig, patches
from tests.support import comfy_stand_in as comfy
from tests.support.patched import CASES
from tests.support.tiny import DENSE, SHORT

CONFIGS = {
    "short": SHORT,
    "dpm": SHORT.replace(solver="dpmpp_2m", micro_flow="none"),
    "pooled": JiTConfig(densities=(0.25, 1.0), boundaries=(0.5, 1.0), steps=5, pooling=(2, 1), schedule="beta"),
}
assert DENSE not in CONFIGS.values()


@contextmanager
def registered() -> Iterator[None]:
    """Makes the stand-in of ComfyUI importable, and removes what a case registers at the end."""
    with pytest.MonkeyPatch.context() as patch:
        comfy.install(patch)
        patch.setattr(patches, "_REGISTERED", [])
        yield


@functools.cache
def expected(kind: str, config: str | None, seed: int) -> Tensor:
    """Returns the picture of a new target, patched with a configuration or unpatched."""
    case = CASES[kind]
    target = case.make()
    if config is None:
        return case.generate(target, seed).clone()
    with jitaccel.apply(target, CONFIGS[config]):
        return case.generate(target, seed).clone()
