"""Makes the tables of docs/exact-lab.md from rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]
BENCHMARK = "exact"


def tables(rows: Sequence[Fields]) -> str:
    """Returns a Markdown table for each question, with the origin of its numbers."""
    found = [row for row in rows if row["benchmark"] == BENCHMARK]
    parts = []
    for case in dict.fromkeys(row["case"] for row in found):
        of = [row for row in found if row["case"] == case]
        origin = "; ".join(dict.fromkeys(f"{row['date']}, {row['commit']}" for row in of))
        kinds = dict.fromkeys(map(_kind, of))
        text = "\n".join(_table([row for row in of if _kind(row) == kind]) for kind in kinds)
        parts.append(f"**{case}** ({origin})\n\n{text}")
    return "\n".join(parts)


def _kind(row: Fields) -> tuple[tuple[int, ...], tuple[str, ...]]:
    return tuple(row["grid"]), tuple(row.get("relative_mse", ()))


def _table(rows: Sequence[Fields]) -> str:
    (grid, spectra), *_ = map(_kind, rows)
    if not spectra:
        return _activation_table(rows)
    extras = [name for name in _EXTRAS if any(name in row for row in rows)]
    head = [f"{'x'.join(map(str, grid))} tokens", "levels", "solver", "cost", "by tokens"]
    kinds = {"relative_mse": "error", "wasserstein_2": "W2"}
    shown = [name for name in kinds if any(name in row for row in rows)]
    head += [f"{kinds[name]} {spectrum}" for name in shown for spectrum in spectra]
    head += [_EXTRAS[name] for name in extras]
    lines = [head, ["---"] * len(head), *(_line(row, shown, spectra, extras) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _activation_table(rows: Sequence[Fields]) -> str:
    grid, pictures = rows[0]["grid"], rows[0]["pictures"]
    lines = [
        [f"{'x'.join(map(str, grid))} tokens, {pictures} pictures", "activated by", "error", "more than random, %"],
        ["---"] * 4,
    ]
    for row in rows:
        more, error = 100 * row["more_than_random"], 100 * row["standard_error"]
        shown = "" if row["activated_by"] == "random" else f"{more:+.1f} (standard error {error:.1f})"
        lines.append([row["plan"], row["activated_by"], _short(row["relative_mse_of_mixture"]), shown])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_EXTRAS = {
    "standard_error": "standard error",
    "relative_mse_levels_alone": "error, levels for each alone",
    "ratio_to_dense": "over dense of its cost",
    "pooled_off_by": "half size off by",
    "worst_ratio_to_dense": "worst over dense of its cost",
    "target": "preset",
    "limit_share": "over its target",
    "error_of_first_frame": "error of the first frame",
    "error_of_last_frame": "of the last",
    "variant": "variant",
}
_SOLVERS = {"euler": "Euler", "dpmpp_2m": "2M", "dpmpp_2m_across": "2M across"}


def _line(row: Fields, distances: Sequence[str], spectra: Sequence[str], extras: Iterable[str]) -> list[str]:
    parameters = ", ".join(f"{each:g}" for each in row["level_parameters"])
    cells = [row["plan"], f"{row['levels']} {parameters}".strip(), _SOLVERS[row["solver"]]]
    cells += [f"{row['cost_dense_steps']:.2f}", f"{row['cost_dense_steps_by_tokens']:.2f}"]
    cells += [_short(row[name][spectrum]) if name in row else "" for name in distances for spectrum in spectra]
    return cells + [_extra(row.get(name)) for name in extras]


def _extra(value: object) -> str:
    if isinstance(value, Mapping):
        return " / ".join(_short(each) for each in value.values())
    return "" if value is None else str(value)


def _short(value: float) -> str:
    """Returns a number with at least two digits, never in scientific notation."""
    if value >= 1.0:
        return f"{value:.2f}"
    return f"{value:.{max(2, 1 - math.floor(math.log10(value)))}f}" if value > 0.0 else "0"
