"""The judge of drawn landscapes, where one lies with a model."""

from __future__ import annotations

from pathlib import Path

from ..api import embedded_model
from ..errors import CommandError
from ..files import is_there
from .scenes.judge import Judge


def judge_folder(model: str | None = None) -> Path | None:
    """Returns the folder of the judge that lies with a model, of the embedded one without a name; None without one.

    A model that comes with this judge is one of the world that it judges: the held-out prompts are made for it.
    """
    folder = (embedded_model() if model is None else Path(model).expanduser()) / "judge"
    return folder if is_there(folder / "judge.json") else None


def load_judge(model: str | None = None) -> Judge | None:
    """Returns the judge that lies with a model, or None without one. Raises CommandError for one of another world."""
    folder = judge_folder(model)
    try:
        return None if folder is None else Judge.load(folder)
    except ValueError as error:
        raise CommandError(str(error)) from error
