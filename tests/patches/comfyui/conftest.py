"""Fixtures for tests of ComfyUI."""

from __future__ import annotations

import pytest

from tests.support import comfy_stand_in as comfy


@pytest.fixture(autouse=True)
def _comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    comfy.install(monkeypatch)
