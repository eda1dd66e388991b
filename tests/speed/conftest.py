"""Fixtures for tests of speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.timing import Clock


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Clock]:
    """Replaces the clock of measurements by one that a transformer's forwards move."""

    def make(model: Any) -> Clock:
        clock = Clock()
        clock.follow(model)
        monkeypatch.setattr("jitaccel.speed.cost.perf_counter", clock)
        return clock

    return make
