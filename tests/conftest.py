"""Fixtures that several tests share; `tests.support.tiny` describes the pipelines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def pipe() -> Any:
    """A tiny FluxPipeline of the test's own."""
    from tests.support import tiny  # here, because diffusers takes seconds to import and most tests need none of it

    return tiny.pipeline()


@pytest.fixture(autouse=True)
def _attention_of_the_process() -> Iterator[None]:
    """Puts back the attention backend of diffusers, which a test that chooses one chooses for the whole process."""
    yield
    if (dispatch := sys.modules.get("diffusers.models.attention_dispatch")) is not None:
        default = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
        dispatch._AttentionBackendRegistry._active_backend = default


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command of the command line and returns its status, output and errors."""
    from jitaccel.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
