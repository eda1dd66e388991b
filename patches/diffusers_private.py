"""The private names of diffusers that jitaccel reads, each in one function.

"If renamed:" says what would go wrong if diffusers changed the name. No other file may use such a name;
tests/execution/test_private.py checks that. tests/patches/test_diffusers_private.py runs each function on diffusers'
own objects, so that a removed name is found before a user finds it. Importing this file imports nothing of diffusers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HOOK_REGISTRY = "_diffusers_hook"
_CACHES = frozenset(  # modules of diffusers.hooks whose hooks reuse results of an earlier call
    {
        "faster_cache",
        "first_block_cache",
        "mag_cache",
        "pyramid_attention_broadcast",
        "sea_cache",
        "taylorseer_cache",
        "text_kv_cache",
    }
)
SPLITTING_HOOK = "cp_input---"
SCHEDULER_PLACE = ("_step_index", "_begin_index")


def hook_registry(module: Any) -> Any:
    """Returns the hook registry of the module itself, or None.

    Diffusers offers `HookRegistry.check_if_exists_or_initialize`, but that creates a missing registry, and for
    torch.compile's wrapper it returns the registry of the model inside. If renamed: the packed forward would not see
    offloading and caching hooks. Since diffusers 0.33.
    """
    return vars(module).get(HOOK_REGISTRY)


def put_hook_registry(module: Any, registry: Any) -> Any:
    """Sets the hook registry of a module that has none of its own; returns the registry it has afterwards.

    If renamed: diffusers would not find the registry's hooks to reset or list them. Since diffusers 0.33.
    """
    return vars(module).setdefault(HOOK_REGISTRY, registry)


def caches_in(model: Any) -> tuple[str, ...]:
    """Returns the names of all diffusers cache hooks in a model, set by `enable_cache` or by a function.

    `is_cache_enabled` only reports those set by `enable_cache`. Subclasses of a cache hook count too. If renamed: a
    cache would go unnoticed and return results for the wrong tokens. Since diffusers 0.33.
    """
    registries = [registry for module in model.modules() if (registry := hook_registry(module)) is not None]
    hooks = [(name, hook) for registry in registries for name, hook in registry.hooks.items()]
    return tuple(dict.fromkeys(name for name, hook in hooks if _is_cache(type(hook))))


def _is_cache(kind: type) -> bool:
    modules = [base.__module__ for base in kind.__mro__]
    return any(name.startswith("diffusers.hooks.") and name.rpartition(".")[2] in _CACHES for name in modules)


def accelerate_hook(module: Any) -> Any:
    """Returns the hook with which accelerate loads and offloads a module's weights, or None.

    Diffusers and accelerate both read the name; neither has a public accessor. If renamed: offloaded weights would not
    be loaded. In every version of diffusers with offloading, 0.17 and before.
    """
    return getattr(module, "_hf_hook", None)


def forward_beneath_hooks(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the innermost function that the hooks of diffusers and accelerate around a module's `forward` call.

    Neither package offers it, and `__wrapped__` would also skip a user's own wrapper. If renamed: the hooks would be
    mistaken for a replaced forward, and the model would run indexed. Diffusers since 0.33, accelerate since 0.12.
    """
    while isinstance(forward, functools.partial):
        made_in = getattr(forward.func, "__globals__", {}).get("__name__")
        if made_in == "diffusers.hooks.hooks":
            reference = inspect.getclosurevars(forward.func).nonlocals["function_reference"]
            forward = reference.original_forward or reference.forward
        elif made_in == "accelerate.hooks":
            forward = module._old_forward
        else:
            break
    return forward


def attention_backend(processor: Any) -> str | None:
    """Returns the backend set on an attention processor or for the whole process; None if torch chooses.

    `set_attention_backend` activates its choice for every model of the process, as do the context manager
    `attention_backend` and the environment variable DIFFUSERS_ATTN_BACKEND. If renamed: raises AttributeError, because
    silently using a different backend from the chosen one would be wrong. Since diffusers 0.35.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    chosen = processor._attention_backend
    if chosen is None:
        chosen, _ = _AttentionBackendRegistry.get_active_backend()
    name = AttentionBackendName(chosen)
    return None if name is AttentionBackendName.NATIVE else str(name.value)


def has_context_parallelism(processor: Any) -> bool:
    """Returns whether `enable_parallelism` splits an attention processor's sequence among devices.

    If renamed: raises AttributeError, because each device would otherwise take its part for the whole. Since diffusers
    0.36.
    """
    return processor._parallel_config is not None


def is_parallel(model: Any) -> bool:
    """Returns whether `enable_parallelism` was called on a model. If renamed: as `has_context_parallelism`."""
    return getattr(model, "_parallel_config", None) is not None


def context_parallelism(model: Any) -> Any:
    """Returns the ContextParallelConfig that `enable_parallelism` gave a model, or None.

    If renamed: the number of anchors would not be rounded, and diffusers would refuse it. Since diffusers 0.36.
    """
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


def divided_group(settings: Any) -> tuple[Any, int]:
    """Returns the process group that divides the tokens (ring and Ulysses together), and the size of that group.

    If renamed: raises AttributeError; the public `mesh` is None if diffusers created it. Since diffusers 0.36.
    """
    mesh = settings._flattened_mesh
    return mesh.get_group(), mesh.size()


def is_divided_around(module: Any, hook: Any) -> bool:
    """Returns whether context parallelism divides a module's inputs before the given hook sees them.

    Hooks registered later run outside earlier ones. If renamed: ranks patched in the wrong order would take their part
    for the whole. Since diffusers 0.36.
    """
    registry = hook_registry(module)
    names = [] if registry is None else list(registry.hooks)
    own = next((place for place, name in enumerate(names) if registry.hooks[name] is hook), len(names))
    return any(name.startswith(SPLITTING_HOOK) for name in names[own:])


def divides_output(module: Any) -> Any:
    """Returns the function reference of the hook that divides a module's output among ranks; None without such a hook.

    Its `post_forward` (module, output) is called with the result of the module's own forward. If renamed: a table of
    positions would be cut after it is divided, and its rows would not be found. Since diffusers 0.36.
    """
    registry = hook_registry(module)
    names = [] if registry is None else [name for name in registry.hooks if name.startswith(SPLITTING_HOOK)]
    return registry.hooks[names[0]].fn_ref if names else None


def offloads_whole_models(pipeline: Any) -> bool:
    """Returns whether `enable_model_cpu_offload` moves a pipeline's models to and from the device, one at a time.

    If renamed: the transformer would stay on the device after a measurement. Since diffusers 0.21.
    """
    return bool(getattr(pipeline, "_all_hooks", None))


def execution_device(pipeline: Any) -> torch.device:
    """Returns the device on which a pipeline computes, which differs from where its offloaded models are stored.

    If renamed: raises AttributeError; the public `device` is where offloaded models are stored. In 0.17 and before.
    """
    device: torch.device = pipeline._execution_device
    return device


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Hides a pipeline's progress bar within this context.

    If renamed: the user's settings of the progress bar would be lost. Since diffusers 0.3.
    """
    before = vars(pipeline).get("_progress_bar_config")
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before


def has_packed_latents(pipeline: Any) -> bool:
    """Returns whether a pipeline packs latents into tokens as FLUX.1's do. If renamed: as `unpack_latents`."""
    return hasattr(pipeline, "_unpack_latents")


def unpack_latents(pipeline: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns the autoencoder's latents (B, C, h, w) for FLUX.1 tokens (B, N, 4C). Sizes are in pixels.

    If renamed: raises AttributeError. The pipeline decides how a token's four latents are arranged, so this is not
    repeated here. Since diffusers 0.30.
    """
    latents: Tensor = pipeline._unpack_latents(tokens, height, width, pipeline.vae_scale_factor)
    return latents


def pack_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Returns FLUX.1 tokens (B, N, 4C) of latents (B, C, h, w). If renamed: as `unpack_latents`. Since 0.30."""
    tokens: Tensor = pipeline._pack_latents(latents, *latents.shape)
    return tokens


def count_step(scheduler: Any, place: int) -> None:
    """Sets a scheduler's step index after a step was made in its place.

    If renamed: the scheduler would take the same step again. Since diffusers 0.21.
    """
    scheduler._step_index = place


def dtype_argument() -> str:
    """Returns the name that this diffusers gives the dtype of `from_pretrained`, "dtype" or "torch_dtype".

    Old versions ignore "dtype", new ones warn about "torch_dtype", and signatures show neither. If renamed: the warning
    would come back. `_resolve_dtype` came with "dtype", after diffusers 0.36.
    """
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def scheduler_place(scheduler: Any, missing: object) -> Mapping[str, Any]:
    """Returns a scheduler's current step and first step, to be restored later; `missing` for an absent attribute.

    If renamed: the scheduler would continue from the middle after the patch is removed. The first step exists since
    diffusers 0.27, the current step since 0.21.
    """
    return {name: vars(scheduler).get(name, missing) for name in SCHEDULER_PLACE}
