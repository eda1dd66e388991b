"""Loads the compiled operators, and defines and registers what they do not: schemas, references, fake kernels.

A device without a compiled kernel runs the plain-torch reference. Other modules need no check.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build import KINDS, cuda_mismatch, library_path, staleness
from . import reference, schema

_COMPILED: dict[str, Path] = {}
_MISSING: dict[str, str] = {}
_NO_CUDA = "torch is built without CUDA"  # the one reason that needs no warning


def compiled() -> dict[str, Path]:
    """Returns the loaded libraries by device type ("cpu", "cuda")."""
    return dict(_COMPILED)


def missing() -> dict[str, str]:
    """Returns, for each device type without a compiled library, the reason."""
    return dict(_MISSING)


def _load(kind: str) -> None:
    torch_cuda = torch.version.cuda
    if kind == "cuda" and torch_cuda is None:  # a property of the build; querying the driver would initialise it
        _MISSING[kind] = _NO_CUDA
        return
    folder = os.environ.get("JITACCEL_LIBRARIES")
    path = library_path(kind, Path(folder) if folder else None)
    if (stale := staleness(kind, path)) is not None:
        _MISSING[kind] = stale
        return
    if kind == "cuda" and torch_cuda and (mismatch := cuda_mismatch(path, torch_cuda)) is not None:
        _MISSING[kind] = mismatch
        return
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        _MISSING[kind] = f"{path.name} cannot be loaded: {error}"
        return
    _COMPILED[kind] = path


def _warn() -> None:
    wanted = {kind: why for kind, why in _MISSING.items() if why != _NO_CUDA}
    if wanted:
        reasons = "; ".join(f"{kind}: {why}" for kind, why in wanted.items())
        warnings.warn(
            f"jitaccel: plain torch stands in for compiled operators ({reasons}). "
            f"Run `python -m jitaccel.build` to compile them, `jitaccel doctor` to see what runs",
            RuntimeWarning,
            stacklevel=2,
        )


def _register() -> torch.library.Library:
    """Returns the library that holds the registrations from Python; it lives as long as the process."""
    registered = torch.library.Library("jitaccel", "FRAGMENT")
    for name, signature in schema.SCHEMAS.items():
        if "cpu" not in _COMPILED:  # the CPU library defines the schemas, because C++ programs need them too
            registered.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        registered.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"jitaccel::{name}", _FAKES[name], lib=registered)
    return registered


def _fake_nearest_anchor(anchors: Tensor, grid: Sequence[int], stack: bool = False) -> Tensor:
    schema.check_nearest_anchor("nearest_anchor", anchors, grid, stack)
    return anchors.new_empty(anchors.shape[0], schema.num_tokens_of(grid))


def _fake_lift(
    values: Tensor, nearest: Tensor, anchors: Tensor, grid: Sequence[int], weights: Tensor, stack: bool = False
) -> Tensor:
    schema.check_lift("lift", values, nearest, anchors, grid, weights)
    return values.new_empty(values.shape[0], schema.num_tokens_of(grid), values.shape[2])


def _fake_importance(velocity: Tensor, grid: Sequence[int], window: int = 3, stack: bool = False) -> Tensor:
    schema.check_importance("importance", velocity, grid, window)
    return velocity.new_empty(velocity.shape[:2], dtype=torch.float32)


def _fake_activate(importance: Tensor, anchors: Tensor, count: int) -> Tensor:
    schema.check_activate("activate", importance, anchors, count)
    return anchors.new_empty(anchors.shape[0], count)


def _fake_pool(x: Tensor, grid: Sequence[int], patch: int, factor: int, level: Tensor | None = None) -> Tensor:
    schema.check_pooling("pool", "x", x, grid, patch, factor, level)
    return x.new_empty(x.shape[0], schema.num_tokens_of(schema.pooled_grid(grid, factor)), x.shape[2])


def _fake_lift_pooled(
    values: Tensor, pooled: Tensor, state: Tensor, grid: Sequence[int], patch: int, factor: int, level: Tensor
) -> Tensor:
    schema.check_lift_pooled(values, pooled, state, grid, patch, factor, level)
    return values.new_empty(state.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "nearest_anchor": _fake_nearest_anchor,
    "lift": _fake_lift,
    "importance": _fake_importance,
    "activate": _fake_activate,
    "micro_flow_into": schema.check_micro_flow_into,
    "pool": _fake_pool,
    "lift_pooled": _fake_lift_pooled,
}

for _kind in KINDS:
    _load(_kind)
_warn()
_LIBRARY = _register()
