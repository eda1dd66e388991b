"""Which diffusers pipeline is running, seen from inside one of its components.

Pipelines share transformers and schedulers (`from_pipe`, `FluxPipeline(**pipe.components)`), and neither is told who
calls. The call stack knows, exactly: so a patch on one pipeline leaves the others alone.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline


def calling_pipeline() -> Any:
    """Returns the innermost pipeline on this thread's call stack, or None: somebody's own loop."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
