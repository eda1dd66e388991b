"""Compares rows of this run with those of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMES = ("denoise_median_s", "median_s", "median_ms")
_WHAT = ("benchmark", "case", "method", "operator", "way", "what", "mix", "batch", "grid", "grids", "channels")
_HOW = ("pixels", "density", "text_tokens", "steps", "timed_steps", "dtype", "seed", "device", "threads")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines. Raises ValueError if it is missing or holds something else."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--compare must be a file of JSON lines that --json wrote, got {path} ({error})") from error
    # Neither a failed case nor the closing row of a case has a time.
    rows = [row for row in rows if not (isinstance(row, dict) and ("error" in row or row.get("is_closing")))]
    if not rows or not all(isinstance(row, dict) and _time(row) is not None for row in rows):
        raise ValueError(f"--compare must hold rows with one of {', '.join(TIMES)}, got {path} without")
    return rows


def ratio_to(row: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns this row's time divided by that of the last earlier row with the same identity; None without one."""
    known = [other for other in earlier if identity(other) == identity(row)]
    now, before = _time(row), _time(known[-1]) if known else None
    return None if now is None or not before else now / before


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what a row measured and how. Rows can be compared if this is equal."""
    return tuple(json.dumps(row.get(name), sort_keys=True) for name in (*_WHAT, *_HOW))


def _time(row: Mapping[str, Any]) -> float | None:
    found: Iterator[float] = (float(row[name]) for name in TIMES if row.get(name) is not None)
    return next(found, None)
