"""Fixtures for tests of custom loops."""

from __future__ import annotations

import pytest

from tests.support.transformer_loop import Loop


@pytest.fixture
def loop() -> Loop:
    return Loop()
