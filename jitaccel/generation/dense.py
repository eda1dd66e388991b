"""What cannot be accelerated correctly, left as it is where the user asked for that."""

from __future__ import annotations

import logging
from typing import Any

from jitaccel.errors import UnsupportedModelError
from jitaccel.generation.handle import HANDLE, Handle
from jitaccel.generation.stats import Stats, summarize
from jitaccel.method.config import JiTConfig

_log = logging.getLogger(__name__)


class DenseRoute:
    """Statistics of a target that was not patched, and why."""

    def __init__(self, config: JiTConfig, reason: str) -> None:
        self.config = config
        self._reason = reason

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
        """Nothing is kept."""


def earlier_handles(target: Any) -> list[Handle]:
    """Returns the handles of earlier applies to a target, wherever a patch of ours keeps them."""
    found: list[Any] = [getattr(target, "__dict__", {}).get(HANDLE)]
    scheduler = getattr(target, "scheduler", None)
    found.append(getattr(getattr(scheduler, "__dict__", {}).get("set_timesteps"), HANDLE, None))
    registry = getattr(target, "__dict__", {}).get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("jitaccel")
    found += [] if hook is None else [handle for handle in hook.handles.values() if handle.target is target]
    return [handle for handle in dict.fromkeys(found) if handle is not None and handle.target is target]


def leave_dense(target: Any, config: JiTConfig, error: UnsupportedModelError) -> Handle:
    """Returns a handle that changed nothing, and warns that the target runs without acceleration."""
    for old in earlier_handles(target):
        old.remove()
    _log.warning("jitaccel: %s runs dense: %s", type(target).__name__, error)
    return Handle(target, DenseRoute(config, str(error)))
