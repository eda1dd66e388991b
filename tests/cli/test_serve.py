"""`jitaccel serve` as far as it goes without Ray."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from typing import Any

import pytest

from jitaccel import ConfigError
from jitaccel.cli import main, serve
from jitaccel.errors import CommandError
from jitaccel.serving.deployment import Serving, check_served
from tests.support import tiny
from tests.support.qwen import qwen_pipeline
from tests.support.video import wan_pipeline


def serving(*arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.serving_of(parser.parse_args(arguments))


def test_arguments_become_what_is_served() -> None:
    found = serving("--replicas", "1-4", "--packed", "--max-steps", "30", "--model", "a/b", "--preset", "4x")
    assert found.replicas == (1, 4) and found.execution == "auto" and found.limits.steps == 30
    assert found.defaults == {"preset": "4x"}
    embedded = serving()
    assert embedded.replicas == 1 and embedded.execution == "indexed" and embedded.defaults["height"] == 256


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("--replicas", "many"), CommandError, "--replicas must be a number or FEWEST-MOST, got 'many'"),
        (("--replicas", "0"), ConfigError, "replicas must be at least 1"),
        (("--replicas", "4-2"), ConfigError, "the fewest first, got"),
        (("--batch-size", "0"), CommandError, "--batch-size must be in 1..1024, got 0"),
        (("--preset", "9x"), CommandError, "--preset must be 4x"),
        (("--max-waiting", "0"), ConfigError, "waiting must be above 0, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: tuple[str, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        serving(*arguments)


def test_pipelines_that_make_videos_are_not_served() -> None:
    check_served(tiny.pipeline())
    check_served(qwen_pipeline())
    with pytest.raises(CommandError, match="got a WanPipeline, which makes videos"):
        check_served(wan_pipeline())


def test_missing_ray_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    assert main(["serve"]) == 2
    assert 'pip install "jitaccel[serve]"' in capsys.readouterr().err


def test_port_that_takes_no_connections_is_an_error() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with pytest.raises(CommandError, match="got none on"):
            serve.wait_for_port("127.0.0.1", port, seconds=0.5)
        listening.listen()
        serve.wait_for_port("127.0.0.1", port, seconds=5.0)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_end_the_wait(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    sender = threading.Timer(0.2, os.kill, (os.getpid(), number))
    sender.start()
    serve.wait_for_the_end()
    assert signal.getsignal(number) is before


def test_other_execution_is_refused() -> None:
    with pytest.raises(ConfigError, match="execution must be one of indexed, auto, got 'packed'"):
        Serving(execution="packed")
