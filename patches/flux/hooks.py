"""Runs the hooks on modules whose forward packed execution does not call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers.hooks import ModelHook
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from ..diffusers_private import accelerate_hook, hook_registry


@contextmanager
def model_hooks(model: nn.Module, own: ModelHook | None, lora_scale: float | None) -> Iterator[None]:
    """Does what the model's own forward does around its blocks: offloading hooks inside `own`, and the LoRA scale."""
    inside = []
    for hook in registered_hooks(model):
        if hook is own:
            break
        inside.append(hook)
    with _hooks(model, inside):
        if lora_scale is None:
            yield
            return
        scale_lora_layers(model, lora_scale)
        try:
            yield
        finally:
            unscale_lora_layers(model, lora_scale)


def block_hooks(block: nn.Module) -> AbstractContextManager[None]:
    """Runs a block's hooks around the code that replaces the block."""
    return _hooks(block, registered_hooks(block))


@contextmanager
def _hooks(module: nn.Module, registered: Sequence[object]) -> Iterator[None]:
    """Runs the hooks of diffusers and accelerate that load and offload a module's weights, outermost first."""
    outermost = accelerate_hook(module)
    hooks = [*([] if outermost is None else [outermost]), *registered]
    for hook in reversed(hooks):
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def registered_hooks(module: nn.Module) -> list[Any]:
    """Returns the diffusers hooks on the module itself, innermost first."""
    registry = hook_registry(module)
    return [] if registry is None else [*registry.hooks.values()]
