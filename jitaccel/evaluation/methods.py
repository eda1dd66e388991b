"""The words of `jitaccel eval --methods`, and the ways to generate that they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import CommandError
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
    """Returns the methods of a list as `--methods` takes it. Raises CommandError naming the word that is none."""
    methods = []
    for word in (word.strip() for word in text.split(",")):
        kind, _, count = word.partition(":")
        rival = find_rival(word)
        if rival is not None:
            methods.append(Method(name=word, steps=rival.steps, rival=rival))
            continue
        if kind in _DENSE and count.isdigit() and int(count) > 0:
            fields: Overrides = {**_DENSE[kind], "steps": int(count)}
            config = PRESETS["dense"].replace(**fields)
        elif word in PRESETS:
            config = PRESETS[word]
        elif word.endswith(".json") and Path(word).is_file():
            config = JiTConfig.from_dict(json.loads(Path(word).read_text()))
        else:
            raise CommandError(
                f"--methods must list dense:N, beta:N, dpm:N, {', '.join(FORMS)}, a preset ({', '.join(PRESETS)}) "
                f"or a .json file, got {word!r}"
            )
        if isinstance(config.steps, str):
            raise CommandError(f"--methods must fix the number of steps, got {word!r}, which leaves it to the caller")
        methods.append(
            Method(name=Path(word).stem if word.endswith(".json") else word, steps=config.steps, config=config)
        )
    if len({method.name for method in methods}) < len(methods):
        raise CommandError(f"--methods must be different ones, got {text}")
    return tuple(methods)
