"""Writes reports: fills the template with the content and pictures of generations."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..errors import ConfigError
from ..files import write_whole
from .contents import contents_of, facts_of
from .encoding import encoded
from .playback import FrameBytes, Playback
from .templates import template

MOST_BYTES = 5_000_000
"""The largest size of a report in bytes."""


def write_report(
    path: str | PathLike[str], playbacks: Sequence[Playback], *, title: str | None = None, limit: int = MOST_BYTES
) -> Path:
    """Writes generations next to each other as one self-contained HTML file that works offline.

    Args:
        path: The file to write; its folder is created if missing.
        playbacks: One or more results of `Handle.playback`. The first two are compared initially.
        title: Title of the page; defaults to the prompt if all generations have the same.
        limit: Largest size of the file in bytes. Pictures become smaller until they fit.

    Returns:
        The path.

    Raises:
        ConfigError: If there is no generation, one without steps, or pictures that do not fit.
    """
    text = report_html(playbacks, title=title, limit=limit)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def report_html(playbacks: Sequence[Playback], *, title: str | None = None, limit: int = MOST_BYTES) -> str:
    """Returns the text of a report; arguments and errors as in `write_report`."""
    if not playbacks or any(not playback.moments for playback in playbacks):
        raise ConfigError("write_report: playbacks must be generations with a step or more, got none")
    named = _distinct([playback.name for playback in playbacks])
    prompts = {playback.prompt for playback in playbacks}
    prompt = prompts.pop() if len(prompts) == 1 else None
    pictures, is_final = _pictures(playbacks)
    frame = _rendered(playbacks, named, title, prompt, [""] * len(pictures))
    uris = encoded(pictures, is_final, limit - len(frame.encode()))
    return _rendered(playbacks, named, title, prompt, uris)


def _pictures(playbacks: Sequence[Playback]) -> tuple[list[FrameBytes], list[bool]]:
    pictures: list[FrameBytes] = []
    is_final: list[bool] = []
    for playback in playbacks:
        steps = [picture for moment in playback.moments for picture in (moment.noisy, moment.clean)]
        pictures += [*steps, playback.final]
        is_final += [*(False for _ in steps), True]
    return pictures, is_final


def _rendered(
    playbacks: Sequence[Playback], names: Sequence[str], title: str | None, prompt: str | None, uris: Sequence[str]
) -> str:
    start, shown = 0, []
    for playback, name in zip(playbacks, names, strict=True):
        end = start + 2 * len(playback.moments) + 1
        shown.append({**contents_of(playback, uris[start:end]), "name": name})
        start = end
    cards = [
        {
            "name": name,
            "prompt": None if prompt is not None else playback.prompt,
            "facts": facts_of(playback.stats),
            "notes": playback.stats.notes,
            "has_true_colours": playback.has_true_colours,
            "is_video": len(playback.final) > 1,
        }
        for playback, name in zip(playbacks, names, strict=True)
    ]
    return template("report.html.j2").render(title=title, prompt=prompt, cards=cards, data=shown)


def _distinct(names: Sequence[str]) -> list[str]:
    """Returns the names made unique: a repeated one gets a number."""
    return [
        f"{name} ({names[:k].count(name) + 1})" if names.count(name) > 1 else name for k, name in enumerate(names)
    ]
