"""Runs targets unchanged that cannot be accelerated correctly, if the user asked for that."""

from __future__ import annotations

import logging
from typing import Any

from jitaccel.errors import UnsupportedModelError
from jitaccel.generation.handle import Handle, Installation
from jitaccel.generation.stats import Stats, summarize
from jitaccel.method.config import JiTConfig

_log = logging.getLogger(__name__)


class DenseRoute:
    """Statistics of a target that was not patched; they give the reason."""

    def __init__(self, config: JiTConfig, reason: str) -> None:
        self.config = config
        self._reason = reason
        self.history = None  # an unpatched target cannot be observed

    def stats(self) -> Stats:
        """Returns statistics without a generation; the note says why nothing is accelerated."""
        return summarize(
            None,
            codebase="not patched",
            execution="dense",
            attention=None,
            compiled=None,
            notes=(f"runs dense: {self._reason}",),
            config=self.config,
            generations=0,
        )

    def reset(self) -> None:
        """Does nothing; nothing is stored."""


def leave_dense(target: Any, config: JiTConfig, error: UnsupportedModelError) -> Installation:
    """Returns an installation that changes nothing, and warns that the target runs without acceleration."""
    _log.warning("jitaccel: %s runs dense: %s", type(target).__name__, error)
    return Installation(route=DenseRoute(config, str(error)), install=_change_nothing)


def _change_nothing(target: Any, handle: Handle) -> None:
    """Leaves the target unchanged."""
