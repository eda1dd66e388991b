"""A call recorded once and replayed: CUDA graphs, and a stand-in where there are none.

A recording reads and writes the same memory at every replay. So what changes from call to call is copied to where it
reads, its results are copied from where it writes, and where a weight has moved, it is dropped and made anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .private import inner_tensors

Function = Callable[..., Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Recording:
    """`replay` repeats the recorded call and writes `outputs` anew, where they are."""

    outputs: Sequence[Any]
    replay: Callable[[], None]


class CallRecorder(Protocol):
    """Records calls. Those of one recorder share memory, so one is replayed at a time, and its outputs are copied."""

    def record(self, call: Callable[[], Sequence[Any]]) -> Recording:
        """Returns the recording of a call that ran once before. Raises RuntimeError for what cannot be recorded."""
        ...

    def turn(self) -> Any:
        """Returns the context in which one recording is filled, replayed and read."""
        ...


class CudaGraphs:
    """CUDA graphs of one device in one memory pool."""

    _capturing = threading.Lock()  # one capture at a time in the whole process: it synchronises the device

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def record(self, call: Callable[[], Sequence[Any]]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate meanwhile.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with self._capturing, capture:
            outputs = call()
        return Recording(outputs, graph.replay)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)  # another thread's stream may be at work
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record()


class RepeatedCalls:
    """The stand-in: a replay repeats the call on the same inputs, and copies what it returns to where it once was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def record(self, call: Callable[[], Sequence[Any]]) -> Recording:
        outputs = call()

        def replay() -> None:
            for kept, new in zip(outputs, call(), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)

        return Recording(outputs, replay)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock:
            yield


@dataclass
class Counts:
    """What recording did so far. `dropped`: recordings whose weights had moved, or whose replay failed."""

    captures: int = 0
    replays: int = 0
    dropped: int = 0


class Replayed:
    """A function of tensors alone that runs once, is recorded, and from then on replayed.

    Parameters are read where they stand; all other inputs are copied. function: reads nothing but its inputs, and
    writes none. on_failure: told once why it cannot be recorded; it runs as it is from then on.
    """

    def __init__(
        self, function: Function, recorder: CallRecorder, counts: Counts, on_failure: Callable[[str], None]
    ) -> None:
        self._function, self._recorder, self._counts, self._on_failure = function, recorder, counts, on_failure
        self._recording: Recording | None = None
        self._inputs: list[Any] = []
        self._addresses: list[int] = []
        self._is_recordable = True

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if not self._is_recordable or torch.is_grad_enabled():
            return self._function(*inputs)
        with self._recorder.turn():
            if self._recording is not None and _addresses(inputs) != self._addresses:
                self._drop()
            if self._recording is None:
                return self._first(inputs)
            return self._replay(inputs)

    def _first(self, inputs: Sequence[Any]) -> Sequence[Any]:
        results = self._function(*inputs)  # kernels are loaded and tuned here, which cannot be recorded
        try:
            self._inputs = [_own(x) for x in inputs]
            self._recording = self._recorder.record(lambda: self._function(*self._inputs))
        except RuntimeError as error:
            self._is_recordable, self._inputs = False, []
            self._on_failure(f"a stage cannot be recorded: {str(error).strip().splitlines()[0]}")
            return results
        self._addresses = _addresses(inputs)
        self._counts.captures += 1
        return results

    def _replay(self, inputs: Sequence[Any]) -> Sequence[Any]:
        assert self._recording is not None
        try:
            for kept, new in zip(self._inputs, inputs, strict=True):
                if kept is not new and isinstance(kept, Tensor):
                    kept.copy_(new)
            self._recording.replay()
            results = [x.clone() if isinstance(x, Tensor) else x for x in self._recording.outputs]
        except BaseException:
            self._drop()
            raise
        self._counts.replays += 1
        return results

    def _drop(self) -> None:
        self._recording, self._inputs, self._addresses = None, [], []
        self._counts.dropped += 1


def _own(x: Any) -> Any:
    """Returns a copy of an input, laid out alike, or the input itself where it is a parameter, or no tensor."""
    if isinstance(x, nn.Parameter) or not isinstance(x, Tensor):
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)  # a RuntimeError where elements of x share memory


def _addresses(inputs: Sequence[Any]) -> list[int]:
    """Returns where the parameters stand."""
    return [address for x in inputs if isinstance(x, nn.Parameter) for address in _addresses_of(x)]


def _addresses_of(x: Tensor) -> list[int]:
    inner = inner_tensors(x)
    return [x.data_ptr()] if inner is None else [address for each in inner for address in _addresses_of(each)]
