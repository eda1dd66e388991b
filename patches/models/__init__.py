"""Models described as data, one file per family, and reasons for those that cannot be accelerated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jitaccel.execution.private import uncompiled

from . import (
    auraflow,
    bria,
    hidream,
    hunyuan,
    hunyuan15,
    hunyuan_image,
    ltx,
    ltx2,
    lumina2,
    mochi,
    qwen,
    sd3,
    wan,
    z_image,
)
from .model import Model

MODELS: tuple[Model, ...] = (
    *wan.MODELS,
    *qwen.MODELS,
    *hunyuan.MODELS,
    *hunyuan15.MODELS,
    *hunyuan_image.MODELS,
    *sd3.MODELS,
    *z_image.MODELS,
    *auraflow.MODELS,
    *ltx.MODELS,
    *ltx2.MODELS,
    *lumina2.MODELS,
    *mochi.MODELS,
    *bria.MODELS,
    *hidream.MODELS,
)


def model_of(transformer: Any) -> Model | None:
    """Returns the description of a diffusers transformer, found by its class or a base class; None if unknown.

    Looks inside `torch.compile`'s wrapper.
    """
    names = _names(transformer)
    return next((model for model in MODELS if model.name in names), None)


def model_of_pipeline(pipeline: Any) -> Model | None:
    """Returns the model that a diffusers pipeline runs, found by the pipeline's class or a base class."""
    names = _names(pipeline)
    return next((model for model in MODELS for name in model.pipelines if name in names), None)


def knows_transformer(target: Any) -> bool:
    """Returns whether `target` is a transformer of one of these models."""
    return model_of(target) is not None


def knows_pipeline(target: Any) -> bool:
    """Returns whether `target` is a pipeline of one of these models."""
    return model_of_pipeline(target) is not None


def defaults_of_transformer(target: Any) -> Mapping[str, Any]:
    """Returns the JiTConfig fields that a transformer changes in a preset given by name."""
    return _defaults(model_of(target))


def defaults_of_pipeline(target: Any) -> Mapping[str, Any]:
    """Returns the JiTConfig fields that a pipeline changes in a preset given by name."""
    return _defaults(model_of_pipeline(target))


def _defaults(model: Model | None) -> Mapping[str, Any]:
    return {} if model is None else {"schedule": model.schedule}


def _names(target: Any) -> list[str]:
    kinds = type(uncompiled(target)).__mro__
    return [kind.__name__ for kind in kinds if kind.__module__.split(".")[0] == "diffusers"]
