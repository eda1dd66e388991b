"""Times spans of work on a device without making the host wait for it."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Waits until a device has finished its work; returns at once on the CPU."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Adds up the seconds of named spans. On accelerators it uses events, which are read only on request.

    Seconds are NaN on a device whose torch module has no timed events, because the host's clock would time only the
    queueing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[Hashable, list[tuple[Any, Any]]] = {}

    @contextmanager
    def span(self, key: Hashable) -> Iterator[None]:
        """Adds the time of the wrapped block to `key`, even if the block raises."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.setdefault(key, []).append((start, self._mark()))

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        module: Any = getattr(torch, self._device.type, None)  # torch.cuda, torch.mps, torch.xpu, ...
        if not hasattr(getattr(module, "Event", None), "elapsed_time"):
            return math.nan
        event = module.Event(enable_timing=True)
        if hasattr(module, "current_stream"):
            event.record(module.current_stream(self._device))
        else:
            event.record()
        return event

    def seconds(self, key: Hashable) -> float:
        """Returns the seconds spent under `key`, NaN if unknown. On an accelerator, waits for it."""
        return sum(_seconds_between(start, end) for start, end in self._spans.get(key, ()))


def _seconds_between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000.0
