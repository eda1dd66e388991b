"""Logs a training run: one JSON line every few updates, and a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import tqdm


class TrainingLog:
    """Averages values over `every` updates, and appends them with the training seconds to a JSON lines file."""

    def __init__(self, path: Path, every: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._every = path, every
        self._start = time.monotonic() - _seconds_so_far(path)
        self._sums: dict[str, float] = {}
        self._count = self._updates = 0
        self._bar = tqdm.tqdm(desc=path.stem, unit="update")

    def add(self, update: int, **values: float) -> None:
        """Adds the values of an update, counted from 0."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._updates = update + 1
        self._bar.update()
        if self._updates % self._every == 0:
            self._write()

    def _write(self) -> None:
        means = {name: round(total / self._count, 5) for name, total in self._sums.items()}
        row = {"updates": self._updates, "seconds": round(time.monotonic() - self._start, 1), **means}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._bar.set_postfix(means)
        self._sums, self._count = {}, 0

    def close(self) -> None:
        """Writes the values added since the last row."""
        if self._count:
            self._write()
        self._bar.close()


def _seconds_so_far(path: Path) -> float:
    """Returns the seconds of earlier runs if this run resumes, otherwise 0."""
    lines = path.read_text().splitlines() if path.exists() else []
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def warmup_cosine(warmup: int, updates: int, floor: float = 0.02) -> Callable[[int], float]:
    """Returns the learning-rate factor by update: linear warm-up, then a cosine down to `floor`."""

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        done = min(1.0, (update - warmup) / max(1, updates - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
