"""The table of `jitaccel eval`: what each method costs and how good it is, with intervals, and who beats whom."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quality.metrics import frechet_distance
from ..quality.rows import control_of, kind_of
from ..quality.scorers import Scorer
from ..quality.statistics import Estimate, bootstrap, mean_of, paired_p_value, share_of

Rows = Sequence[Mapping[str, Any]]
_RESAMPLES = 200  # of a Frechet distance, which takes a decomposition each
_WIDTH = 118
_NOTES = {  # by the column that needs it
    "cost in dense steps": "Cost: FLOPs with attention and text, in dense steps.",
    "Frechet to reference": "Frechet: squared distance of the judge's features to those of the reference's pictures, "
    "and of {data} drawn scenes; resampling widens it, so its intervals lie high.",
    "perceptual": "perceptual: distance of the judge's feature maps to the reference, 0 to 2.",
    "LPIPS": "LPIPS: distance to the reference, of AlexNet's features.",
    "detail, dB": "detail: power above half the Nyquist frequency, against the reference.",
    "seams": "seams: how steep borders between tokens of different stages are, over those within a stage.",
    "against": "against: the dense method whose cost is nearest, on the presets' levels where one is; {lead} more: the "
    "paired difference to it, and p by sign flips.",
}


def table(rows: Rows, methods: Sequence[str], scorers: Sequence[Scorer] = (), data: NDArray[Any] | None = None) -> str:
    """Returns the table in Markdown; what no row tells has no column.

    rows: of each method in turn, for the same prompts, the first method being the reference. scorers: the metrics whose
    numbers the rows have in fields of their names. data: features (P, F) for the distance to drawn scenes.
    """
    of = {name: [row for row in rows if row["method"] == name] for name in methods}
    lead = _lead(rows, scorers)
    columns = {
        "method": [*of],
        **_costs(of),
        **_of_judge(of, data),
        **{scorer.title or scorer.name: _means(of, scorer.name, scorer.digits) for scorer in scorers},
        "seams": _means(of, "seam", 2),
        **_against(of, lead),
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [[*shown], ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    count = len(of[methods[0]])
    notes = [f"Means over {count} prompts, with 95 % bootstrap intervals. Reference: {methods[0]}, the same noise."]
    notes += [note for head, note in _NOTES.items() if head in shown]
    commits = sorted({str(row["commit"]) for row in rows if "commit" in row})
    notes += [f"Pictures are of commits {', '.join(commits)}."] if len(commits) > 1 else []
    words = " ".join(notes).format(data=0 if data is None else len(data), lead="" if lead is None else lead.name)
    return f"{text}\n{textwrap.fill(words, _WIDTH, break_long_words=False)}\n"


def _costs(of: Mapping[str, Rows]) -> dict[str, list[str]]:
    reference = next(iter(of.values()))
    step = _mean(reference, "gflop") / reference[0]["steps"]
    return {
        "steps": [str(rows[0]["steps"]) for rows in of.values()],
        "cost in dense steps": [f"{_mean(rows, 'gflop') / step:.2f}" for rows in of.values()],
        "seconds": [f"{_mean(rows, 'denoise_s'):.2f}" for rows in of.values()],
    }


def _of_judge(of: Mapping[str, Rows], data: NDArray[Any] | None) -> dict[str, list[str]]:
    if not all(_has(rows, "shown") and _has(rows, "features") for rows in of.values()):
        return {}
    features = {name: np.array([row["features"] for row in rows]) for name, rows in of.items()}
    reference = next(iter(features.values()))
    paired = ["" if own is reference else _frechet(own, reference, is_paired=True) for own in features.values()]
    return {
        "attributes shown, %": [
            _shown(share_of(_column(rows, "shown"), _column(rows, "claimed")), 100.0, 1) for rows in of.values()
        ],
        "Frechet to reference": paired,
        "Frechet to data": ["" if data is None else _frechet(own, data, is_paired=False) for own in features.values()],
    }


def _means(of: Mapping[str, Rows], name: str, digits: int) -> list[str]:
    """Returns the mean of a field of each method's rows, over those that have it, with its interval."""
    cells = []
    for rows in of.values():
        values = _column(rows, name)
        if len(values) == 0:
            cells.append("")
        elif np.isfinite(values).all():
            cells.append(_shown(mean_of(values), 1.0, digits))
        else:  # a picture that equals the reference has an infinite PSNR, and a mean of such has no interval
            cells.append(f"{values.mean():.{digits}f}")
    return cells


@dataclass(frozen=True)
class _Lead:
    """The quality in which methods are compared in pairs: of every row a number."""

    name: str
    unit: str
    values: Callable[[Rows], NDArray[Any]]
    scale: float
    digits: int


def _lead(rows: Rows, scorers: Sequence[Scorer]) -> _Lead | None:
    """Returns attributes where they are judged, otherwise the first metric that judges the prompt, or None."""
    if _has(rows, "shown"):
        return _Lead(
            "attributes", ", %", lambda some: _column(some, "shown") / np.maximum(_column(some, "claimed"), 1), 100.0, 1
        )
    scorer = next((each for each in scorers if each.judges_prompt and _has(rows, each.name)), None)
    if scorer is None:
        return None
    return _Lead(scorer.title or scorer.name, "", lambda some: _column(some, scorer.name), 1.0, scorer.digits)


def _against(of: Mapping[str, Rows], lead: _Lead | None) -> dict[str, list[str]]:
    if lead is None:
        return {}
    cells: list[tuple[str, str, str]] = []
    for name, rows in of.items():
        control = _control(name, of)
        if control is None:
            cells.append(("", "", ""))
            continue
        own, other = lead.values(rows), lead.values(of[control])
        p_value = paired_p_value(own, other)
        more = _shown(mean_of(own - other), lead.scale, lead.digits)
        cells.append((control, more, f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"))
    heads = ("against", f"{lead.name} more{lead.unit}", "p")
    return {head: list(column) for head, column in zip(heads, zip(*cells, strict=True), strict=True)}


def _control(name: str, of: Mapping[str, Rows]) -> str | None:
    """Returns the dense method whose cost is nearest to that of one not dense, or None."""
    return None if kind_of(of[name][0]).startswith("dense") else control_of(name, of)


def _frechet(features: NDArray[Any], other: NDArray[Any], *, is_paired: bool) -> str:
    """Returns a distance with its interval over prompts; the other side is resampled with it where it is paired."""

    def measure(chosen: NDArray[Any]) -> float:
        return frechet_distance(features[chosen], other[chosen] if is_paired else other)

    return _shown(bootstrap(len(features), measure, resamples=_RESAMPLES), 1.0, 2)


def _has(rows: Rows, name: str) -> bool:
    return all(row.get(name) is not None for row in rows)


def _column(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([row[name] for row in rows if row.get(name) is not None], np.float64)


def _mean(rows: Rows, name: str) -> float:
    return float(_column(rows, name).mean())


def _shown(estimate: Estimate, scale: float, digits: int) -> str:
    value, low, high = (scale * each for each in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
