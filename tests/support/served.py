"""Starts `jitaccel serve` as a process on loopback, sends requests to it, and ends it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
READY_S = 480.0
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # the default, 5, is too short on two busy cores
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",  # 15 by default, which starves replicas on a busy machine
    "OMP_NUM_THREADS": "1",
}


def has_ray() -> bool:
    """Returns whether Ray Serve is installed."""
    return importlib.util.find_spec("ray") is not None and importlib.util.find_spec("ray.serve") is not None


@dataclass(frozen=True)
class Answered:
    """An HTTP response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def said(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running server; `process` is that of the command."""

    url: str
    process: int

    def get(self, path: str) -> Answered:
        """Returns the response to GET."""
        return _answer(urllib.request.Request(f"{self.url}{path}"))

    def generate(self, body: Any, accept: str = "image/png") -> Answered:
        """Returns the response to a request, whose body is bytes or a value to send as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Accept": accept, "Content-Type": "application/json"}
        return _answer(urllib.request.Request(f"{self.url}/generate", data=data, headers=headers, method="POST"))


def _answer(request: urllib.request.Request) -> Answered:
    try:
        with urllib.request.urlopen(request, timeout=120.0) as answer:
            return Answered(answer.status, _lower(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        return Answered(error.code, _lower(error.headers), error.read())


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextmanager
def served(*arguments: str) -> Iterator[Server]:
    """Runs `jitaccel serve` on a free port until the block ends; raises with its output if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, because paths of sockets are limited
    log = (folder / "server.log").open("w+")
    command = [sys.executable, "-m", "jitaccel", "serve", "--port", str(port), *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **QUIET, "RAY_TMPDIR": str(folder), "PYTHONPATH": paths},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_until_ready(process, folder / "server.log", time.monotonic() + READY_S)
        yield Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60.0)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, until: float) -> None:
    while "/generate" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.5)
