"""Which class of pipelines runs a model on a picture, a mask or a ControlNet, and what its calls take and need."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping

from .. import is_subclass_of
from ..flux.kinds import PIPELINES
from ..models import MODELS
from .asked import parameters_of

_SEVERAL = ("Flux2Pipeline", "Flux2KleinPipeline", "QwenImageEditPlusPipeline")  # a list is one picture's references

FAMILIES: tuple[tuple[str, ...], ...] = (*PIPELINES.values(), *(model.pipelines for model in MODELS))
"""Names of the pipelines that are accelerated; those of one model together."""


def class_for(kind: type, given: Collection[str], *, controlnet: bool = False) -> type:
    """Returns the class that diffusers' AutoPipelineForImage2Image or AutoPipelineForInpainting makes of a pipeline.

    Args:
        kind: Class that a model names.
        given: Arguments of the call, by name.
        controlnet: Whether a ControlNet is added.

    Returns:
        `kind` itself where its calls take what is given, or where diffusers links no class to it.
    """
    known = parameters_of(kind)
    wanted = [name for name in ("image", "mask_image") if name in given]
    if not controlnet and all(name in known for name in wanted):
        return kind
    from diffusers.pipelines import auto_pipeline

    tasks: tuple[Mapping[str, type], ...] = (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    )
    family = next((name for task in tasks for name, each in task.items() if each is kind), "")
    if controlnet and not family.endswith("-controlnet"):
        family = f"{family}-controlnet"
    return tasks[2 if "mask_image" in wanted else 1 if wanted else 0].get(family, kind)


def alternatives(kind: type, given: Collection[str]) -> list[str]:
    """Returns the names of other pipelines for the models of `kind`, whose calls take what is given and no more."""
    import diffusers

    names = [name for family in FAMILIES if is_subclass_of(kind, "diffusers", *family) for name in family]
    others = [each for name in names if (each := getattr(diffusers, name, kind)) is not kind]
    return [each.__name__ for each in others if {*needed(each)} <= {*given} <= {*accepted(each)}]


def accepted(kind: type) -> list[str]:
    """Returns the names that calls of a class of pipelines take."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, each in parameters_of(kind).items() if name != "self" and each.kind not in variadic]


def needed(kind: type) -> list[str]:
    """Returns the pictures that calls of a class of pipelines cannot do without."""
    known = parameters_of(kind)
    starts_from_one = "strength" in known or "mask_image" in known
    return [
        name
        for name, is_needed in (("image", starts_from_one), ("mask_image", True), ("control_image", True))
        if name in known and (is_needed or known[name].default is inspect.Parameter.empty)
    ]


def takes_several(kind: type) -> bool:
    """Returns whether a list of pictures is what one call of a class of pipelines looks at, and no batch of them."""
    return is_subclass_of(kind, "diffusers", *_SEVERAL)
