"""The contact sheet of an evaluation: prompts on which methods differ most, and the best and worst of sparse ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from .choice import Criterion, Distance, Section, columns_of, criterion_of, distance_of, sections
from .drawing import COLOURS, GREY, INK, PALE, Pen, cut, darken, text_width, wrap
from .rows import QUALITIES, Known, Row, Rows, by_method, cost_dense_steps, method_kind

PictureOf = Callable[[str, int], Image.Image]

_SIDE_PX, _GAP_PX, _MARGIN_PX, _LINE_PX = 208, 10, 24, 18
_HEADING_PX, _CAPTION_PX, _LEAST_COLUMNS = 72, 40, 4


def contact_sheet(
    rows: Rows, methods: Sequence[str], picture_of: PictureOf, count: int = 3, *, known: Known = QUALITIES
) -> Image.Image:
    """Returns one sheet with a row of pictures for each prompt of `sections` and a column for each method.

    Args:
        rows: The rows.
        methods: Names, the reference first; `columns_of` selects those shown.
        picture_of: Returns the picture of a method's name and a prompt's index.
        count: Prompts per section, fewer if there are not enough.
        known: Qualities by which prompts can be chosen; the first one that all rows have is used.

    Raises:
        ValueError: If the rows do not have the same 2 or more prompts for every method, or if count is not positive.
    """
    found = sections(rows, methods, count, known)
    columns = columns_of(rows, methods)
    of = by_method(rows, columns, asker="contact_sheet")
    shown = [row for some in of.values() for row in some]
    sheet = _Sheet(
        columns={name: {int(row["prompt_index"]): row for row in some} for name, some in of.items()},
        costs={name: cost_dense_steps(some, of[columns[0]]) for name, some in of.items()},
        picture_of=picture_of,
        criterion=criterion_of(shown, known),
        distance=distance_of(shown),
    )
    return sheet.draw(found)


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """Data shared by all rows of pictures."""

    columns: Mapping[str, Mapping[int, Row]]
    costs: Mapping[str, float]
    picture_of: PictureOf
    criterion: Criterion | None
    distance: Distance | None

    @property
    def width(self) -> int:
        return max(len(self.columns), _LEAST_COLUMNS) * (_SIDE_PX + _GAP_PX) - _GAP_PX

    def draw(self, found: Sequence[Section]) -> Image.Image:
        head = wrap(self._head(), self.width, 14)
        prompts = [(k, note) for section in found for k, note in zip(section.prompts, section.notes, strict=True)]
        rows_px = sum(_LINE_PX * len(self._text(*each)) + _SIDE_PX + _CAPTION_PX for each in prompts)
        top = _MARGIN_PX + 38 + _LINE_PX * len(head)
        pen = Pen(self.width + 2 * _MARGIN_PX, top + (_HEADING_PX + 12) * len(found) + rows_px + _MARGIN_PX)
        pen.text((_MARGIN_PX, _MARGIN_PX), "Pictures of the same prompts and noise by each method", 24)
        y: float = _MARGIN_PX + 38
        for line in head:
            pen.text((_MARGIN_PX, y), line, 14, GREY)
            y += _LINE_PX
        for section in found:
            y = self._heading(pen, section.heading, y + 12)
            for k, note in zip(section.prompts, section.notes, strict=True):
                y = self._row(pen, k, note, y)
        return pen.picture()

    def _head(self) -> str:
        """Returns the notes on the whole sheet."""
        reference, rows = next(iter(self.columns.items()))
        first = next(iter(rows.values()))
        notes = [f"Reference: {reference}; chosen from {len(rows)} prompts."]
        if self.criterion is not None:
            what = "attributes shown of those claimed" if self.criterion.name == "attributes" else self.criterion.title
            notes.append(f"Under a picture, on the left: {what}.")
        if self.distance is not None:
            notes.append(f"On the right: {self.distance.title} to the reference.")
        origin = [str(first["device"])] if "device" in first else []
        origin += [f"{name} {str(first[name])[:18]}" for name in ("commit", "weights", "seed") if name in first]
        return " ".join([*notes, ", ".join(origin)])

    def _text(self, prompt: int, note: str) -> list[str]:
        """Returns the lines above a row of pictures: the prompt, then the reason for showing it."""
        words = next(iter(self.columns.values()))[prompt].get("prompt", "")
        return [*wrap(f"{prompt}: {words}", self.width, 14), *([note] if note else [])]

    def _heading(self, pen: Pen, text: str, y: float) -> float:
        """Draws a section's heading and the names of the columns; returns the y below them."""
        pen.box((_MARGIN_PX, y, _MARGIN_PX + self.width, y + 1.5), PALE)
        pen.text((_MARGIN_PX, y + 10), cut(text, self.width, 19), 19)
        for column, (name, rows) in enumerate(self.columns.items()):
            left = _MARGIN_PX + column * (_SIDE_PX + _GAP_PX)
            colour = COLOURS[method_kind(next(iter(rows.values())))]
            pen.box((left, y + 62, left + _SIDE_PX, y + 65), colour)
            cost = f"{self.costs[name]:.3g} dense steps"
            pen.text((left, y + 58), cut(name, _SIDE_PX - text_width(cost) - 8, 15), 15, darken(colour), "ls")
            pen.text((left + _SIDE_PX, y + 58), cost, 13, GREY, "rs")
        return y + _HEADING_PX

    def _row(self, pen: Pen, prompt: int, note: str, y: float) -> float:
        """Draws a prompt, the reason for showing it, and its pictures with their scores; returns the y below them."""
        lines = self._text(prompt, note)
        for line in lines:
            pen.text((_MARGIN_PX, y), line, 14, GREY if line is note else INK)
            y += _LINE_PX
        y += 4
        for column, (name, rows) in enumerate(self.columns.items()):
            row, left = rows[prompt], _MARGIN_PX + column * (_SIDE_PX + _GAP_PX)
            picture = ImageOps.contain(self.picture_of(name, prompt), (_SIDE_PX, _SIDE_PX))
            pen.paste(picture, (left + (_SIDE_PX - picture.width) // 2, y + (_SIDE_PX - picture.height) // 2))
            if self.criterion is not None:
                pen.text((left, y + _SIDE_PX + 3), self.criterion.caption(row), 14)
            if self.distance is not None and row.get(self.distance.name) is not None:
                pen.text((left + _SIDE_PX, y + _SIDE_PX + 3), f"{self.distance(row):.2f}", 14, GREY, "ra")
        return y - 4 + _SIDE_PX + _CAPTION_PX
