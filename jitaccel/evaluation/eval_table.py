"""The table of `jitaccel eval`: cost and quality of each method with intervals, and paired comparisons."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .quality.rows import Rows, by_method, column, control_of, method_kind
from .quality.scorers import Scorer
from .quality.statistics import Estimate, mean_of, paired_p_value

_WIDTH = 118
_NOTES = {  # keyed by the column that needs it
    "cost in dense steps": "Cost: FLOPs including attention and text, in dense steps.",
    "Frechet to reference": "Frechet: squared distance of the judge's features to those of the reference's pictures, "
    "and of {data} held-out drawings; resampling widens it, so its intervals lie high.",
    "perceptual": "perceptual: distance of the judge's feature maps to the reference, 0 to 2.",
    "LPIPS": "LPIPS: distance to the reference, by AlexNet's features.",
    "detail, dB": "detail: power above half the Nyquist frequency, against the reference.",
    "seams": "seams: mean pixel step at borders between tokens of different stages, over that within a stage.",
    "against": "against: the dense method of nearest cost, if possible on the presets' levels and with the "
    "same solver; {lead} more: the paired difference to it, and p by sign flips.",
}


def table(rows: Rows, records: Sequence[Mapping[str, Any]], scorers: Sequence[Scorer] = (), drawn: int = 0) -> str:
    """Returns the table in Markdown; a column without values in any row is left out.

    Args:
        rows: The rows.
        records: `summary` of the rows, the reference first.
        scorers: The metrics whose scores the rows hold in fields of their names.
        drawn: Number of drawings that `frechet_to_data` compares with.
    """
    methods = [record["method"] for record in records]
    of = by_method(rows, methods, asker="table")
    lead = _lead(rows, scorers)
    columns = {
        "method": methods,
        "steps": [str(record["steps"]) for record in records],
        "cost in dense steps": [f"{record['cost_dense_steps']:.2f}" for record in records],
        "seconds": ["" if record["seconds"] is None else f"{record['seconds']:.2f}" for record in records],
        "attributes shown, %": _cells(records, "attributes", of, 1, 100.0),
        "Frechet to reference": _cells(records, "frechet", of, 2),
        "Frechet to data": _cells(records, "frechet_to_data", of, 2),
        **{scorer.title or scorer.name: _cells(records, scorer.name, of, scorer.digits) for scorer in scorers},
        "seams": _cells(records, "seam", of, 2),
        **_against(of, lead),
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [[*shown], ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    count = records[0]["prompts"]
    notes = [f"Means over {count} prompts, with 95 % bootstrap intervals. Reference: {methods[0]}, the same noise."]
    notes += [note for head, note in _NOTES.items() if head in shown]
    commits = sorted({str(row["commit"]) for row in rows if "commit" in row})
    notes += [f"Pictures are of commits {', '.join(commits)}."] if len(commits) > 1 else []
    words = " ".join(notes).format(data=drawn, lead="" if lead is None else lead.name)
    return f"{text}\n{textwrap.fill(words, _WIDTH, break_long_words=False)}\n"


def _cells(
    records: Sequence[Mapping[str, Any]], name: str, of: Mapping[str, Rows], digits: int, scale: float = 1.0
) -> list[str]:
    """Returns a quality of each method with its interval.

    A picture that equals the reference has an infinite PSNR. A mean of such values has no interval, and none is shown.
    """
    cells = []
    for record in records:
        values = column(of[record["method"]], name)
        if name in record["qualities"]:
            cells.append(_shown(Estimate(**record["qualities"][name]), scale, digits))
        else:
            cells.append(f"{values.mean():.{digits}f}" if len(values) else "")
    return cells


@dataclass(frozen=True)
class _Lead:
    """The quality in which methods are compared in pairs; returns a number for every row."""

    name: str
    unit: str
    values: Callable[[Rows], NDArray[Any]]
    scale: float
    digits: int


def _lead(rows: Rows, scorers: Sequence[Scorer]) -> _Lead | None:
    """Returns attributes if they are judged, otherwise the first metric that judges the prompt, or None."""
    if _has(rows, "shown"):
        return _Lead(
            "attributes", ", %", lambda some: column(some, "shown") / np.maximum(column(some, "claimed"), 1), 100.0, 1
        )
    scorer = next((each for each in scorers if each.judges_prompt and _has(rows, each.name)), None)
    if scorer is None:
        return None
    return _Lead(scorer.title or scorer.name, "", lambda some: column(some, scorer.name), 1.0, scorer.digits)


def paired(rows: Rows, methods: Sequence[str], scorers: Sequence[Scorer] = ()) -> dict[str, dict[str, Any]]:
    """Returns, for each method, the paired differences in the lead quality to the reference and its dense control.

    For each of these two, by name: `value` with the ends `low` and `high` of its 95 % interval over prompts, and `p`,
    the probability of such a difference by chance. Empty without a lead quality. All values are JSON values.

    Args:
        rows: The rows.
        methods: Names, the reference first.
        scorers: As for `table`.
    """
    of, lead = by_method(rows, methods, asker="paired"), _lead(rows, scorers)
    if lead is None:
        return {}
    found = {}
    for name in methods:
        others = dict.fromkeys(other for other in (methods[0], _control(name, of)) if other not in (None, name))
        found[name] = {other: _versus(of[name], of[other], lead) for other in others if other is not None}
    return found


def _versus(rows: Rows, others: Rows, lead: _Lead) -> dict[str, float]:
    own, other = lead.values(rows), lead.values(others)
    return {**vars(mean_of(own - other)), "p": paired_p_value(own, other)}


def _against(of: Mapping[str, Rows], lead: _Lead | None) -> dict[str, list[str]]:
    if lead is None:
        return {}
    cells: list[tuple[str, str, str]] = []
    for name, rows in of.items():
        control = _control(name, of)
        if control is None:
            cells.append(("", "", ""))
            continue
        found = _versus(rows, of[control], lead)
        p_value = found.pop("p")
        more = _shown(Estimate(**found), lead.scale, lead.digits)
        cells.append((control, more, f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"))
    heads = ("against", f"{lead.name} more{lead.unit}", "p")
    return {head: list(column) for head, column in zip(heads, zip(*cells, strict=True), strict=True)}


def _control(name: str, of: Mapping[str, Rows]) -> str | None:
    """Returns the dense method of nearest cost, or None for a method that is itself dense."""
    return None if method_kind(of[name][0]).startswith("dense") else control_of(name, of)


def _has(rows: Rows, name: str) -> bool:
    return all(row.get(name) is not None for row in rows)


def _shown(estimate: Estimate, scale: float, digits: int) -> str:
    value, low, high = (scale * each for each in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
