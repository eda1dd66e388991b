"""The server on Ray Serve: one front that accepts requests, and replicas with one pipeline each.

The front decides (`Desk`); a replica batches and computes (`Batcher`). Both are plain Python; only this file uses Ray.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..errors import CommandError, ConfigError
from ..execution.options import Mode
from ..generation.batch import Request
from ..version import __version__
from .batcher import Batcher
from .desk import Desk, ReplicaLostError, Reply
from .events import Event
from .limits import Limits

NAME = "jitaccel"  # name of the application
_REPLICAS = "Replica"  # name of the replicas' deployment
_MODES: tuple[Mode, ...] = ("indexed", "auto")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and by how many replicas.

    Attributes:
        model: Folder or hub id of a text-to-image pipeline; None for the embedded one.
        dtype: As in `jitaccel generate`.
        device: As in `jitaccel generate`.
        pickle: As in `jitaccel generate`.
        execution: With "indexed", a picture is the same bit for bit whatever else is in its batch. "auto" packs a batch
            into one forward, which is faster on a GPU; pictures are then the same up to rounding.
        replicas: Number of replicas, or (fewest, most): Serve then adds and removes replicas by `target_ongoing`.
        target_ongoing: With (fewest, most): the number of requests per replica that Serve aims at; None is one batch.
        cpus: CPUs that Ray reserves for each replica.
        gpus: GPUs that Ray reserves for each replica.
        threads: torch threads in each replica; None keeps torch's default.
        batch: Largest number of requests in a batch; only FLUX.1 runs them together.
        limits: Limits on requests.
        defaults: Values for fields that a request leaves out.
    """

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    pickle: bool = False
    execution: Mode = "indexed"
    replicas: int | tuple[int, int] = 1
    target_ongoing: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int | None = None
    batch: int = 4
    limits: Limits = field(default_factory=Limits)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fewest, most = self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)
        problems = []
        if not 1 <= fewest <= most:
            problems.append(f"Serving: replicas must be at least 1, the fewest first, got {self.replicas}; use 1")
        if self.batch < 1:
            problems.append(f"Serving: batch must be at least 1, got {self.batch}; use 4")
        if self.execution not in _MODES:
            problems.append(f"Serving: execution must be one of {', '.join(_MODES)}, got {self.execution!r}")
        if problems:
            raise ConfigError("\n".join(problems))


class Replica:
    """One pipeline."""

    def __init__(self, serving: Serving) -> None:
        import torch

        from ..generation.batch import generate_batch
        from ..loading import load_pipeline

        if serving.threads is not None:
            torch.set_num_threads(serving.threads)
        pipe = load_pipeline(serving.model, serving.dtype, serving.device, pickle=serving.pickle)
        check_served(pipe)
        pipe.set_progress_bar_config(disable=True)

        def generate(requests: Any, on_step: Any, on_outcome: Any) -> None:
            generate_batch(pipe, requests, execution=serving.execution, on_step=on_step, on_outcome=on_outcome)

        self._batcher = Batcher(generate, most=serving.batch, who=str(os.getpid()))

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """Yields the events of a request."""
        async with aclosing(self._batcher.events(request)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    def check_health(self) -> None:
        """Raises if the device is lost, after which every generation fails; Serve then starts another replica."""
        import torch

        error = self._batcher.last_error
        if isinstance(error, torch.AcceleratorError):
            raise RuntimeError(f"jitaccel: the device failed: {error}") from error


def check_served(pipe: Any) -> None:
    """Raises CommandError for a pipeline that makes videos."""
    from ..loading import makes_videos

    if makes_videos(type(pipe)):
        raise CommandError(
            f"--model must make pictures, got a {type(pipe).__name__}, which makes videos; make those with "
            f"`jitaccel generate`"
        )


class Front:
    """Answers HTTP requests."""

    def __init__(self, replicas: Any, serving: Serving) -> None:
        facts = {"model": serving.model or "embedded", "version": __version__}
        ask = functools.partial(_ask, replicas.options(stream=True))
        self._desk = Desk(ask, _states, serving.limits, serving.defaults, facts)
        self._most = serving.limits.body_bytes

    async def __call__(self, http: Any) -> Any:
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > self._most:
                break  # the body is already too long
        path = http.url.path.removeprefix(http.scope.get("root_path", ""))
        return _response(await self._desk.answer(http.method, path, bytes(body), http.headers.get("accept", "")))


def _response(reply: Reply) -> Any:
    from starlette.responses import Response, StreamingResponse

    kind = Response if isinstance(reply.body, bytes) else StreamingResponse
    return kind(reply.body, status_code=reply.status, media_type=reply.media, headers=dict(reply.headers))


async def _ask(replicas: Any, request: Request) -> AsyncIterator[Event]:
    """Yields a replica's events for a request; cancels its work if the reader stops."""
    from ray.exceptions import RayActorError

    answers = replicas.events.remote(request)
    try:
        async for event in answers:
            yield event
    except RayActorError as error:
        raise ReplicaLostError("the replica ended") from error
    finally:
        answers.cancel()


async def _states() -> Mapping[str, int]:
    """Returns the number of replicas in each state."""
    import asyncio

    from ray import serve

    status = await asyncio.to_thread(serve.status)
    states = status.applications[NAME].deployments[_REPLICAS].replica_states
    return {str(getattr(state, "value", state)): int(count) for state, count in states.items()}


def application(serving: Serving) -> Any:
    """Returns the application for `serve.run`. Raises CommandError if Ray is missing."""
    serve = require_serve()
    ongoing = 2 * serving.batch  # the running batch and the next
    scale: dict[str, Any] = {"num_replicas": serving.replicas}
    if isinstance(serving.replicas, tuple):
        fewest, most = serving.replicas
        target = serving.target_ongoing or serving.batch
        scale = {
            "autoscaling_config": {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": target}
        }
    replica = serve.deployment(
        Replica,
        name=_REPLICAS,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.gpus},
        **scale,
    )
    front = serve.deployment(
        Front,
        name="Front",
        num_replicas=1,  # so that it counts all accepted requests
        max_ongoing_requests=4 * serving.limits.waiting + 100,  # requests beyond it are refused, not queued
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replica.bind(serving), serving)


def require_serve() -> Any:
    """Returns `ray.serve`. Raises CommandError if it is missing."""
    try:
        from ray import serve
    except ImportError as error:
        raise CommandError(
            f'ray with its serve extra must be installed, got none ({error}); pip install "jitaccel[serve]"'
        ) from None
    return serve
