"""Reads the prompts of `jitaccel eval --prompts`: held-out ones of the drawn world, or those of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from ..files import is_there

if TYPE_CHECKING:
    from .scenes.captions import Claims

_MOST = 10_000  # different prompts of the drawn world, which is finite


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and, if the judge of drawn landscapes understands it, the attributes it claims."""

    text: str
    claims: Claims | None = None


def read_prompts(word: str, *, is_judged: bool) -> tuple[Prompt, ...]:
    """Returns the given number of held-out prompts, or those of a file: one per line, or field "prompt" of JSON lines.

    is_judged: whether the model comes with a judge of drawn landscapes, as the embedded one does.

    Raises CommandError for fewer than two prompts, and for lines without a prompt, with their numbers.
    """
    if word.isascii() and word.lstrip("-").isdigit():
        if not is_judged:
            raise CommandError(
                f"--prompts must be a file for a model without a judge of drawn landscapes, got {word}; "
                f"the held-out prompts are of that world, as the embedded model is"
            )
        if len(word) > 18 or not 2 <= int(word) <= _MOST:
            raise CommandError(f"--prompts must be at least 2 and at most {_MOST}, got {word[:40]}")
        from .scenes.prompts import held_out

        return tuple(Prompt(text=text, claims=claims) for text, claims in held_out(int(word)))
    path = Path(word).expanduser()
    if not is_there(path) or not path.is_file():
        raise CommandError(f"--prompts must be a number or a file, got {word[:80]!r}; there is no such file")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise CommandError(
            f"--prompts must be a .txt file with one prompt a line, or .jsonl with a field prompt in each, got {word!r}"
        )
    texts = [*_texts(path)]
    if len(texts) < 2:
        raise CommandError(f"--prompts must hold at least 2 prompts, got {len(texts)} in {word}")
    return tuple(Prompt(text=text) for text in texts)


def _texts(path: Path) -> Iterator[str]:
    is_json = path.suffix.lower() == ".jsonl"
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode().strip()
            found = json.loads(text) if is_json and text else text
        except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
            form = "JSON" if is_json else "UTF-8"
            raise CommandError(f"--prompts must be {form}, got line {number} of {path}: {error}") from error
        if not text:
            continue
        prompt = found.get("prompt") if isinstance(found, dict) else found if not is_json else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise CommandError(
                f'--prompts must have a text "prompt" in each JSON object, got line {number} of {path}: {text[:80]}'
            )
        yield prompt.strip()
