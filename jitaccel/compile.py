"""One static graph for each signature: a function compiled anew for each set of shapes, and never again for the same.

Token counts are constants within a stage, so nothing is dynamic: as many graphs as there are stages and batch
signatures. A compiler keeps few graphs of one function before it gives up (`recompile_limit`), so each signature has
its own copy of it. What a graph rests on (shapes, which layers, LoRA scales) is guarded by the compiler, which makes
another graph where that changes; weights are inputs.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import TorchDynamoException

from .errors import ConfigError, UnsupportedModelError, nearest_match

_log = logging.getLogger(__name__)
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_FIXED = ("fullgraph", "dynamic")


@dataclass(frozen=True, kw_only=True)
class CompileStats:
    """What compilation did so far. `signatures`: sets of shapes seen. `graphs`: compiled; as many, if nothing changed.

    `calls`: of compiled functions. `eager_calls`: where a graph could not be made, or must not be.
    """

    signatures: int = 0
    graphs: int = 0
    calls: int = 0
    eager_calls: int = 0


def compile_options(value: bool | str | Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what `torch.compile` gets, or None for no compilation. Raises ConfigError for what it does not take.

    value: True, a mode, or arguments of `torch.compile` (backend, mode, options).
    """
    if isinstance(value, bool):
        return {} if value else None
    if isinstance(value, str):
        if value not in MODES:
            raise ConfigError(
                f"apply: compile must be True, False, a dict or one of {', '.join(MODES)}, got {value!r}; "
                f'did you mean "{nearest_match(value, MODES)}"?'
            )
        return {"mode": value}
    if not isinstance(value, Mapping) or any(name in _FIXED for name in value):
        raise ConfigError(
            f"apply: compile must be True, False, a mode or a dict of torch.compile's arguments without "
            f"{' and '.join(_FIXED)}, got {value!r}; shapes are static and every stage is one graph"
        )
    unknown = sorted(set(value) - {"backend", "mode", "options"})
    if unknown:
        raise ConfigError(
            f"apply: compile must hold backend, mode or options, got {', '.join(unknown)}; leave the others out"
        )
    return dict(value)


class Compiler:
    """Compiled copies of functions by signature. options: of `torch.compile`. strict: a failure is an error."""

    def __init__(self, options: Mapping[str, Any], strict: bool = False) -> None:
        self._options = dict(options)
        self._strict = strict
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._codes: list[types.CodeType] = []
        self._failed: dict[Hashable, str] = {}
        self._calls = self._eager_calls = 0

    @property
    def stats(self) -> CompileStats:
        graphs = sum(len(_debug_get_cache_entry_list(code)) for code in self._codes)
        return CompileStats(
            signatures=len(self._compiled), graphs=graphs, calls=self._calls, eager_calls=self._eager_calls
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Why what runs eagerly does."""
        return tuple(dict.fromkeys(f"not compiled, since {reason}" for reason in self._failed.values()))

    def run(self, signature: Hashable, function: Callable[..., Any], *args: Any, reason: str | None = None) -> Any:
        """Returns `function(*args)`, compiled for this signature; eagerly where that fails, or where there is a reason.

        function: a plain function, the same for one signature.
        """
        if reason is not None:
            self._fail(signature, reason)
        if signature in self._failed:
            self._eager_calls += 1
            return function(*args)
        if signature not in self._compiled:
            copy = _copy(function, len(self._codes))
            self._codes.append(copy.__code__)
            self._compiled[signature] = torch.compile(copy, fullgraph=True, dynamic=False, **self._options)
        try:
            result = self._compiled[signature](*args)
        except TorchDynamoException as error:
            self._fail(signature, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            self._eager_calls += 1
            return function(*args)
        self._calls += 1
        return result

    def _fail(self, signature: Hashable, reason: str) -> None:
        if self._strict:
            raise UnsupportedModelError(
                f"jitaccel: every stage must compile into one graph with strict=True, got {reason}; "
                f"use strict=False to run such stages eagerly"
            )
        if signature not in self._failed:
            _log.warning("jitaccel: a stage runs eagerly, since %s", reason)
        self._failed[signature] = reason


def _copy(function: Callable[..., Any], number: int) -> types.FunctionType:
    """Returns the same function with code of its own, to which a compiler's cache and limits belong."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
