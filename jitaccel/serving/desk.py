"""Answers HTTP: a bounded number of accepted requests, a time limit, and a retry if a replica ends."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..generation.batch import Request
from .events import Event, Failed, FinishedPicture, Progress
from .limits import Limits, RefusedError, request_of

Ask = Callable[[Request], AsyncIterator[Event]]
"""Passes a request to a replica and yields its events. Raises ReplicaLostError if the replica ends."""
STATISTICS = "X-Jitaccel-Statistics"  # the header with statistics as JSON, next to a PNG body
_JSON, _EVENTS, _PNG = "application/json", "text/event-stream", "image/png"


class ReplicaLostError(Exception):
    """The replica that had a request ended before it answered."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one HTTP request. body: complete, or an iterator of pieces."""

    status: int
    media: str
    body: bytes | AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


class Desk:
    """Accepts requests and returns pictures.

    Args:
        ask: Passes one request to a replica.
        replicas: Returns the number of replicas in each state; those "RUNNING" can work.
        limits: Limits on requests.
        defaults: Values for fields that a request leaves out.
        facts: Additional content of `/health`.
    """

    def __init__(
        self,
        ask: Ask,
        replicas: Callable[[], Awaitable[Mapping[str, int]]],
        limits: Limits,
        defaults: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._ask, self._replicas, self._limits = ask, replicas, limits
        self._defaults, self._facts = dict(defaults or {}), dict(facts or {})
        self._tasks: set[asyncio.Task[Any]] = set()
        self.num_accepted = 0

    async def answer(self, method: str, path: str, body: bytes, accept: str = "") -> Reply:
        """Returns the answer to one HTTP request; cancelling this cancels the request.

        Args:
            method: "GET" or "POST".
            path: "/generate" or "/health".
            body: JSON for "/generate".
            accept: The header Accept. "application/json" returns picture and statistics in one object,
                "text/event-stream" adds progress, anything else returns a PNG.
        """
        try:
            wanted = {"/generate": "POST", "/health": "GET"}.get(path)
            if wanted is None:
                raise RefusedError(404, f"the path must be /generate or /health, got {path}")
            if method != wanted:
                raise RefusedError(405, f"{path} must be called with {wanted}, got {method}")
            if path == "/health":
                return await self._health()
            request = request_of(body, self._limits, self._defaults)
            if self.num_accepted >= self._limits.waiting:
                raise RefusedError(429, f"{self._limits.waiting} requests are already waiting; send it again later")
            self.num_accepted += 1
            if _EVENTS in accept:
                return Reply(status=200, media=_EVENTS, body=self._stream(request))
            try:
                made = await self._accepted(request)
            finally:
                self._release()
        except RefusedError as error:
            headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
            return Reply(status=error.status, media=_JSON, body=_error(error), headers=headers)
        if _JSON in accept:
            return Reply(status=200, media=_JSON, body=json.dumps(_whole(made)).encode())
        return Reply(status=200, media=_PNG, body=made.png, headers={STATISTICS: json.dumps(dict(made.statistics))})

    async def _health(self) -> Reply:
        try:
            async with asyncio.timeout(5.0):
                replicas = dict(await self._replicas())
        except TimeoutError:
            replicas = {}
        is_well = replicas.get("RUNNING", 0) > 0
        said = {
            "status": "ok" if is_well else "no replica is running",
            "replicas": replicas,
            "accepted": self.num_accepted,
            "limit": self._limits.waiting,
            **self._facts,
        }
        return Reply(status=200 if is_well else 503, media=_JSON, body=json.dumps(said).encode())

    async def _accepted(self, request: Request, note: Callable[[Progress], None] = lambda _: None) -> FinishedPicture:
        """Returns the picture of an accepted request. Raises RefusedError if it could not be made."""
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._made(request, note)
        except TimeoutError:
            raise RefusedError(504, f"the picture must be made within {self._limits.seconds:g} s, got none") from None

    def _release(self, _: Any = None) -> None:
        self.num_accepted -= 1

    async def _made(self, request: Request, note: Callable[[Progress], None]) -> FinishedPicture:
        reason = "no replica took it"
        for _ in range(self._limits.tries):
            try:
                async with aclosing(self._ask(request)) as events:  # type: ignore[type-var]  # ends by itself too
                    async for event in events:
                        if isinstance(event, Failed):
                            raise RefusedError(event.status, event.reason)
                        if isinstance(event, FinishedPicture):
                            return event
                        note(event)
                reason = "the replica ended without an answer"
            except ReplicaLostError as error:
                reason = str(error)
        raise RefusedError(
            503, f"the request was given to {self._limits.tries} replicas, got no answer ({reason}); send it again"
        )

    def _stream(self, request: Request) -> AsyncIterator[bytes]:
        """Returns server-sent events: `progress`, and at the end `picture` or `error`.

        The work runs as a separate task, so that a response nobody reads does not occupy a place for ever.
        """
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def work() -> None:
            try:
                made = await self._accepted(request, lambda event: lines.put_nowait(_sse("progress", vars(event))))
                lines.put_nowait(_sse("picture", _whole(made)))
            except RefusedError as error:
                lines.put_nowait(_sse("error", {"status": error.status, "error": error.reason}))
            finally:
                lines.put_nowait(None)

        task = asyncio.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._release)  # a task that is cancelled before it starts does not run its `finally`

        async def read() -> AsyncIterator[bytes]:
            try:
                while (line := await lines.get()) is not None:
                    yield line
            finally:
                task.cancel()

        return read()


def _whole(made: FinishedPicture) -> dict[str, Any]:
    return {"image": base64.b64encode(made.png).decode(), "statistics": dict(made.statistics)}


def _sse(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(dict(data))}\n\n".encode()


def _error(error: RefusedError) -> bytes:
    return json.dumps({"error": error.reason}).encode()
