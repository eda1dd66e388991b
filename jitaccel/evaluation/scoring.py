"""Scores existing pictures and stores each score, so that adding a metric needs no new pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import CommandError
from .quality.rows import Row, Rows
from .quality.scorers import Scorer, scorer_factory
from .study import append_lines, read_lines

_BATCH = 8
_KEYS = ("metric", "version", "prompt", "picture", "reference")


def parse_metrics(text: str, device: str) -> tuple[Scorer, ...]:
    """Returns the scorers of a `--metrics` list; an empty list has none.

    Raises CommandError listing every problem: unknown words and missing packages.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    factories, reasons, missing = {}, [], []
    for word in words:
        try:
            factories[word] = scorer_factory(word)
            missing += [f"{word}: {reason}" for reason in factories[word].missing()]
        except ValueError as error:
            reasons.append(f"--metrics must each be {error}")
    if missing:
        rule = "--metrics must have their packages"
        reasons.append(f'{rule}, got {", ".join(missing)}; pip install "jitaccel[eval]"')
    if reasons:
        raise CommandError("\n".join(reasons))
    scorers = [factory.make(device) for factory in factories.values()]
    if len(factories) < len(words) or len({scorer.name for scorer in scorers}) < len(words):
        raise CommandError(f"--metrics must all be different, got {text}")
    return tuple(scorers)


def score_rows(
    rows: Rows,
    scorers: Iterable[Scorer],
    *,
    reference: str,
    picture_of: Callable[[Mapping[str, Any]], Path],
    folder: Path,
) -> Rows:
    """Returns the rows with the score of each metric in a field of its name.

    A stored score in `folder`/scores.jsonl is reused if metric, version, prompt and the content of the picture are the
    same, and also that of the reference's picture if the metric uses it. Rows of the reference have no score of such a
    metric.

    Args:
        rows: The rows.
        scorers: The metrics.
        reference: The method whose pictures the others are compared with.
        picture_of: Returns the path of the picture of a row.
        folder: Folder of scores.jsonl.
    """
    known = {
        _key(entry): entry["score"]
        for entry in read_lines(folder / "scores.jsonl")
        if {*_KEYS} <= entry.keys() and isinstance(entry.get("score"), (int, float))
    }
    references = {row["prompt_index"]: row for row in rows if row["method"] == reference}
    found = [dict(row) for row in rows]
    with append_lines(folder / "scores.jsonl") as file:
        for scorer in scorers:
            some = [row for row in found if not (scorer.needs_reference and row["method"] == reference)]
            entries = [_entry(scorer, row, references[row["prompt_index"]]) for row in some]
            new = {_key(entry): k for k, entry in enumerate(entries) if _key(entry) not in known}
            # Score the pictures of one prompt together, because some metrics then encode the prompt only once.
            order = sorted(new.values(), key=lambda k: int(some[k]["prompt_index"]))
            for start in range(0, len(order), _BATCH):
                chosen = [some[k] for k in order[start : start + _BATCH]]
                values = _values(scorer, chosen, references, picture_of)
                for k, value in zip(order[start : start + _BATCH], values, strict=True):
                    known[_key(entries[k])] = value
                    file.write(json.dumps({**entries[k], "score": value}) + "\n")
                file.flush()
            for row, entry in zip(some, entries, strict=True):
                row[scorer.name] = known[_key(entry)]
    return found


def _values(
    scorer: Scorer,
    rows: Rows,
    references: Mapping[int, Row],
    picture_of: Callable[[Mapping[str, Any]], Path],
) -> list[float]:
    others = [references[row["prompt_index"]] for row in rows]
    pictures, compared = (
        np.stack([np.asarray(Image.open(picture_of(row)).convert("RGB")) for row in some]) for some in (rows, others)
    )
    try:
        return scorer([row["prompt"] for row in rows], pictures, compared if scorer.needs_reference else None)
    except (ImportError, OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CommandError(
            f"--metrics must be able to score, got {type(error).__name__} of {scorer.name}: {line}; "
            f"pictures and numbers made so far are kept"
        ) from error


def _entry(scorer: Scorer, row: Row, reference: Row) -> Row:
    return {
        "metric": scorer.name,
        "version": scorer.version,
        "prompt": row["prompt"],
        "picture": row["picture"],
        "reference": reference["picture"] if scorer.needs_reference else None,
    }


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(entry[name]) for name in _KEYS)
