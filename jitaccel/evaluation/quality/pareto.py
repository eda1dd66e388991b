"""The Pareto picture of an evaluation: cost against each quality, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from PIL import Image

from .drawing import (
    COLOURS,
    GREY,
    INK,
    METHOD_KINDS,
    PALE,
    RADIUS,
    Pen,
    Point,
    Scale,
    darken,
    fade,
    text_width,
    wrap,
)
from .labels import Box, place_labels
from .rows import QUALITIES, Known, Quality, quality_of

Records = Sequence[Mapping[str, Any]]

_PANEL_W, _PANEL_H, _MARGIN_PX, _LEGEND_PX = 600, 420, 24, 26
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 58, 14, 34, 48  # margins of a panel around its plot
_LABEL_PX, _APART_PX = 13.0, 10.0
_NOTE = (
    "Bars: 95 % bootstrap intervals over prompts. Dashes: the reference. Methods of similar cost stand side by side."
)
_NOTE_SPARSE = "Steps: the best sparse method for a cost; a hollow one is no better than a cheaper one."


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The place of a method in a panel, in pixels. is_hollow: a cheaper sparse method is at least as good."""

    name: str
    kind: str
    cost: float
    at: Point
    low: float
    high: float
    is_hollow: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The content of one panel and its place in the picture. labels: in the order of marks. steps: the sparse front."""

    quality: Quality
    frame: Box
    x: Scale
    y: Scale
    marks: tuple[Mark, ...]
    steps: tuple[Point, ...]
    labels: tuple[Box, ...]
    reference: float | None


def pareto_picture(
    records: Records, qualities: Sequence[str] | None = None, *, known: Known = QUALITIES
) -> Image.Image:
    """Returns a panel for each quality: the quality with its interval against cost in dense steps, on a log scale.

    Args:
        records: From `summary`.
        qualities: Names; None for all that the records have.
        known: How qualities are shown, in which order, and which direction is better.

    Raises:
        ValueError: If there is nothing to draw, or if no record has a named quality.
    """
    panels = arrange(records, qualities, known)
    right, bottom = (max(panel.frame[side] for panel in panels) for side in (2, 3))
    pen = Pen(right + _RIGHT_PX + _MARGIN_PX, bottom + _BOTTOM_PX + _MARGIN_PX)
    width = right - _MARGIN_PX
    pen.text((_MARGIN_PX, 18), _title(records), 24)
    _legend(pen, {record["kind"] for record in records}, 58)
    y = 58 + _LEGEND_PX
    for line in _small_print(records, width):
        pen.text((_MARGIN_PX, y), line, 13, GREY)
        y += 18
    for panel in panels:
        _draw(pen, panel)
    return pen.picture()


def arrange(records: Records, qualities: Sequence[str] | None = None, known: Known = QUALITIES) -> list[Panel]:
    """Returns the panels of the picture, with the places of all marks and labels."""
    held = list(dict.fromkeys(name for record in records for name in record["qualities"]))
    names = [name for name in known if name in held] + [name for name in held if name not in known]
    names = names if qualities is None else list(qualities)
    unknown = [name for name in names if name not in held]
    if not names or unknown:
        raise ValueError(
            f"pareto_picture: qualities must be of the records ({', '.join(held) or 'which hold none'}), got "
            f"{', '.join(unknown) or 'none'}; name others or leave them out"
        )
    columns = min(len(names), 2 if len(names) in (2, 4) else 3)
    width = columns * (_PANEL_W + _MARGIN_PX) - _MARGIN_PX
    top = 58 + _LEGEND_PX + 18 * len(_small_print(records, width)) + 10
    corners = (
        (_MARGIN_PX + k % columns * (_PANEL_W + _MARGIN_PX), top + k // columns * (_PANEL_H + _MARGIN_PX))
        for k in range(len(names))
    )
    return [_panel(records, name, quality_of(name, known), corner) for name, corner in zip(names, corners, strict=True)]


def _panel(records: Records, name: str, quality: Quality, corner: Point) -> Panel:
    left, top = corner
    frame = Box(left + _LEFT_PX, top + _TOP_PX, left + _PANEL_W - _RIGHT_PX, top + _PANEL_H - _BOTTOM_PX)
    shown = [record for record in records if name in record["qualities"]]
    numbers = [quality.scale * record["qualities"][name][end] for record in shown for end in ("low", "value", "high")]
    room = 0.06 * (max(numbers) - min(numbers)) or 0.1 * abs(numbers[0]) or 0.1
    y = Scale(low=min(numbers) - room, high=max(numbers) + room, start=frame.bottom, end=frame.top)
    costs = [record["cost_dense_steps"] for record in records]
    spare = max((max(costs) / min(costs)) ** 0.06, 1.1)
    x = Scale(low=min(costs) / spare, high=max(costs) * spare, start=frame.left, end=frame.right, is_log=True)
    best = front(shown, name, quality)
    marks = [
        Mark(
            name=record["method"],
            kind=record["kind"],
            cost=record["cost_dense_steps"],
            at=(place, y(quality.scale * record["qualities"][name]["value"])),
            low=y(quality.scale * record["qualities"][name]["low"]),
            high=y(quality.scale * record["qualities"][name]["high"]),
            is_hollow=record["kind"] == "sparse" and bool(best) and record["method"] not in best,
        )
        for record, place in zip(shown, _side_by_side([x(each["cost_dense_steps"]) for each in shown]), strict=True)
    ]
    own = next((mark.at[1] for mark in marks if mark.name == records[0]["reference"]), None)
    steps = _steps(marks, frame.right) if best else []
    labels = _labels(marks, steps, frame)
    return Panel(
        quality=quality, frame=frame, x=x, y=y, marks=(*marks,), steps=(*steps,), labels=(*labels,), reference=own
    )


def front(records: Records, name: str, quality: Quality) -> list[str]:
    """Returns the sparse methods that no cheaper sparse method equals in quality, cheapest first.

    Empty if it is unknown which direction of the quality is better.
    """
    best = quality.best
    if best is None:
        return []

    def worth(record: Mapping[str, Any]) -> float:
        value = quality.scale * record["qualities"][name]["value"]
        return -abs(value - best) if math.isfinite(best) else math.copysign(1.0, best) * value

    sparse = [record for record in records if record["kind"] == "sparse" and name in record["qualities"]]
    found: list[str] = []
    highest = -math.inf
    for record in sorted(sparse, key=lambda each: (each["cost_dense_steps"], -worth(each))):
        if worth(record) > highest:
            found.append(record["method"])
            highest = worth(record)
    return found


def _side_by_side(places: Sequence[float]) -> list[float]:
    """Returns the places in the same order, with those closer than a marker spread around their middle."""
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda k: places[k]):
        groups.append([index])
        while len(groups) > 1:
            (_, last), (first, _) = (_span(group, places) for group in groups[-2:])
            if first - last >= _APART_PX:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        for order, index in enumerate(group):
            moved[index] = _span(group, places)[0] + order * _APART_PX
    return moved


def _span(group: Sequence[int], places: Sequence[float]) -> tuple[float, float]:
    middle = sum(places[index] for index in group) / len(group)
    half = (len(group) - 1) / 2 * _APART_PX
    return middle - half, middle + half


def _labels(marks: Sequence[Mark], steps: Sequence[Point], frame: Box) -> list[Box]:
    around = RADIUS + 1
    things = [Box(m.at[0] - around, m.at[1] - around, m.at[0] + around, m.at[1] + around) for m in marks]
    things += [Box(m.at[0] - 2, min(m.low, m.high), m.at[0] + 2, max(m.low, m.high)) for m in marks]
    for start, end in [*((one.at, other.at) for one, other in _family_lines(marks)), *pairwise(steps)]:
        parts = max(int(math.dist(start, end) / 5), 1)
        for part in range(parts):
            x, y = (a + (b - a) * part / parts for a, b in zip(start, end, strict=True))
            things.append(Box(x - 2, y - 2, x + 2, y + 2))
    sizes = [(text_width(mark.name, _LABEL_PX) + 4, _LABEL_PX + 3) for mark in marks]
    return place_labels([mark.at for mark in marks], sizes, things, frame)


def _family_lines(marks: Sequence[Mark]) -> list[tuple[Mark, Mark]]:
    """Returns the pairs of marks to join by lines: neighbours in cost within each dense family."""
    lines = []
    for kind in ("dense-native", "dense-beta", "dense-dpm"):
        lines += [*pairwise(sorted((mark for mark in marks if mark.kind == kind), key=lambda mark: mark.cost))]
    return lines


def _draw(pen: Pen, panel: Panel) -> None:
    frame = panel.frame
    _axes(pen, panel)
    if panel.reference is not None:
        pen.dashes((frame.left, panel.reference), (frame.right, panel.reference), (150, 150, 150), 1.0)
    for start, end in _family_lines(panel.marks):
        pen.line([start.at, end.at], fade(COLOURS[start.kind], 0.55), 1.5)
    if panel.steps:
        pen.line(panel.steps, fade(COLOURS["sparse"], 0.4), 4.0)
    for mark in panel.marks:
        x, colour = mark.at[0], fade(COLOURS[mark.kind], 0.7)
        pen.line([(x, mark.low), (x, mark.high)], colour, 1.5)
        for cap in (mark.low, mark.high):
            pen.line([(x - 4, cap), (x + 4, cap)], colour, 1.5)
    for mark, label in zip(panel.marks, panel.labels, strict=True):
        if math.dist(mark.at, nearest := label.nearest(mark.at)) > 18:
            pen.line([mark.at, nearest], (170, 170, 170), 1.0)
    for mark in panel.marks:
        pen.marker(mark.kind, mark.at, is_hollow=mark.is_hollow)
    for mark, label in zip(panel.marks, panel.labels, strict=True):
        pen.text(label.middle, mark.name, _LABEL_PX, darken(COLOURS[mark.kind]), "mm")


def _steps(marks: Sequence[Mark], right: float) -> list[Point]:
    """Returns the front of the sparse methods as steps: each method is the best from its cost up to the next one's."""
    members = sorted((m for m in marks if m.kind == "sparse" and not m.is_hollow), key=lambda m: m.cost)
    steps = [member.at for member in members[:1]]
    for member in members[1:]:
        steps += [(member.at[0], steps[-1][1]), member.at]
    return [*steps, *((right, at[1]) for at in steps[-1:])]


def _axes(pen: Pen, panel: Panel) -> None:
    frame, quality = panel.frame, panel.quality
    pen.text((frame.left - _LEFT_PX + 8, frame.top - 26), quality.title + _direction(quality), 15)
    for tick in panel.x.ticks():
        pen.line([(panel.x(tick), frame.top), (panel.x(tick), frame.bottom)], PALE)
        pen.text((panel.x(tick), frame.bottom + 6), f"{tick:g}", 13, GREY, "ma")
    for tick in panel.y.ticks():
        pen.line([(frame.left, panel.y(tick)), (frame.right, panel.y(tick))], PALE)
        pen.text((frame.left - 7, panel.y(tick)), f"{round(tick, 10):g}", 13, GREY, "rm")
    pen.line([(frame.left, frame.top), (frame.left, frame.bottom), (frame.right, frame.bottom)], GREY)
    pen.text(((frame.left + frame.right) / 2, frame.bottom + 24), "cost, in dense steps", 13, INK, "ma")


def _direction(quality: Quality) -> str:
    if quality.best is None:
        return ""
    if math.isfinite(quality.best):
        return f" ({quality.best:g} is best)"
    return " (more is better)" if quality.best > 0 else " (less is better)"


def _legend(pen: Pen, kinds: set[str], top: float) -> None:
    x = float(_MARGIN_PX)
    for kind, words in METHOD_KINDS.items():
        if kind not in kinds:
            continue
        middle = top + 8
        if kind.startswith("dense"):
            pen.line([(x, middle), (x + 28, middle)], fade(COLOURS[kind], 0.55), 1.5)
        pen.marker(kind, (x + 14, middle))
        pen.text((x + 36, middle), words, 14, INK, "lm")
        x += 36 + text_width(words, 14) + 26


def _title(records: Records) -> str:
    return f"Quality against cost. Reference: {records[0]['reference']}; {records[0]['prompts']} prompts"


def _small_print(records: Records, width: float) -> list[str]:
    first = records[0]
    facts = [str(first[name]) for name in ("device", "date") if name in first]
    facts += [f"{name} {str(first[name])[:18]}" for name in ("torch", "commit", "weights", "seed") if name in first]
    note = f"{_NOTE} {_NOTE_SPARSE}" if any(record["kind"] == "sparse" for record in records) else _NOTE
    return [*wrap(", ".join(facts), width), *wrap(note, width)]
