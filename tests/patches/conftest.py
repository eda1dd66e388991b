"""Fixtures for tests of patches."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import tiny


@pytest.fixture
def model() -> Any:
    """A tiny FluxTransformer2DModel."""
    return tiny.transformer()
