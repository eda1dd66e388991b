"""One patch for each codebase. A patch answers five questions about a model and knows no mathematics:

where the token grid is, which tokens are generated, what this and the next noise level are, how the model runs on
a subset of tokens, and which call of a step this is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jitaccel.config import JiTConfig
from jitaccel.errors import UnsupportedModelError
from jitaccel.handle import Handle


@dataclass(frozen=True, kw_only=True)
class Patch:
    """How one codebase is patched. `matches` must not import it; `apply` gets target, settings and known levels."""

    name: str
    matches: Callable[[Any], bool]
    apply: Callable[[Any, JiTConfig, tuple[float, ...] | None], Handle]


def is_instance_of(target: Any, package: str, *names: str) -> bool:
    """Returns whether the target's class, or one it derives from, has one of these names in this package.

    Looks through `torch.compile`'s wrapper. Imports nothing.
    """
    target = getattr(target, "_orig_mod", target)
    return any(
        kind.__name__ in names and kind.__module__.split(".")[0] == package for kind in type(target).__mro__
    )


def _lazily(module: str, function: str) -> Callable[..., Handle]:
    def apply(*args: Any) -> Handle:
        patch: Callable[..., Handle] = getattr(importlib.import_module(module, __name__), function)
        return patch(*args)

    return apply


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="diffusers FluxPipeline",
        matches=lambda target: is_instance_of(target, "diffusers", "DiffusionPipeline"),
        apply=_lazily(".diffusers_flux", "apply_to_pipeline"),
    ),
    Patch(
        name="diffusers FluxTransformer2DModel",
        matches=lambda target: is_instance_of(target, "diffusers", "FluxTransformer2DModel"),
        apply=_lazily(".diffusers_flux", "apply_to_transformer"),
    ),
)


def find(target: Any) -> Patch:
    """Returns the patch for a target. Raises UnsupportedModelError, naming what is supported, where there is none."""
    for patch in PATCHES:
        if patch.matches(target):
            return patch
    supported = ", ".join(patch.name for patch in PATCHES)
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise UnsupportedModelError(f"apply: target must be one of: {supported}; got {kind}; pass the pipeline itself")
