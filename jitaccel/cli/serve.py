"""Serve pictures over HTTP from one or more replicas, on Ray Serve."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from ..errors import CommandError
from . import options
from .limits import check_numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from ..serving.limits import Limits

    limits = Limits()
    options.add_model_options(parser, offload=False)
    parser.add_argument("--replicas", default="1", help="number of pipelines, or FEWEST-MOST to scale with the load")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs per replica; 1 on machines with GPUs")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPU cores per replica")
    parser.add_argument("--threads", type=int, help="torch threads per replica; if omitted, torch's own")
    parser.add_argument("--batch-size", type=int, default=4, help="most requests that a replica runs together")
    parser.add_argument("--packed", action="store_true", help="one forward per batch; pictures equal up to rounding")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--address", help="address of a running Ray cluster; if omitted, start one here")
    parser.add_argument("--preset", default="7x", help="preset of requests that name none")
    parser.add_argument("--max-waiting", type=int, default=limits.waiting, help="accepted requests; more get 429")
    parser.add_argument("--max-seconds", type=float, default=limits.seconds, help="time per request; then it gets 504")
    parser.add_argument("--max-pixels", type=int, default=limits.pixels, help="largest number of pixels of a picture")
    parser.add_argument("--max-steps", type=int, default=limits.steps, help="largest number of steps of a picture")


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted."""
    from ..serving.deployment import NAME, application, require_serve

    serving = serving_of(arguments)
    if arguments.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts, without asking
    serve = require_serve()
    import ray
    from ray.serve.config import HTTPOptions

    ray.init(address=arguments.address, include_dashboard=False, _node_ip_address=_own_address(arguments))
    try:
        with suppress(TimeoutError):  # Serve waits only a minute for its HTTP process, too short on a busy machine
            serve.start(http_options=HTTPOptions(host=arguments.host, port=arguments.port))
        serve.run(application(serving), name=NAME, route_prefix="/")
        wait_for_port(arguments.host, arguments.port)
        print(f"http://{arguments.host}:{arguments.port}/generate and /health; Ctrl-C ends it", flush=True)
        wait_for_the_end()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def wait_for_port(host: str, port: int, seconds: float = 120.0) -> None:
    """Waits until a port accepts connections. Raises CommandError if it does not in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return
        time.sleep(0.2)
    raise CommandError(f"--port must be free and take connections, got none on {host}:{port} within {seconds:g} s")


def wait_for_the_end() -> None:
    """Waits for an interrupt, or for the equivalent signal of a process manager."""
    ended = threading.Event()

    def end(*_: object) -> None:
        ended.set()

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def serving_of(arguments: argparse.Namespace) -> Any:
    """Returns the settings to serve. Raises CommandError and ConfigError for what cannot be served."""
    from ..serving.deployment import Serving
    from ..serving.limits import Limits

    check_numbers(arguments)
    defaults: dict[str, Any] = {"preset": options.checked_preset(arguments.preset)}
    if arguments.model is None:
        from ..loading import EMBEDDED_TEXT_TOKENS

        defaults |= {"height": 256, "width": 256, "max_sequence_length": EMBEDDED_TEXT_TOKENS}
    return Serving(
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        pickle=arguments.pickle,
        execution="auto" if arguments.packed else "indexed",
        replicas=_replicas(arguments.replicas),
        cpus=arguments.cpus,
        gpus=arguments.gpus,
        threads=arguments.threads,
        batch=arguments.batch_size,
        limits=Limits(
            waiting=arguments.max_waiting,
            seconds=arguments.max_seconds,
            pixels=arguments.max_pixels,
            steps=arguments.max_steps,
        ),
        defaults=defaults,
    )


def _replicas(text: str) -> int | tuple[int, int]:
    fewest, _, most = text.partition("-")
    try:
        return (int(fewest), int(most)) if most else int(fewest)
    except ValueError:
        raise CommandError(f"--replicas must be a number or FEWEST-MOST, got {text!r}; use 2, or 1-4") from None


def _own_address(arguments: argparse.Namespace) -> str | None:
    """Returns the address of a Ray started here: loopback, unless other machines must reach it."""
    return "127.0.0.1" if arguments.address is None and arguments.host == "127.0.0.1" else None
