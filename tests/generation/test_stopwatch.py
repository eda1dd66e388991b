"""Times of spans: the host's clock on the CPU, events on other devices, and no numbers that were not measured."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jitaccel.generation.stopwatch import Stopwatch, wait_for

ACCELERATORS = ("cuda", "mps", "xpu")


class Event:
    """A device's event that was reached as many milliseconds in as there were events before it."""

    made = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = Event.made
        Event.made += 1
        self.is_recorded = self.is_reached = False

    def record(self, *stream: Any) -> None:
        self.is_recorded = True

    def synchronize(self) -> None:
        self.is_reached = True

    def elapsed_time(self, end: Event) -> float:
        assert self.is_recorded and end.is_reached
        return float(end.at - self.at)


def test_spans_of_the_cpu_are_timed_by_the_host() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch.span("a"):
        pass
    assert 0.0 <= watch.seconds("a") < 60.0 and watch.seconds("none") == 0.0


@pytest.mark.parametrize("has_streams", [True, False], ids=["streams", "no streams"])
@pytest.mark.parametrize("kind", ACCELERATORS)
def test_spans_of_an_accelerator_are_timed_by_its_events(
    kind: str, has_streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {"current_stream": lambda device: device} if has_streams else {}
    monkeypatch.setattr(torch, kind, SimpleNamespace(Event=Event, **streams))
    watch = Stopwatch(torch.device(kind))
    for _ in range(3):
        with watch.span("a"):
            pass
    assert watch.seconds("a") == pytest.approx(0.003)


@pytest.mark.parametrize("module", [None, SimpleNamespace(), SimpleNamespace(Event=object)])
@pytest.mark.parametrize("kind", [*ACCELERATORS, "hpu"])
def test_times_that_nobody_can_measure_are_not_known(kind: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, kind, module, raising=False)
    watch = Stopwatch(torch.device(kind))
    with watch.span("a"):
        pass
    assert math.isnan(watch.seconds("a"))


@pytest.mark.parametrize(("kind", "waits"), [("cpu", False), *((kind, True) for kind in ACCELERATORS)])
def test_every_accelerator_is_waited_for(kind: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", seen.append)
    wait_for(torch.device(kind))
    assert seen == ([torch.device(kind)] if waits else [])
