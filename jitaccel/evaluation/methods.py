"""Parses `jitaccel eval --methods`: the words for ways to generate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import CommandError, ConfigError
from ..files import is_there
from ..method.config import JiTConfig
from ..method.overrides import Overrides
from ..method.presets import PRESETS
from .comparison import Method
from .rivals import FORMS, find_rival

_DENSE: Mapping[str, Overrides] = {
    "dense": {"schedule": "native"},
    "beta": {"schedule": "beta"},
    "dpm": {"schedule": "beta", "solver": "dpmpp_2m"},
}


def parse_methods(text: str) -> tuple[Method, ...]:
    """Returns the methods of a `--methods` list. Raises CommandError naming the first unknown word."""
    methods = []
    for word in (word.strip() for word in text.split(",")):
        rival = find_rival(word)
        if rival is not None:
            methods.append(Method(name=word, steps=rival.steps, rival=rival))
            continue
        config = _config_of(word)
        if isinstance(config.steps, str):
            raise CommandError(f"--methods must fix the number of steps, got {word!r}, which leaves it to the caller")
        methods.append(
            Method(name=Path(word).stem if word.endswith(".json") else word, steps=config.steps, config=config)
        )
    if len({method.name for method in methods}) < len(methods):
        raise CommandError(f"--methods must all be different, got {text}")
    return tuple(methods)


def _config_of(word: str) -> JiTConfig:
    """Returns the configuration of a word of `--methods`. Raises CommandError for an unknown word."""
    kind, _, count = word.partition(":")
    if word in PRESETS:
        return PRESETS[word]
    try:
        if kind in _DENSE and count.isascii() and count.isdigit():
            fields: Overrides = {**_DENSE[kind], "steps": int(count)}
            return PRESETS["dense"].replace(**fields)
        if word.endswith(".json") and is_there(Path(word)) and Path(word).is_file():
            return JiTConfig.from_dict(json.loads(Path(word).read_text()))
    except (ConfigError, ValueError, OSError) as error:  # int and json raise ValueError
        raise CommandError(f"--methods must list methods that can run, got {word[:80]!r}: {error}") from None
    raise CommandError(
        f"--methods must list dense:N, beta:N, dpm:N, {', '.join(FORMS)}, a preset ({', '.join(PRESETS)}) or a .json "
        f"file, got {word[:80]!r}"
    )
