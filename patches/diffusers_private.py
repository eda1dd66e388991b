"""The private names of diffusers that jitaccel reads, each in one function that says what it costs.

No other file may name one: tests/execution/test_private.py looks. tests/patches/test_diffusers_private.py tries each
function on what diffusers makes, so that a name that goes is found before a user finds it. Importing this file imports
nothing of diffusers.
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
_CACHES = frozenset(  # modules of diffusers.hooks whose hooks answer from an earlier call
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
    """Returns the registry of hooks on a module itself, or None.

    Diffusers offers `HookRegistry.check_if_exists_or_initialize`, which makes one where there is none, and takes the
    registry of the model inside torch.compile's wrapper for the wrapper's. Costs: a renamed attribute would hide
    offloading and caching hooks from the packed forward. Since diffusers 0.33.
    """
    return vars(module).get(HOOK_REGISTRY)


def put_hook_registry(module: Any, registry: Any) -> Any:
    """Gives a module a registry of hooks where it has none itself; returns the one that it has then.

    Costs: diffusers would not find the hooks of a registry under another name, to reset them or to list them. Since
    diffusers 0.33.
    """
    return vars(module).setdefault(HOOK_REGISTRY, registry)


def caches_in(model: Any) -> tuple[str, ...]:
    """Returns the names of every cache hook of diffusers in a model, whether `enable_cache` or a function put it there.

    `is_cache_enabled` knows only of the first. A class derived from a cache's is one. Costs: a cache in a renamed
    module would answer for other tokens than those asked for. Since diffusers 0.33.
    """
    registries = [registry for module in model.modules() if (registry := hook_registry(module)) is not None]
    hooks = [(name, hook) for registry in registries for name, hook in registry.hooks.items()]
    return tuple(dict.fromkeys(name for name, hook in hooks if _is_cache(type(hook))))


def _is_cache(kind: type) -> bool:
    modules = [base.__module__ for base in kind.__mro__]
    return any(name.startswith("diffusers.hooks.") and name.rpartition(".")[2] in _CACHES for name in modules)


def accelerate_hook(module: Any) -> Any:
    """Returns the hook by which accelerate brings a module's weights in and out, or None.

    Both packages read the name; neither has a public way to ask. Costs: a renamed attribute would leave offloaded
    weights where they wait. In every version of diffusers with offloading, 0.17 and before.
    """
    return getattr(module, "_hf_hook", None)


def forward_beneath_hooks(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what hooks of diffusers and accelerate around a module's `forward` call in the end.

    Neither package tells; `__wrapped__` would also lead past what a user wrapped. Costs: hooks of another make would be
    taken for a replaced forward, and the model run indexed. Diffusers since 0.33, accelerate since 0.12.
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
    """Returns the backend that an attention processor was given or that is active for all; None: torch's own choice.

    `set_attention_backend` makes its choice active for every model of the process, as the context manager
    `attention_backend` and the environment variable DIFFUSERS_ATTN_BACKEND do. Costs: raises AttributeError without the
    names, since attention of another kind than the one that was chosen would be a silent change. Since diffusers 0.35.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    chosen = processor._attention_backend
    if chosen is None:
        chosen, _ = _AttentionBackendRegistry.get_active_backend()
    name = AttentionBackendName(chosen)
    return None if name is AttentionBackendName.NATIVE else str(name.value)


def has_context_parallelism(processor: Any) -> bool:
    """Returns whether `enable_parallelism` splits an attention processor's sequence among devices.

    Costs: raises AttributeError for a processor without the name, since each device would see a part as the whole.
    Since diffusers 0.36.
    """
    return processor._parallel_config is not None


def is_parallel(model: Any) -> bool:
    """Returns whether `enable_parallelism` was called on a model. Costs as `has_context_parallelism`."""
    return getattr(model, "_parallel_config", None) is not None


def context_parallelism(model: Any) -> Any:
    """Returns the ContextParallelConfig that `enable_parallelism` gave a model, or None.

    Costs: under another name, numbers of anchors would not be rounded, and diffusers would refuse them. Since diffusers
    0.36.
    """
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


def divided_group(settings: Any) -> tuple[Any, int]:
    """Returns the process group over which a ContextParallelConfig divides tokens, ring and Ulysses together, its size.

    Costs: raises AttributeError without the name; the public `mesh` is None where diffusers made it. Since diffusers
    0.36.
    """
    mesh = settings._flattened_mesh
    return mesh.get_group(), mesh.size()


def is_divided_around(module: Any, hook: Any) -> bool:
    """Returns whether context parallelism divides the inputs of a module before this hook of its sees them.

    Hooks that are registered later run outside. Costs: under another name, ranks that are patched in the wrong order
    would see parts as the whole. Since diffusers 0.36.
    """
    registry = hook_registry(module)
    names = [] if registry is None else list(registry.hooks)
    own = next((place for place, name in enumerate(names) if registry.hooks[name] is hook), len(names))
    return any(name.startswith(SPLITTING_HOOK) for name in names[own:])


def divides_output(module: Any) -> Any:
    """Returns the reference to functions of the hook that divides what a module returns among ranks; None without one.

    Its `post_forward` (module, output) is called with what the module's own forward returned. Costs: under another
    name, a table of positions would be cut after it is divided, and its rows would not be found. Since diffusers 0.36.
    """
    registry = hook_registry(module)
    names = [] if registry is None else [name for name in registry.hooks if name.startswith(SPLITTING_HOOK)]
    return registry.hooks[names[0]].fn_ref if names else None


def offloads_whole_models(pipeline: Any) -> bool:
    """Returns whether `enable_model_cpu_offload` moves models of a pipeline in and out, one at a time.

    Costs: a renamed attribute would leave the transformer on the device after a measurement. Since diffusers 0.21.
    """
    return bool(getattr(pipeline, "_all_hooks", None))


def execution_device(pipeline: Any) -> torch.device:
    """Returns where a pipeline computes, which is not where its models wait while they are offloaded.

    Costs: raises AttributeError without the name; the public `device` is where they wait. In 0.17 and before.
    """
    device: torch.device = pipeline._execution_device
    return device


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Lets a pipeline show no progress bar.

    Costs: a renamed attribute would lose the settings of the pipeline's bar. Since diffusers 0.3.
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
    """Returns whether a pipeline packs latents into tokens as FLUX.1's do. Costs as `unpack_latents`."""
    return hasattr(pipeline, "_unpack_latents")


def unpack_latents(pipeline: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns latents (B, C, h, w), as the autoencoder takes them, of FLUX.1's tokens (B, N, 4C). Sizes in pixels.

    Costs: raises AttributeError without the name; to do it here would repeat what the pipeline decides, how a token's
    four latents lie. Since diffusers 0.30.
    """
    latents: Tensor = pipeline._unpack_latents(tokens, height, width, pipeline.vae_scale_factor)
    return latents


def pack_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Returns FLUX.1's tokens (B, N, 4C) of latents (B, C, h, w). Costs as `unpack_latents`. Since diffusers 0.30."""
    tokens: Tensor = pipeline._pack_latents(latents, *latents.shape)
    return tokens


def count_step(scheduler: Any, place: int) -> None:
    """Says that a scheduler has come to this step, where another step than its own was made.

    Costs: a scheduler that counted under another name would take the same step again. Since diffusers 0.21.
    """
    scheduler._step_index = place


def dtype_argument() -> str:
    """Returns the name that this diffusers gives the dtype of `from_pretrained`, "dtype" or "torch_dtype".

    Old ones ignore the first, new ones warn of the second; signatures show neither. Costs: a renamed function would
    bring the warning back. `_resolve_dtype` came with "dtype", after diffusers 0.36.
    """
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def scheduler_place(scheduler: Any, missing: object) -> Mapping[str, Any]:
    """Returns at which step a scheduler is and at which it began, to be put back; `missing` for what it has not.

    Costs: a scheduler that kept its place under other names would go on from the middle after a removal. Since
    diffusers 0.27, the step's since 0.21.
    """
    return {name: vars(scheduler).get(name, missing) for name in SCHEDULER_PLACE}
