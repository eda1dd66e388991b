"""Rewrites the library's errors for users of a command: options instead of arguments, and what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPTIONS = {"text_tokens": "max_sequence_length", "folder": "out", "target": "model"}  # keyed by argument
_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*: ", re.MULTILINE)
_SETTING = re.compile(r'\b(\w+)=(?:"([\w-]+)"|([\d.]+))')
_APPLY = re.compile(r"jitaccel\.apply\(\.\.\., (.*?)\)")
_PACKAGE = Path(__file__).resolve().parents[1]
_NO_MEMORY = ("can't allocate memory", "out of memory")


def as_options(reason: str, options: Mapping[str, Any]) -> str:
    """Returns an error of the library in the command's terms: without function names, with options for arguments.

    Args:
        reason: One problem per line: `<function>: <argument> must <rule>, got <value>; <what to do>`.
        options: The command's arguments by name.
    """

    def option(name: str) -> str | None:
        name = _OPTIONS.get(name, name)
        return f"--{name.replace('_', '-')}" if name in options else None

    def setting(match: re.Match[str]) -> str:
        found = option(match[1])
        return match[0] if found is None else f"{found} {match[2] or match[3]}"

    def words(match: re.Match[str]) -> str:
        return option(match[0]) or match[0]

    lines = _SETTING.sub(setting, _APPLY.sub(r"\1", _FUNCTION.sub("", reason))).splitlines()
    lines = [re.sub(r"^\w+(?= must\b)", words, line) for line in lines]
    return "\n".join(re.sub(r"(?<!-)\b[a-z]+(?:_[a-z]+)+\b", words, line) for line in lines)


@contextmanager
def warnings_in_one_line(command: str) -> Iterator[None]:
    """Shows the library's own warnings like errors: in one line, without the location in the code."""
    before = warnings.formatwarning

    def shown(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if not Path(filename).resolve().is_relative_to(_PACKAGE):
            return before(message, category, filename, lineno, line)
        return f"jitaccel {command}: {str(message).removeprefix('jitaccel: ')}\n"

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a device or the machine ran out of memory."""
    is_named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return isinstance(error, MemoryError) or is_named or any(words in str(error) for words in _NO_MEMORY)


def out_of_memory(error: BaseException, options: Mapping[str, Any]) -> str:
    """Returns what to try next, the cheapest remedy first.

    Args:
        error: An error for which `is_out_of_memory` is true.
        options: The command's arguments by name.
    """
    remedies = []
    following = {"none": "--offload model, then --offload sequential", "model": "--offload sequential"}
    if options.get("offload") in following:
        remedies.append(following[options["offload"]])
    if options.get("dtype") in ("auto", "float32"):
        remedies.append("--dtype bfloat16")
    if "batch_size" in options:
        remedies.append("a smaller --batch-size")
    if "size" in options:
        remedies.append("a smaller --size")
    first = (str(error).strip().splitlines() or ["no details"])[0]
    return f"out of memory; try {', '.join(remedies) or 'a smaller model'} ({first})"
