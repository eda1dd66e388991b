"""Writes the model card from the logs of the runs that made the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import FluxTransformer2DModel

_ROWS = 10
_INTRODUCTION = Path(__file__).with_suffix(".md")


def write_card(out: Path, transformer: FluxTransformer2DModel, phases: Sequence[Path], logs: Sequence[Path]) -> None:
    """Writes `README.md` into the model's folder.

    phases: folders of the transformer's phases, in order. logs: JSON lines of the rest.
    """
    config = transformer.config
    introduction = _INTRODUCTION.read_text().format(
        parameters=sum(p.numel() for p in transformer.parameters()) / 1e6,
        layers=f"{config.num_layers} double and {config.num_single_layers} single",
        width=config.num_attention_heads * config.attention_head_dim,
    )
    text = [introduction]
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
    """Returns a table of some rows of a log, the last included; each is a mean over the updates just before it."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    stride = max(1, len(rows) // _ROWS)
    chosen = [*rows[stride - 1 : -1 : stride], rows[-1]]
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row.get(name, "")) for name in names) for row in chosen]
    return "\n".join(f"| {line} |" for line in lines) + "\n"
