"""Finds reasons why a packed forward would differ from a model's own, such as replaced parts of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.hooks import ModelHook
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from jitaccel.execution.private import has_forward_hooks, is_compile_wrapper, is_compiled_in_place

from ..diffusers_private import attention_backend, forward_beneath_hooks, has_context_parallelism
from ..foreign import Forward
from .hooks import registered_hooks

_REPLACED = (FluxTransformerBlock, FluxSingleTransformerBlock)  # `packed.py` runs these and their hooks
_BYPASSED = (FluxAttention, AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)  # only leaves run


def reasons_unpackable(model: nn.Module, own: ModelHook | None = None) -> list[str]:
    """Returns why a packed forward would differ from this model's own; empty if it would not.

    Args:
        model: The transformer.
        own: jitaccel's hook on it, if any, which does not count as a reason.
    """
    if is_compile_wrapper(model):
        return ["the transformer is compiled as a whole"]
    reasons = []
    if not _is_diffusers_own(type(model).forward):
        reasons.append(f"{type(model).__name__} has a forward that is not diffusers'")
    for name, module in model.named_modules():
        if module is model:
            reasons += _reasons_of_hooks("the transformer", module, own)
        elif isinstance(module, _REPLACED + _BYPASSED):
            reasons += _reasons_of_module(name, module)
    for block in (*_blocks(model, "transformer_blocks"), *_blocks(model, "single_transformer_blocks")):
        if type(block) not in _REPLACED:
            reasons.append(f"a block is a {type(block).__name__}")
    if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
        reasons.append("gradient checkpointing is on")
    return list(dict.fromkeys(reasons))


def _blocks(model: nn.Module, name: str) -> Iterator[nn.Module]:
    return model.get_submodule(name).children()


def _is_diffusers_own(function: object) -> bool:
    """Returns whether a method and everything it wraps is diffusers' own code.

    Looks at the globals, because `functools.wraps` copies names but not globals.
    """
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("diffusers."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _has_own_forward(module: nn.Module, outermost: Forward | None = None) -> bool:
    """Returns whether a module's hooks, or those inside `outermost`, finally call the forward of its class."""
    forward = forward_beneath_hooks(module, module.forward if outermost is None else outermost)
    is_bound = getattr(forward, "__self__", None) is module
    return is_bound and getattr(forward, "__func__", None) is type(module).forward


def _reasons_of_module(name: str, module: nn.Module) -> list[str]:
    kind = type(module).__name__
    reasons = []
    if not _is_diffusers_own(type(module).forward):
        reasons.append(f"{kind} has a forward that is not diffusers'")
    if isinstance(module, FluxAttention):
        processor = module.processor
        if type(processor) is not FluxAttnProcessor:
            reasons.append(f"an attention processor is a {type(processor).__name__}")
        elif not _is_diffusers_own(type(processor).__call__):
            reasons.append(f"{type(processor).__name__} has a __call__ that is not diffusers'")
        elif (backend := attention_backend(processor)) is not None:
            reasons.append(f"diffusers' attention backend is {backend!r}")
        elif has_context_parallelism(processor):
            reasons.append("context parallelism is on")
    if is_compiled_in_place(module):
        reasons.append(f"a {kind} is compiled")
    if has_forward_hooks(module):
        reasons.append(f"{name} has forward hooks")
    if isinstance(module, _BYPASSED):
        if "forward" in vars(module):
            reasons.append(f"forward of {name} is replaced")
        return reasons
    return reasons + _reasons_of_hooks(name, module, None)


def _reasons_of_hooks(name: str, module: nn.Module, own: ModelHook | None) -> list[str]:
    """Returns the hooks and replacements around a module's forward that packed execution cannot run."""
    registered = [hook for hook in registered_hooks(module) if hook is not own]
    reasons = [
        f"{name} has a {type(hook).__name__}" for hook in registered if callable(getattr(hook, "new_forward", None))
    ]
    if not _has_own_forward(module, None if own is None else own.fn_ref.original_forward):
        reasons.append(f"forward of {name} is replaced")
    return reasons
