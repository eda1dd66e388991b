"""Plots error against cost from the committed rows: `python -m benchmarks.lab.exact.picture docs/exact-lab.svg`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ...table import RESULTS, read_results
from .report import BENCHMARK

Fields = Mapping[str, Any]
Point = tuple[float, float]

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 400, 330, 58, 34, 70  # of a panel and around it, in pixels
_COSTS, _ERRORS = (3.0, 12.5), (1e-4, 1e-1)
_GREY = "#777777"


@dataclass(frozen=True)
class Line:
    """One line of the picture, in both panels.

    Attributes:
        name: Name in the legend.
        colour: SVG colour.
        is_dense: Whether it shows dense steps, which are dashed.
        case: The case whose rows it shows.
        levels: Their family of levels.
    """

    name: str
    colour: str
    is_dense: bool
    case: str
    levels: str


LINES = (
    Line("dense, Beta levels", "#1f3a93", True, "dense steps", "beta"),
    Line("dense, log-ratio levels", "#b03a2e", True, "dense steps", "log ratio"),
    Line("pooled then dense, Beta levels", "#3f7fdf", False, "pooled plans, Beta levels", "beta"),
    Line("the same, second order across stages", "#159957", False, "pooled plans, Beta levels, across", "beta"),
    Line("the same, log-ratio levels", "#e8803a", False, "pooled plans, log-ratio levels, across", "log ratio"),
)


def points(line: Line, rows: Sequence[Fields], spectrum: str) -> list[Point]:
    """Returns cost and error of a line's 2M rows; for pooled plans only the front, without those chosen by a target."""
    found = [row for row in rows if row["case"] == line.case and row["levels"] == line.levels]
    shown = [row for row in found if row["solver"] != "euler" and "target" not in row]
    return sorted((row["cost_dense_steps"], row["relative_mse"][spectrum]) for row in shown)


def picture(rows: Sequence[Fields]) -> str:
    """Returns the plot as SVG, with a panel for each spectrum of the dense steps and a legend.

    Raises:
        ValueError: If there are no rows of dense steps.
    """
    of = [row for row in rows if row["benchmark"] == BENCHMARK]
    spectra = next((list(row["relative_mse"]) for row in of if row["case"] == "dense steps"), [])
    if not spectra:
        raise ValueError(f"picture: rows must hold those of {BENCHMARK}, dense steps, got none; measure them first")
    panels = [_panel(of, spectrum, number) for number, spectrum in enumerate(spectra)]
    width = len(spectra) * (_WIDTH + _GAP) + _LEFT
    height = _TOP + _HEIGHT + 50 + 20 * len(LINES)
    legend = [_legend(line, number) for number, line in enumerate(LINES)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    return head + "".join(panels) + "".join(legend) + "</svg>\n"


def _panel(rows: Sequence[Fields], spectrum: str, number: int) -> str:
    left = _LEFT + number * (_WIDTH + _GAP)
    parts = [_text(left, _TOP - 12, f"Power k^-{spectrum}: relative mean squared error", "start")]
    parts.append(f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="{_GREY}"/>\n')
    for cost in range(math.ceil(_COSTS[0]), math.floor(_COSTS[1]) + 1):
        parts.append(_text(left + _across(cost), _TOP + _HEIGHT + 16, str(cost), "middle"))
    for power in range(round(math.log10(_ERRORS[0])), round(math.log10(_ERRORS[1])) + 1):
        y = _TOP + _down(10.0**power)
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#dddddd"/>\n')
        parts.append(_text(left - 6, y + 4, f"{10.0**power:g}", "end"))
    parts.append(_text(left + _WIDTH / 2, _TOP + _HEIGHT + 34, "cost in dense steps of FLUX.1-dev", "middle"))
    for line in LINES:
        parts.append(_drawn(line, points(line, rows, spectrum), left))
    return "".join(parts)


def _drawn(line: Line, found: Sequence[Point], left: float) -> str:
    at = [(left + _across(cost), _TOP + _down(error)) for cost, error in found if _is_inside(cost, error)]
    dashes = ' stroke-dasharray="6 4"' if line.is_dense else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.colour}"/>\n' for x, y in at)
    return f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.5"{dashes}/>\n{marks}'


def _legend(line: Line, number: int) -> str:
    y = _TOP + _HEIGHT + 54 + 20 * number
    dashes = ' stroke-dasharray="6 4"' if line.is_dense else ""
    stroke = f'<path d="M{_LEFT} {y}h36" stroke="{line.colour}" stroke-width="2"{dashes}/>\n'
    return stroke + _text(_LEFT + 46, y + 4, line.name, "start")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>\n'


def _is_inside(cost: float, error: float) -> bool:
    return _COSTS[0] <= cost <= _COSTS[1] and _ERRORS[0] <= error <= _ERRORS[1]


def _across(cost: float) -> float:
    return _WIDTH * (cost - _COSTS[0]) / (_COSTS[1] - _COSTS[0])


def _down(error: float) -> float:
    return _HEIGHT * math.log(_ERRORS[1] / error) / math.log(_ERRORS[1] / _ERRORS[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Plots committed results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="SVG to write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON lines")
    options = parser.parse_args(argv)
    try:
        options.file.write_text(picture(read_results(options.results)))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
