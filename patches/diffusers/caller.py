"""Which diffusers pipeline is running, seen from inside one of its components.

Pipelines share transformers and schedulers (`from_pipe`, `FluxPipeline(**pipe.components)`), and neither is told who
calls. The call stack knows, exactly: so a patch on one pipeline leaves the others alone.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor


def calling_pipeline() -> Any:
    """Returns the innermost pipeline on this thread's call stack, or None: somebody's own loop."""
    frame = _calling_frame()
    return None if frame is None else frame.f_locals["self"]


def _calling_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def calling_guider() -> Any:
    """Returns the guider of the modular pipeline on this thread's call stack, or None.

    Its blocks hold their pipeline in a variable `components`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "components" in frame.f_code.co_varnames:
            guider = getattr(frame.f_locals.get("components"), "guider", None)
            if guider is not None:
                return guider
        frame = frame.f_back
    return None


def unguided_branch() -> dict[str, Tensor] | None:
    """Returns what the calling pipeline's second call of each step will ask (true CFG), or None where it makes none.

    Read off the pipeline's own variables; who relies on it compares it with the call when that comes.
    """
    frame = _calling_frame()
    if frame is None or not frame.f_locals.get("do_true_cfg"):
        return None
    names = {
        "encoder_hidden_states": "negative_prompt_embeds",
        "pooled_projections": "negative_pooled_prompt_embeds",
        "txt_ids": "negative_text_ids",
    }
    found = {argument: frame.f_locals.get(name) for argument, name in names.items()}
    return found if all(isinstance(tensor, Tensor) for tensor in found.values()) else None  # type: ignore[return-value]


def inpainted_tokens(batch: int, num_tokens: int) -> Tensor | None:
    """Returns the tokens (batch, num_tokens) under the mask with which the calling pipeline blends each step, or None.

    Read off the pipeline's own variables: an inpainting pipeline tells its transformer nothing of it.
    """
    frame = _calling_frame()
    if frame is None or "Inpaint" not in type(frame.f_locals["self"]).__name__:
        return None
    mask = frame.f_locals.get("mask")  # (B, N, C), of latents
    if not isinstance(mask, Tensor) or mask.ndim != 3 or mask.shape[1] != num_tokens:
        return None
    return (mask > 0).any(dim=2).expand(batch, -1)
