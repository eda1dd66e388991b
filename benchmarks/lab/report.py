"""What the lab found, question by question: a table for each, and a record for each variant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jitaccel.quality.statistics import mean_of, paired_p_value
from jitaccel.quality.summary import summary

from .questions import CONTROLS, QUESTIONS, REFERENCE

Record = Mapping[str, Any]
_COLUMNS = {
    "attributes": ("attributes, %", 100.0, 1),
    "frechet": ("Frechet to dense 50", 1.0, 2),
    "perceptual": ("perceptual", 1.0, 3),
    "psnr_db": ("PSNR, dB", 1.0, 1),
    "spectrum_db": ("detail, dB", 1.0, 2),
    "seam": ("seams", 1.0, 2),
}
_FOOT = """
{prompts} held-out prompts, means with 95 % bootstrap intervals. cost: FLOPs in dense steps, attention and text counted.
more: attributes of each prompt against those of the table's first line, in points, and p by sign flips; the other
columns are as in docs/quality.md. {dtype}; {device}, torch {torch}, jitaccel {commit}.
"""


def report(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], folder: Path | None = None) -> str:
    """Returns a table for each question whose variants are there; writes report.md and table.jsonl into `folder`."""
    records = {record["method"]: record for record in summary(rows, methods)}
    parts = []
    for question, names in {"controls": (REFERENCE, *CONTROLS), **QUESTIONS}.items():
        if all(name in records for name in names):
            beside = [name for name in (REFERENCE, "beta:6") if name in records and name not in names]
            parts.append(f"### {question}\n\n{_table(records, rows, [*names, *beside])}")
    common = next(iter(records.values()))
    text = "\n".join(parts) + _FOOT.format(**{"commit": "at several commits", **common})
    if folder is not None:
        (folder / "report.md").write_text(text)
        (folder / "table.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    return text


def _table(records: Mapping[str, Record], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    head = ["variant", "cost", *(title for title, _, _ in _COLUMNS.values()), "more", "p"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        record = records[name]
        cells = [_cell(record["qualities"].get(key), scale, digits) for key, (_, scale, digits) in _COLUMNS.items()]
        versus = ["", ""] if name == names[0] else _versus(rows, name, names[0])
        lines.append([name, f"{record['cost_dense_steps']:.2f}", *cells, *versus])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(estimate: Mapping[str, float] | None, scale: float, digits: int) -> str:
    if estimate is None:
        return ""
    value, low, high = (f"{scale * estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _versus(rows: Sequence[Mapping[str, Any]], name: str, other: str) -> list[str]:
    shares = []
    for method in (name, other):
        of = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row["prompt_index"]))
        shares.append(np.array([row["shown"] / max(row["claimed"], 1) for row in of]))
    more, p = mean_of(shares[0] - shares[1]), paired_p_value(*shares)
    return [_cell(vars(more), 100.0, 1), f"{p:.3f}" if p >= 0.001 else "< 0.001"]
