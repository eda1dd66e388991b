"""Arguments and guiders with which a call cannot be accelerated correctly."""

from __future__ import annotations

from typing import Any

from torch import nn

from jitaccel.errors import UnsupportedModelError

from ..flux.kinds import Kind
from ..foreign import Arguments
from ..network import cache_problem
from ..ranks import ranks_of
from .caller import calling_guider, calling_pipeline


def refuse_arguments(module: nn.Module, kind: Kind, arguments: Arguments) -> None:
    """Raises UnsupportedModelError for arguments of a transformer call that are not known to work."""
    found = {reason for name, reason in kind.refused.items() if arguments.get(name) is not None}
    extra = arguments.get("joint_attention_kwargs") or {}
    found |= {f"joint_attention_kwargs[{name!r}]" for name in extra if name not in kind.attention_arguments}
    if (problem := cache_problem(module)) is not None:
        found.add(problem)
    if ranks_of(module).size > 1:
        divided = (*kind.residuals, *kind.masks)
        found |= {f"{name} with context parallelism" for name in divided if arguments.get(name) is not None}
        if "ip_adapter_image_embeds" in extra:
            found.add("an IP-Adapter with context parallelism")
    if (problem := guider_problem(calling_pipeline())) is not None:
        found.add(problem)
    if found:
        raise UnsupportedModelError(
            f"jitaccel: the call may only use features that can be accelerated correctly, got "
            f"{', '.join(sorted(found))}; remove() the handle for this call"
        )


def guider_problem(pipeline: object) -> str | None:
    """Returns what is wrong with the guider of a call inside `pipeline`, or in a modular pipeline or loop if None."""
    guider = calling_guider() if pipeline is None else getattr(pipeline, "guider", None)
    if guider is None or _is_linear(guider):
        return None
    return f"a guider that is not linear ({type(guider).__name__})"


def _is_linear(guider: Any) -> bool:
    """Returns whether guidance weights branches token by token with weights that sum to one, which keeps a move."""
    return type(guider).__name__ == "ClassifierFreeGuidance" and not guider.guidance_rescale
