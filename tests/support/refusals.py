"""Checks of refusals, and calls of a bare transformer to be refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS
from tests.support import tiny
from tests.support.tiny import forwards

LEVELS = jitaccel.noise_levels(PRESETS["7x-paper"])


@contextmanager
def refused(kind: type[Exception], *words: str, model: Any = None) -> Iterator[None]:
    """Checks that the block raises `kind` with all the words in its message, and that `model` does not run."""
    with forwards(model) if model is not None else _nothing() as seen, pytest.raises(kind) as raised:
        yield
    message = str(raised.value)
    assert not [word for word in words if word not in message], message
    assert not seen


@contextmanager
def _nothing() -> Iterator[list[list[int]]]:
    yield []


def call(model: Any, state: Tensor | None = None, level: float = 1.0, **arguments: Any) -> Tensor:
    """Calls a bare transformer like a plain sampler."""
    state = tiny.start() if state is None else state
    settings = {
        "hidden_states": state,
        "encoder_hidden_states": torch.zeros(state.shape[0], tiny.TEXT_TOKENS, tiny.WIDTH),
        "pooled_projections": torch.zeros(state.shape[0], tiny.WIDTH),
        "timestep": torch.full([state.shape[0]], level),
        "img_ids": tiny.ids(),
        "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 3),
        "guidance": torch.full([state.shape[0]], 3.5),
    }
    with torch.no_grad():
        velocity: Tensor = model(**{**settings, **arguments}, return_dict=False)[0]
    return velocity


def euler(model: Any, levels: tuple[float, ...]) -> Tensor:
    state = tiny.start()
    for level, next_level in pairwise(levels):
        state = state + (next_level - level) * call(model, state, level)
    return state
