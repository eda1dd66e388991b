"""Records a call once and replays it: CUDA graphs, and a stand-in for devices without them.

A recording reads and writes the same memory at every replay. So inputs that change from call to call are copied to
where it reads, and its results are copied from where it writes. If a weight has moved, the recording is dropped and
made again. Parameters, buffers, and inputs that are too large to copy each time are read in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .private import inner_tensors

Function = Callable[..., Sequence[Any]]
_MOST_COPIED = 256 * 2**20  # bytes of an input; takes 0.1 ms at 4.8 TB/s
_MOST_DROPPED = 3  # recordings of one function that moving inputs may invalidate before it is no longer recorded


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded call. `replay` repeats it and writes the results into `outputs` again."""

    outputs: Sequence[Any]
    replay: Callable[[], None]


class CallRecorder(Protocol):
    """Records calls. Those of one recorder share memory, so they are replayed one at a time; outputs are copied."""

    def record(self, call: Callable[[], Sequence[Any]]) -> Recording:
        """Returns the recording of a call that has run once before. Raises RuntimeError if it cannot be recorded."""
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
        # thread_local: other threads may allocate during the capture.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with self._capturing, capture:
            outputs = call()
        return Recording(outputs, graph.replay)

    @contextmanager
    def turn(self) -> Iterator[None]:
        refuse_capture()
        with self._lock, torch.cuda.device(self._device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)  # another stream may still use the memory
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record()


def refuse_capture() -> None:
    """Raises RuntimeError if the current stream is already being captured, because captures cannot be nested."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "jitaccel: a stage that is captured as a CUDA graph must run outside of other captures, got a call within "
            "one; use compile={'graphs': False} to capture it yourself, or leave your torch.cuda.graph out"
        )


class RepeatedCalls:
    """The stand-in: a replay repeats the call on the same inputs and copies the results into the recorded outputs."""

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
    """Counts of recordings. `dropped`: those whose weights had moved, or whose replay failed."""

    captures: int = 0
    replays: int = 0
    dropped: int = 0


class Replayed:
    """A function of tensors alone that runs once, is recorded, and from then on replayed.

    Parameters, buffers and inputs of more than `most_copied` bytes are read in place; other inputs are copied.

    Args:
        function: Reads only its inputs, and writes none of them.
        recorder: Records the calls.
        counts: Counts to update.
        on_failure: Called once with the reason if the function cannot be recorded; it then runs unrecorded.
        buffers: Returns the buffers that inputs may be; called when a call is recorded.
        most_copied: Size in bytes of the largest input that is copied at each replay.
    """

    def __init__(
        self,
        function: Function,
        recorder: CallRecorder,
        counts: Counts,
        on_failure: Callable[[str], None],
        buffers: Callable[[], Iterable[Tensor]] = tuple,
        most_copied: int = _MOST_COPIED,
    ) -> None:
        self._function, self._recorder, self._counts, self._on_failure = function, recorder, counts, on_failure
        self._buffers, self._most_copied = buffers, most_copied
        self._recording: Recording | None = None
        self._inputs: list[Any] = []
        self._stands: list[bool] = []
        self._addresses: list[int] = []
        self._is_recordable, self._dropped = True, 0

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if not self._is_recordable or torch.is_grad_enabled():
            return self._function(*inputs)
        with self._recorder.turn():
            if self._recording is not None and self._addresses_of(inputs) != self._addresses:
                self._drop()
            if not self._is_recordable:
                return self._function(*inputs)
            if self._recording is None:
                return self._first(inputs)
            return self._replay(inputs)

    def _first(self, inputs: Sequence[Any]) -> Sequence[Any]:
        results = self._function(*inputs)  # loads and tunes kernels, which cannot be recorded
        buffers = {id(x) for x in self._buffers()}
        self._stands = [self._stands_still(x, buffers) for x in inputs]
        try:
            self._inputs = [x if stands else _own(x) for x, stands in zip(inputs, self._stands, strict=True)]
            self._recording = self._recorder.record(lambda: self._function(*self._inputs))
        except RuntimeError as error:
            self._give_up(str(error).strip().splitlines()[0])
            return results
        self._addresses = self._addresses_of(inputs)
        self._counts.captures += 1
        return results

    def _replay(self, inputs: Sequence[Any]) -> Sequence[Any]:
        assert self._recording is not None
        try:
            for kept, new, stands in zip(self._inputs, inputs, self._stands, strict=True):
                if not stands and kept is not new and isinstance(kept, Tensor):
                    kept.copy_(new)
            self._recording.replay()
            results = [x.clone() if isinstance(x, Tensor) else x for x in self._recording.outputs]
        except BaseException:
            self._drop()
            raise
        self._counts.replays += 1
        return results

    def _drop(self) -> None:
        large = [x for x, stands in zip(self._inputs, self._stands, strict=True) if stands and self._is_large(x)]
        self._recording, self._inputs, self._addresses = None, [], []
        self._counts.dropped += 1
        self._dropped += 1
        if large and self._dropped >= _MOST_DROPPED:
            size = max(x.numel() * x.element_size() for x in large) / 2**20
            self._give_up(f"an input of {size:.0f} MiB, too large to be copied at each replay, moves between calls")

    def _give_up(self, reason: str) -> None:
        self._is_recordable, self._inputs = False, []
        self._on_failure(f"a stage cannot be recorded: {reason}")

    def _stands_still(self, x: Any, buffers: Collection[int]) -> bool:
        return isinstance(x, nn.Parameter) or id(x) in buffers or self._is_large(x)

    def _is_large(self, x: Any) -> bool:
        """Whether an input is not a parameter and too large to copy each time."""
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
            return False
        return x.numel() * x.element_size() > self._most_copied

    def _addresses_of(self, inputs: Sequence[Any]) -> list[int]:
        """Returns the addresses of the inputs that are read in place."""
        standing = (x for x, stands in zip(inputs, self._stands, strict=True) if stands)
        return [address for x in standing for address in _addresses_of(x)]


def _own(x: Any) -> Any:
    """Returns a copy of an input with the same layout, or the input itself if it is not a tensor."""
    if not isinstance(x, Tensor):
        return x
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)  # raises RuntimeError if elements of x share memory


def _addresses_of(x: Tensor) -> list[int]:
    inner = inner_tensors(x)
    return [x.data_ptr()] if inner is None else [address for each in inner for address in _addresses_of(each)]
