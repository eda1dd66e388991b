"""Writes the model card from the logs of the runs that made the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import FluxTransformer2DModel

from jitaccel.evaluation.scenes.judge import Judge
from jitaccel.evaluation.scenes.prompts import SHARE_HELD_OUT
from jitaccel.evaluation.scenes.scene import ATTRIBUTES

from .pictures import SETS

_ROWS = 10
_INTRODUCTION = Path(__file__).with_suffix(".md")


def write_card(
    out: Path,
    transformer: FluxTransformer2DModel,
    judge: Judge,
    psnr_db: Mapping[int, float],
    phases: Sequence[Path],
    logs: Sequence[Path],
    faults: Path | None = None,
) -> None:
    """Writes `README.md` into the model's folder.

    Args:
        out: The model's folder.
        transformer: The transformer, whose size is reported.
        judge: The judge, whose accuracy is reported.
        psnr_db: PSNR of the autoencoder, by size of the drawings in pixels.
        phases: Folders of the transformer's phases, in order. A `note.md` in a folder adds to its settings.
        logs: JSON lines files of the other trainings.
        faults: File with a description of faults seen in the pictures, if they were inspected.
    """
    config = transformer.config
    introduction = _INTRODUCTION.read_text().format(
        parameters=sum(p.numel() for p in transformer.parameters()) / 1e6,
        layers=f"{config.num_layers} double and {config.num_single_layers} single",
        width=config.num_attention_heads * config.attention_head_dim,
        channels=config.in_channels,
        psnr_db=", ".join(f"{value:.1f} dB at {size} px" for size, value in psnr_db.items()),
        judged=_judged(judge),
        drawings=", ".join(f"{size.count:,} of {size.name}" for size in SETS),
        held_out=f"One in {SHARE_HELD_OUT}",
    )
    text = [introduction]
    if faults is not None and faults.exists():
        text.append(f"## What is wrong with it\n\n{faults.read_text()}")
    text.append("## How it was trained\n")
    for phase in phases:
        settings = json.loads((phase / "phase.json").read_text())
        text.append(f"### transformer, {phase.name}\n")
        text.append("Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".\n")
        note = phase / "note.md"
        text.append(note.read_text() if note.exists() else "")
        text.append(_curve(phase / "log.jsonl"))
    for log in logs:
        text.append(f"### {log.stem}\n")
        text.append(_curve(log))
    (out / "README.md").write_text("\n".join(text))


def _curve(log: Path) -> str:
    """Returns a table of some rows of a log, including the last; each row is a mean over the updates just before it."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    stride = max(1, len(rows) // _ROWS)
    chosen = [*rows[stride - 1 : -1 : stride], rows[-1]]
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row.get(name, "")) for name in names) for row in chosen]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _judged(judge: Judge) -> str:
    """Returns a table of the judge's accuracy in percent, by attribute and kind of drawing."""
    kinds = {name: shares for name, shares in judge.record["held_out"].items() if isinstance(shares, dict)}
    lines = ["attribute | " + " | ".join(kinds), " | ".join("---" for _ in range(len(kinds) + 1))]
    lines += [
        f"{name} | " + " | ".join(f"{100 * shares[name]:.1f}" for shares in kinds.values())
        for name in (*ATTRIBUTES, "all")
    ]
    return "\n".join(f"| {line} |" for line in lines)
