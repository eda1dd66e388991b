"""The judge of the embedded model's scenes, where one is installed."""

from __future__ import annotations

from ..api import embedded_model
from .scenes.judge import Judge


def load_judge() -> Judge | None:
    """Returns the judge that lies with the embedded model, or None without one."""
    folder = embedded_model() / "judge"
    return Judge.load(folder) if (folder / "judge.json").is_file() else None
