"""Transformers that cannot be accelerated, with the reasons, and an inspection of unknown transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from jitaccel.execution.private import uncompiled

from . import model_of

_CONVOLUTION = "every block has a 3x3 convolution over the grid, which needs all tokens"
_NO_FLOW = "it does not predict the velocity of flow matching (DDIM and DPM schedulers), on which the method rests"
REFUSED: Mapping[str, str] = {
    "SanaTransformer2DModel": _CONVOLUTION,
    "SanaVideoTransformer3DModel": _CONVOLUTION,
    "CogVideoXTransformer3DModel": _NO_FLOW,
    "PixArtTransformer2DModel": _NO_FLOW,
}
_PLACES: Mapping[str, tuple[str, ...]] = {
    "makes tokens": ("patch_embedding", "x_embedder", "patch_embed", "img_in", "proj_in", "visual_embeddings"),
    "knows positions": ("rope", "pos_embed", "pe_embedder", "rope_embedder", "visual_rope_embeddings"),
    "projects last": ("proj_out", "final_layer", "out_layer"),
}


def reason_against(transformer: Any) -> str | None:
    """Returns why a transformer cannot be accelerated, found by its class or a base class; None if not listed."""
    names = [kind.__name__ for kind in type(uncompiled(transformer)).__mro__]
    return next((reason for name, reason in REFUSED.items() if name in names), None)


def places_found(transformer: Any) -> dict[str, str]:
    """Returns the submodules at which a transformer might be cut, by role; empty unless every role is found."""
    if not isinstance(transformer, nn.Module):
        return {}
    own = dict(uncompiled(transformer).named_children())
    found = {what: next((name for name in names if name in own), None) for what, names in _PLACES.items()}
    return {what: name for what, name in found.items() if name} if all(found.values()) else {}


def remark_on(target: Any) -> str:
    """Returns an addition to the error for a refused or unknown transformer; "" if there is nothing to add."""
    if (reason := reason_against(target)) is not None:
        return f". {type(uncompiled(target)).__name__} cannot be accelerated: {reason}"
    if model_of(target) is None and (places := places_found(target)):
        listed = ", ".join(f"{name} ({what})" for what, name in places.items())
        return (
            f". {type(uncompiled(target)).__name__} has {listed}, so support can probably be added: see "
            f"docs/adding-a-model.md; jitaccel does not guess"
        )
    return ""
