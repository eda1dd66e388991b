"""Further outputs of `jitaccel eval`: the table in JSON lines, the Pareto picture and the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import whole, write_whole
from .quality.contact import PictureOf, contact_sheet
from .quality.pareto import pareto_picture
from .quality.rows import QUALITIES, Known, Quality, Rows
from .quality.scorers import Scorer
from .quality.summary import Record


def write_pictures(
    rows: Rows,
    records: Sequence[Record],
    folder: Path,
    picture_of: PictureOf,
    *,
    known: Known = QUALITIES,
    count: int = 3,
) -> list[Path]:
    """Writes table.jsonl, pareto.png and contact.png into a folder, and returns their paths.

    The Pareto picture is left out if no method has a quality, as when a reference is only compared with itself.

    Args:
        rows: The rows.
        records: `summary` of the rows.
        folder: The output folder.
        picture_of: As for `contact_sheet`.
        known: As it was passed to `summary`.
        count: As for `contact_sheet`.
    """
    methods = [record["method"] for record in records]
    pictures = {"contact.png": contact_sheet(rows, methods, picture_of, count, known=known)}
    if any(record["qualities"] for record in records):
        pictures = {"pareto.png": pareto_picture(records, known=known), **pictures}
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_whole(folder / "table.jsonl", lines)
    for name, picture in pictures.items():
        with whole(folder / name) as partial:
            picture.save(partial)
    return [folder / "table.jsonl", *(folder / name for name in pictures)]


def known_qualities(scorers: Sequence[Scorer]) -> Known:
    """Returns the known qualities together with those of scorers; scorers that judge the prompt come first.

    A custom scorer defines the title of its metric and whether higher is better.
    """
    sides = {True: float("inf"), False: -float("inf"), None: None}
    named = {
        scorer.name: Quality(title=scorer.title or scorer.name, best=sides[scorer.higher_is_better])
        for scorer in sorted(scorers, key=lambda each: not each.judges_prompt)
        if scorer.name not in QUALITIES
    }
    return {**QUALITIES, **named}
