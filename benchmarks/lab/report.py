"""The lab's results by question: a record for each variant, and tables made from the records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jitaccel.evaluation.quality.statistics import mean_of, paired_p_value
from jitaccel.evaluation.quality.summary import Record, summary

from .questions import CONTROLS, QUESTIONS, REFERENCE

BENCHMARK = "lab"
_COLUMNS = {
    "attributes": ("attributes, %", 100.0, 1),
    "frechet": ("Frechet to dense 50", 1.0, 2),
    "perceptual": ("perceptual", 1.0, 3),
    "psnr_db": ("PSNR, dB", 1.0, 1),
    "spectrum_db": ("detail, dB", 1.0, 2),
    "seam": ("seams", 1.0, 2),
    "latent_mse": ("latent error", 1.0, 4),
    "layout_mse": ("of it layout", 1.0, 4),
}
_HEAD = ["variant", "cost", *(title for title, _, _ in _COLUMNS.values()), "more", "p"]


def records(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[Record]:
    """Returns a record for each variant of each question whose variants are complete; controls are the first question.

    In a record, `more` is the share of attributes shown beyond the question's first variant, paired by prompt, with its
    interval, and `p` the probability of such a difference by chance. Both are None for the first variant.
    """
    found = {record["method"]: record for record in summary(rows, methods)}
    named = []
    for question, names in {"controls": (REFERENCE, *CONTROLS), **QUESTIONS}.items():
        first, *_ = names
        if all(name in found for name in names):
            for name in names:
                beside = {"more": None, "p": None} if name == first else _versus(rows, name, first)
                named.append({**found[name], "benchmark": BENCHMARK, "case": question, **beside})
    return named


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table for each question, with the origin of its numbers."""
    parts = []
    for question in dict.fromkeys(record["case"] for record in found):
        of = [record for record in found if record["case"] == question]
        origin = ", ".join(
            dict.fromkeys(f"{record['date']}, {record.get('commit', 'several commits')}" for record in of)
        )
        lines = [_HEAD, ["---"] * len(_HEAD), *(_line(record) for record in of)]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"**{question}** ({of[0]['prompts']} prompts, {of[0]['device']}, {origin})\n\n{text}")
    return "\n".join(parts)


def write(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], folder: Path) -> str:
    """Writes report.md and table.jsonl into a folder, and returns the report."""
    found = records(rows, methods)
    text = tables(found)
    (folder / "report.md").write_text(text)
    (folder / "table.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    return text


def _line(record: Mapping[str, Any]) -> list[str]:
    cells = [cell(record["qualities"].get(key), scale, digits) for key, (_, scale, digits) in _COLUMNS.items()]
    p = record["p"]
    chance = "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return [record["method"], f"{record['cost_dense_steps']:.2f}", *cells, cell(record["more"], 100.0, 1), chance]


def cell(estimate: Mapping[str, float] | None, scale: float, digits: int) -> str:
    """Returns an estimate with its interval, or an empty string without an estimate."""
    if estimate is None:
        return ""
    value, low, high = (f"{scale * estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _versus(rows: Sequence[Mapping[str, Any]], name: str, other: str) -> Record:
    shares = []
    for method in (name, other):
        of = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row["prompt_index"]))
        shares.append(np.array([row["shown"] / max(row["claimed"], 1) for row in of]))
    return {"more": vars(mean_of(shares[0] - shares[1])), "p": paired_p_value(*shares)}
