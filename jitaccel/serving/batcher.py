"""Batches the waiting requests of one pipeline: `generate_batch` on a thread, with steps and pictures as they come."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..generation.batch import OnBatchStep, OnOutcome, Outcome, Request
from .events import Event, Failed, FinishedPicture, Progress

_log = logging.getLogger(__name__)

Generate = Callable[[Sequence[Request], OnBatchStep, OnOutcome], Any]
"""`generate_batch` on a pipeline; raises ConfigError if it refuses requests before it runs any."""


class _LeftError(Exception):
    """Nobody waits for the picture any more."""


@dataclass(eq=False)
class _Ticket:
    request: Request
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    came: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    has_left: bool = False
    is_answered: bool = False

    def tell(self, event: Event) -> None:
        """Delivers an event, from the computing thread."""
        self.is_answered = not isinstance(event, Progress)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Batcher:
    """Runs requests in order of arrival, as many at once as are waiting, on one thread.

    Args:
        generate: Makes the pictures of a batch.
        most: Largest number of requests in a batch.
        who: Name of this replica in statistics.
    """

    def __init__(self, generate: Generate, *, most: int = 4, who: str = "") -> None:
        self._generate, self._most, self._who = generate, most, who
        self._waiting: deque[_Ticket] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jitaccel")
        self._running: asyncio.Task[None] | None = None
        self.last_error: BaseException | None = None

    @property
    def num_waiting(self) -> int:
        """Number of requests that no batch has taken yet."""
        return len(self._waiting)

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """Yields a request's steps, and finally its picture or error. Closing this generator cancels the request."""
        ticket = _Ticket(request, asyncio.get_running_loop())
        self._waiting.append(ticket)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            while True:
                event = await ticket.events.get()
                yield event
                if not isinstance(event, Progress):
                    return
        finally:
            ticket.has_left = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    async def _run(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            await asyncio.get_running_loop().run_in_executor(self._thread, self._make, batch)

    def _make(self, batch: Sequence[_Ticket]) -> None:
        """Answers every ticket of a batch, on the thread; if the batch as a whole is refused, runs each alone."""
        now = time.monotonic()
        for ticket in batch:
            ticket.begun = now

        def on_step(index: int, step: int, steps: int) -> None:
            if batch[index].has_left:
                raise _LeftError
            batch[index].tell(Progress(step, steps))

        def on_outcome(index: int, outcome: Outcome) -> None:
            batch[index].tell(self._event(batch[index], outcome, len(batch)))

        try:
            self._generate([ticket.request for ticket in batch], on_step, on_outcome)
        except Exception as error:
            left = [ticket for ticket in batch if not ticket.is_answered]
            if len(batch) > 1:
                for ticket in left:
                    self._make([ticket])
                return
            for ticket in left:
                ticket.tell(self._failed(error))
        for ticket in batch:
            if not ticket.is_answered:
                ticket.tell(Failed(500, "the generation ended without a picture; send the request again"))

    def _event(self, ticket: _Ticket, outcome: Outcome, size: int) -> Event:
        if outcome.error is not None:
            return self._failed(outcome.error)
        try:
            png = _png_of(outcome.image)
        except Exception as error:
            return self._failed(error)
        request, now = ticket.request, time.monotonic()
        return FinishedPicture(
            png,
            {
                "preset": request.preset,
                "steps": request.config().steps,
                "seed": request.seed,
                "height": outcome.image.height,
                "width": outcome.image.width,
                "token_steps": outcome.token_steps,
                "batch": size,
                "waiting_s": round(ticket.begun - ticket.came, 4),
                "generation_s": round(now - ticket.begun, 4),
                "replica": self._who,
            },
        )

    def _failed(self, error: BaseException) -> Failed:
        if isinstance(error, ConfigError):
            return Failed(400, str(error))
        if not isinstance(error, _LeftError):
            self.last_error = error
            _log.error("jitaccel: a generation failed", exc_info=error)
        return Failed(500, f"the generation failed: {type(error).__name__}: {error}")


def _png_of(image: Any) -> bytes:
    """Returns a picture as PNG without metadata, so that equal pictures give equal bytes."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
