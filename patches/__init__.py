"""One patch for each codebase. A patch contains no mathematics; it answers five questions about a model:

where the token grid is, which tokens are generated, what the current and the next noise level are, how the model runs
on a subset of tokens, and which call of a step is being answered.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jitaccel.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jitaccel.artefacts.export import Exportable
    from jitaccel.execution.options import Execution
    from jitaccel.generation.batch import Outcome
    from jitaccel.generation.handle import Installation
    from jitaccel.generation.stats import Cost
    from jitaccel.method.config import JiTConfig
    from jitaccel.speed.cost import Probe


@dataclass(frozen=True, kw_only=True)
class Patch:
    """How one codebase is patched. A function that the codebase does not support is None.

    Attributes:
        name: Name of the codebase in messages.
        matches: Returns whether a target belongs to this codebase; must not import it.
        prepare: Takes target, settings, known levels and execution. Checks everything that can fail and returns the
            finished installation, without changing the target.
        generate_batch: Takes pipeline, requests with their settings, execution and type of output.
        export: Takes pipeline, settings, size, batch, text length and attention; returns the stages.
        prepare_exported: Like `prepare`, for a pipeline and loaded stages.
        probe: Takes target, size in pixels and length of prompts (either may be None), execution, and further arguments
            of a pipeline's call; returns forwards to time.
        defaults: Takes a target; returns the JiTConfig fields that its model changes in a preset given by name.
        cost: Takes a target; returns a function from numbers of tokens to the operations of one forward of its network.
    """

    name: str
    matches: Callable[[Any], bool]
    prepare: Callable[[Any, JiTConfig, tuple[float, ...] | None, Execution], Installation]
    generate_batch: Callable[..., list[Outcome]] | None = None
    export: Callable[..., Exportable] | None = None
    prepare_exported: Callable[..., Installation] | None = None
    probe: Callable[[Any, tuple[int, int] | None, int | None, Execution, Mapping[str, Any]], Probe] | None = None
    defaults: Callable[[Any], Mapping[str, Any]] | None = None
    cost: Callable[[Any], Cost] | None = None


def is_instance_of(target: Any, package: str, *names: str) -> bool:
    """Returns whether the target's class, or one of its bases, has one of these names in this package.

    Looks inside `torch.compile`'s wrapper. Imports no codebase.
    """
    return is_subclass_of(_type_inside(target), package, *names)


def is_subclass_of(kind: type, package: str, *names: str) -> bool:
    """Returns whether a class, or one it derives from, has one of these names in this package."""
    return any(each.__name__ in names and each.__module__.split(".")[0] == package for each in kind.__mro__)


def is_bfl_flux(target: Any) -> bool:
    """Returns whether this is Black Forest Labs' `Flux`, a copy of it, or a subclass, judged by names and arguments."""
    kind = _type_inside(target)
    forward = getattr(kind, "forward", None)
    if all(base.__name__ != "Flux" for base in kind.__mro__) or forward is None:
        return False
    names = [*inspect.signature(forward).parameters][1:7]
    return names == ["img", "img_ids", "txt", "txt_ids", "timesteps", "y"]


def _type_inside(target: Any) -> type:
    """Returns the class of a target, looking inside `torch.compile`'s wrapper."""
    from jitaccel.execution.private import uncompiled  # imported late: torch's compiler takes seconds to import

    kind: type = type(uncompiled(target))
    return kind


def _lazily(module: str, function: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module, __name__), function)(*args)

    return call


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="diffusers WanPipeline and other pipelines of the models of jitaccel.patches.models",
        matches=_lazily(".models", "knows_pipeline"),
        prepare=_lazily(".diffusers.cut", "prepare_pipeline"),
        generate_batch=_lazily(".diffusers.one_by_one", "generate_batch"),
        probe=_lazily(".diffusers.probe_cut", "probe_pipeline"),
        defaults=_lazily(".models", "defaults_of_pipeline"),
    ),
    Patch(
        name="diffusers WanTransformer3DModel and other transformers of jitaccel.patches.models",
        matches=_lazily(".models", "knows_transformer"),
        prepare=_lazily(".diffusers.cut", "prepare_transformer"),
        defaults=_lazily(".models", "defaults_of_transformer"),
    ),
    Patch(
        name="diffusers FluxPipeline and other pipelines of FLUX.1, FLUX.2 and Chroma",
        matches=lambda target: is_instance_of(target, "diffusers", "DiffusionPipeline"),
        prepare=_lazily(".diffusers.pipelines", "prepare_pipeline"),
        generate_batch=_lazily(".diffusers.batch", "generate_batch"),
        export=_lazily(".diffusers.stages", "export"),
        prepare_exported=_lazily(".diffusers.stages", "prepare_exported"),
        probe=_lazily(".diffusers.probe", "probe_pipeline"),
        cost=_lazily(".flux.kinds", "cost_of_pipeline"),
    ),
    Patch(
        name="diffusers FluxTransformer2DModel, Flux2Transformer2DModel, ChromaTransformer2DModel",
        matches=lambda target: is_instance_of(
            target, "diffusers", "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"
        ),
        prepare=_lazily(".diffusers.pipelines", "prepare_transformer"),
        probe=_lazily(".diffusers.probe", "probe_transformer"),
        cost=_lazily(".flux.kinds", "cost_of"),
    ),
    Patch(
        name="black-forest-labs Flux",
        matches=is_bfl_flux,
        prepare=_lazily(".bfl", "prepare"),
    ),
    Patch(
        name="ComfyUI ModelPatcher",
        matches=lambda target: is_instance_of(target, "comfy", "ModelPatcher"),
        prepare=_lazily(".comfyui.sampling", "prepare"),
    ),
)
_REGISTERED: list[Patch] = []  # patches from other packages, newest first


def register(patch: Patch) -> None:
    """Adds a patch from another package. It takes precedence over all others and replaces one of the same name.

    docs/adding-a-model.md shows an example.
    """
    _REGISTERED[:] = [patch, *(other for other in _REGISTERED if other.name != patch.name)]


def find(target: Any) -> Patch:
    """Returns the patch for a target.

    Raises:
        UnsupportedModelError: If no patch matches; the message lists the supported targets.
    """
    known = (*_REGISTERED, *PATCHES)
    for patch in known:
        if patch.matches(target):
            return patch
    supported = ", ".join(patch.name for patch in known)
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise UnsupportedModelError(
        f"apply: target must be one of: {supported}; got {kind}; "
        f"pass a pipeline of these, or its network{_lazily('.models.refused', 'remark_on')(target)}"
    )


def cost_of(target: Any) -> Cost:
    """Returns the operations of one forward of a target's network, by numbers of image and text tokens.

    Raises:
        UnsupportedModelError: If no patch matches the target, or its patch has no formula.
    """
    patch = find(target)
    if patch.cost is None:
        raise UnsupportedModelError(
            f"jitaccel: operations must be known by a formula, got {type(target).__name__}, whose operations are only "
            f"counted while it runs; read them from handle.stats()"
        )
    return patch.cost(target)
