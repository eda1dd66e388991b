"""Fixtures for tests of compiled stages and of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jitaccel.execution.attention.choice import choose_backend
from tests.support.compiling import Counting


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[False, True], ids=["compiled", "captured"])
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `apply` gets: graphs as they are, without and with the stand-in of CUDA graphs."""
    return {"backend": Counting(), "graphs": request.param}


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    """Machines are faked, so nothing that was chosen may be kept."""
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()
