"""Times spans of work on a device without making the host wait for it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds of named spans; on CUDA through events, read only when asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[Hashable, list[tuple[Any, Any]]] = {}

    @contextmanager
    def span(self, key: Hashable) -> Iterator[None]:
        """Times the block it wraps under `key`; a block that raises counts too."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.setdefault(key, []).append((start, self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, key: Hashable) -> float:
        """Returns the seconds spent under `key`; on CUDA waits for the device."""
        return sum(_seconds_between(start, end) for start, end in self._spans.get(key, ()))


def _seconds_between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000.0
