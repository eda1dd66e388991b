"""torch's private names that jitaccel uses, each in one function; tests/execution/test_private.py tests each."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import lookup_backend
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CompilationError = TorchDynamoException


def forget_graphs(code: types.CodeType) -> None:
    """Drops what torch compiled for a code object, which it would otherwise keep for the life of the process."""
    reset_code(code)


def backend_named(backend: Any) -> Callable[..., Any]:
    """Returns the compiler backend of a name; a callable is returned unchanged."""
    found: Callable[..., Any] = lookup_backend(backend)
    return found


def inductor_options() -> tuple[str, ...]:
    """Returns the names of Inductor's options."""
    return tuple(torch._inductor.list_options())


def inductor_options_of_mode(mode: str) -> dict[str, Any]:
    """Returns the options that a mode of torch.compile implies."""
    return dict(torch._inductor.list_mode_options(mode))


def compiled_by_inductor(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Returns a graph compiled for these inputs."""
    run: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options=dict(options))
    return run


def write_aoti_package(program: Any, path: Path, options: Mapping[str, Any]) -> None:
    """Compiles an exported program into a package for AOTInductor."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(options))


def load_aoti_package(path: Path, device_index: int) -> Any:
    """Returns the callable of a package that `write_aoti_package` wrote; device index -1 is the current device."""
    return torch._inductor.aoti_load_package(str(path), device_index=device_index)


def inner_tensors(x: Tensor) -> list[Tensor] | None:
    """Returns the tensors inside a wrapper tensor, such as a quantised weight, or None for a plain tensor."""
    if not is_traceable_wrapper_subclass(x):
        return None
    names, _ = x.__tensor_flatten__()
    return [getattr(x, name) for name in names]


def is_compile_wrapper(model: Any) -> bool:
    """Returns whether a module is the wrapper that torch.compile makes around another module."""
    return hasattr(model, "_orig_mod")


def uncompiled(model: Any) -> Any:
    """Returns the module inside torch.compile's wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Returns whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def has_forward_hooks(module: nn.Module) -> bool:
    """Returns whether hooks run before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the module's own dictionary of children; writing to it changes the module."""
    return module._modules
