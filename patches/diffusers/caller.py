"""Which diffusers pipeline is running, seen from inside one of its components.

Pipelines share transformers and schedulers (`from_pipe`, `FluxPipeline(**pipe.components)`), which do not know their
caller. The call stack identifies it exactly, so a patch on one pipeline does not affect the others.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline


def calling_pipeline() -> Any:
    """Returns the innermost pipeline on this thread's call stack; None in a custom loop."""
    frame = _calling_frame()
    return None if frame is None else frame.f_locals["self"]


def _calling_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def argument_of_call(name: str) -> Any:
    """Returns an argument of the innermost pipeline's call on this thread's call stack; None if there is none."""
    frame = _calling_frame()
    while frame is not None and frame.f_code.co_name != "__call__":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)


def is_called_elsewhere(pipeline: Any, thread: int | None) -> bool:
    """Returns whether another thread is inside a call of a pipeline.

    Args:
        pipeline: The pipeline, compared by identity.
        thread: The thread's identity from `threading.get_ident`; None returns False.
    """
    if thread is None or thread == threading.get_ident():
        return False
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline:
            return True
        frame = frame.f_back
    return False


def calling_guider() -> Any:
    """Returns the guider of the modular pipeline on this thread's call stack, or None.

    The blocks of a modular pipeline hold it in a local variable `components`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "components" in frame.f_code.co_varnames:
            guider = getattr(frame.f_locals.get("components"), "guider", None)
            if guider is not None:
                return guider
        frame = frame.f_back
    return None
