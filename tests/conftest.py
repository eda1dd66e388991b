"""Fixtures that several tests share; `tests.tiny` says what the pipelines are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
