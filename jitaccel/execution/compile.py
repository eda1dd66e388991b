"""Compiles one static graph per signature: a function is compiled once for each set of shapes.

Token counts are constant within a stage, so nothing is dynamic: there are as many graphs as stages and batch
signatures. A compiler keeps only a few graphs of a function before it gives up (`recompile_limit`), so each signature
gets its own copy of the function. The compiler guards what a graph depends on (shapes, which layers, LoRA scales) and
compiles another graph when that changes; weights are inputs. On CUDA each graph is captured once and replayed inside
those guards (`graphs.py`), so a stale graph is never replayed.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError, suggestion
from .graphs import CallRecorder, Counts, CudaGraphs, RepeatedCalls, Replayed
from .private import (
    CompilationError,
    backend_named,
    compiled_by_inductor,
    forget_graphs,
    inductor_options,
    inductor_options_of_mode,
)

_log = logging.getLogger(__name__)
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_FIXED = ("fullgraph", "dynamic")
_KNOWN = ("backend", "mode", "options", "graphs", "regions")
_FLAGS = ("graphs", "regions")
_MAX_VARIANTS = 6  # graphs of one signature, for example with alternating LoRA scales; a compiler keeps 8


@dataclass(frozen=True, kw_only=True)
class CompileStats:
    """What compilation has done so far.

    Attributes:
        signatures: Sets of shapes seen.
        graphs: Graphs compiled; equal to `signatures` if nothing changed.
        calls: Calls of compiled functions.
        eager_calls: Calls that ran eagerly, because a graph could not or must not be made.
        captures: CUDA graphs captured.
        replays: Calls that replayed a CUDA graph.
        dropped: CUDA graphs discarded because something they depended on changed.
        what: A graph covers a whole stage ("stages") or one kind of block in it ("blocks"), which is never captured.
    """

    signatures: int = 0
    graphs: int = 0
    calls: int = 0
    eager_calls: int = 0
    captures: int = 0
    replays: int = 0
    dropped: int = 0
    what: Literal["stages", "blocks"] = "stages"


def compile_options(value: bool | str | Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the compiler's options, or None for no compilation.

    Args:
        value: True, a mode, or a dict with arguments of `torch.compile` (backend, mode, options) and two of ours:
            `graphs`, whether to capture stages as CUDA graphs (by default on CUDA, unless the mode is
            "max-autotune-no-cudagraphs"; on other devices True replays the recorded call, which behaves the same and
            saves nothing), and `regions`, whether repeated blocks are compiled once (the default, which takes a
            fraction of the time).

    Raises:
        ConfigError: For unsupported values.
    """
    if isinstance(value, bool):
        return {} if value else None
    options = {"mode": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or any(name in _FIXED for name in options):
        raise ConfigError(
            f"apply: compile must be True, False, a mode or a dict of torch.compile's arguments without "
            f"{' and '.join(_FIXED)}, got {value!r}; shapes are static and every stage is one graph"
        )
    unknown = sorted(map(str, set(options) - set(_KNOWN)))
    if unknown:
        raise ConfigError(
            f"apply: compile must hold {', '.join(_KNOWN)}, got {', '.join(unknown)}; leave the others out"
        )
    _check_values(options)
    return dict(options)


def _check_values(options: Mapping[str, Any]) -> None:
    mode, inner = options.get("mode"), options.get("options")
    if mode is not None and mode not in MODES:
        raise ConfigError(
            f"apply: compile must be True, False, a dict or one of {', '.join(MODES)}, got {mode!r}; "
            f"{suggestion(mode, MODES)}"
        )
    if mode is not None and inner is not None:
        raise ConfigError(f"apply: compile must hold mode or options, got both ({mode!r}, {inner!r}); leave one out")
    for name in _FLAGS:
        if not isinstance(options.get(name, True), bool):
            raise ConfigError(
                f"apply: compile must hold {name} as True or False, got {options[name]!r}; leave it out for the default"
            )
    if inner is None or options.get("backend", "inductor") != "inductor":
        return
    known = inductor_options()
    for name in inner:
        if name not in known:
            raise ConfigError(
                f"apply: compile must hold options of torch's inductor, got {name!r}; "
                f"{suggestion(name, known, 'see help(torch.compile)')}"
            )


@dataclass
class _Compiled:
    """The function of one signature. `variants`: graphs compiled of it. `is_regional`: compiled in regions."""

    run: Callable[..., Any]
    code: types.CodeType
    is_regional: bool
    variants: int = 0


class Compiler:
    """Compiled copies of functions by signature. options: from `compile_options`. strict: raise on failure."""

    def __init__(self, options: Mapping[str, Any], strict: bool = False) -> None:
        self._options = dict(options)
        self._strict = strict
        self._compiled: dict[Hashable, _Compiled] = {}
        self._signatures: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._eager_reasons: dict[tuple[Hashable, str], None] = {}
        self._notes: list[str] = []
        self._recorder: CallRecorder | None = None
        self._counts = Counts()
        self._copies = self._graphs = self._calls = self._eager_calls = self._dropped = 0

    @property
    def stats(self) -> CompileStats:
        return CompileStats(
            signatures=len(self._signatures),
            graphs=self._graphs,
            calls=self._calls,
            eager_calls=self._eager_calls,
            captures=self._counts.captures,
            replays=self._counts.replays,
            dropped=self._dropped + self._counts.dropped,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """The reasons why stages run eagerly, are not captured, or are not compiled in regions."""
        eager = (f"not compiled, since {reason}" for _, reason in self._eager_reasons)
        return tuple(dict.fromkeys([*eager, *self._notes]))

    def release(self) -> None:
        """Frees every graph and its memory; counts are kept."""
        for signature in [*self._compiled]:
            self._forget(signature)
        self._recorder = None

    def _forget(self, signature: Hashable) -> None:
        """Drops one function and its graphs, which the compiler would otherwise keep for the life of the process."""
        forget_graphs(self._compiled.pop(signature).code)

    def run(
        self,
        signature: Hashable,
        function: Callable[..., Any],
        *args: Any,
        regional: Callable[..., Any] | None = None,
        reason: str | None = None,
    ) -> Any:
        """Returns `function(*args)`, compiled for this signature, or run eagerly if that fails or a `reason` is given.

        Args:
            signature: Identifies the shapes.
            function: A plain function, the same for one signature, that returns tensors and writes none of its
                arguments.
            *args: Its arguments.
            regional: The same function with repeated regions (`torch.compiler.nested_compile_region`); compiled instead
                of `function` where that works.
            reason: Why this call must run eagerly. The next call without a reason is compiled again.
        """
        if reason is not None:
            self._note_eager(signature, reason)
        if reason is not None or signature in self._failed:
            self._eager_calls += 1
            return function(*args)
        compiled = self._compiled.get(signature)
        if compiled is None:
            use_regions = regional is not None and self._options.get("regions", True)
            compiled = self._compile(signature, regional if use_regions else function, use_regions, _buffers_of(args))
        try:
            result = compiled.run(*args)
        except CompilationError as error:
            what = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if compiled.is_regional:
                self._notes.append(f"compiled without regions, since {what}")
                _log.info("jitaccel: a stage is %s", self._notes[-1])
                self._forget(signature)
                self._compile(signature, function, False, _buffers_of(args))
                return self.run(signature, function, *args)
            self._fail(signature, what)
            self._eager_calls += 1
            return function(*args)
        self._calls += 1
        if compiled.variants > _MAX_VARIANTS:
            self._dropped += compiled.variants
            self._forget(signature)
        return result

    def _compile(
        self, signature: Hashable, function: Any, is_regional: bool, buffers: Callable[[], Iterable[Tensor]]
    ) -> _Compiled:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self._graphs += 1
            compiled.variants += 1
            run = self._run_of(graph, inputs)
            recorder = self._recorder_for(inputs)
            return run if recorder is None else Replayed(run, recorder, self._counts, self._note_unrecorded, buffers)

        self._signatures.add(signature)
        copy = _copy(function, self._copies)
        self._copies += 1
        compiled = self._compiled[signature] = _Compiled(
            torch.compile(copy, fullgraph=True, dynamic=False, backend=backend), copy.__code__, is_regional
        )
        return compiled

    def _run_of(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Returns the graph compiled by the chosen backend."""
        backend, mode, options = (self._options.get(name) for name in ("backend", "mode", "options"))
        if backend in (None, "inductor"):
            settings = inductor_options_of_mode(mode) if mode else dict(options or {})
            # Otherwise Inductor would capture CUDA graphs of its own.
            return compiled_by_inductor(graph, inputs, {**settings, "triton.cudagraphs": False})
        given = {name: value for name, value in (("mode", mode), ("options", options)) if value is not None}
        run: Callable[..., Any] = backend_named(backend)(graph, inputs, **given)
        return run

    def _recorder_for(self, inputs: Sequence[Any]) -> CallRecorder | None:
        device = next((x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda), None)
        by_default = device is not None and self._options.get("mode") != "max-autotune-no-cudagraphs"
        if not self._options.get("graphs", by_default):
            return None
        if self._recorder is None:
            self._recorder = RepeatedCalls() if device is None else CudaGraphs(device)
        return self._recorder

    def _note_unrecorded(self, reason: str) -> None:
        if self._strict:
            raise UnsupportedModelError(
                f"jitaccel: every stage must be captured with strict=True, got {reason}; "
                f"use strict=False, or compile={{'graphs': False}}"
            )
        _log.warning("jitaccel: %s", reason)
        self._notes.append(reason)

    def _fail(self, signature: Hashable, reason: str) -> None:
        """Marks a signature as one that cannot be compiled, now or later."""
        self._note_eager(signature, reason)
        self._failed.add(signature)

    def _note_eager(self, signature: Hashable, reason: str) -> None:
        """Logs why a stage runs eagerly, once per reason. Raises UnsupportedModelError if strict."""
        if self._strict:
            raise UnsupportedModelError(
                f"jitaccel: every stage must compile into one graph with strict=True, got {reason}; "
                f"use strict=False to run such stages eagerly"
            )
        if (signature, reason) not in self._eager_reasons:
            _log.warning("jitaccel: a stage runs eagerly, since %s", reason)
        self._eager_reasons[signature, reason] = None


def _buffers_of(args: Sequence[Any]) -> Callable[[], Iterable[Tensor]]:
    """Returns a function that lists the current buffers of the modules among the arguments."""
    modules = [weakref.ref(x) for x in args if isinstance(x, nn.Module)]
    return lambda: [x for module in modules if (held := module()) is not None for x in held.buffers()]


def _copy(function: Callable[..., Any], number: int) -> types.FunctionType:
    """Returns a copy of the function with its own code object, which a compiler's cache and limits are tied to."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
