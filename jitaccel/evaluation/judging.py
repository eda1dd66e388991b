"""Finds the judge of drawn landscapes that comes with a model, if any."""

from __future__ import annotations

from pathlib import Path

from ..api import embedded_model
from ..errors import CommandError
from ..files import is_there
from .scenes.judge import Judge


def judge_folder(model: str | None = None) -> Path | None:
    """Returns the folder of the judge that comes with a model (None: the embedded one), or None if it has none.

    A model with this judge draws the world that it judges, and the held-out prompts are made for it.
    """
    folder = (embedded_model() if model is None else Path(model).expanduser()) / "judge"
    return folder if is_there(folder / "judge.json") else None


def load_judge(model: str | None = None) -> Judge | None:
    """Returns the judge that comes with a model, or None. Raises CommandError for a judge of another world."""
    folder = judge_folder(model)
    try:
        return None if folder is None else Judge.load(folder)
    except ValueError as error:
        raise CommandError(str(error)) from error
