"""Fixtures that several tests share; `tests.tiny` says what the pipelines are."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def pipe() -> Any:
    """A tiny FluxPipeline of the test's own."""
    from tests.support import tiny  # here, because diffusers takes seconds to import and most tests need none of it

    return tiny.pipeline()
