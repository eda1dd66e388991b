"""One hook on a module of diffusers, whatever number of patched pipelines share it."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeAlias

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.private import uncompiled
from jitaccel.generation.handle import Handle, Uncopied

from ..diffusers_private import HOOK_REGISTRY, forward_beneath_hooks, hook_registry, put_hook_registry
from ..foreign import Arguments, Forward
from ..loops.velocity import Calls, VelocityRoute
from .caller import calling_pipeline
from .scheduler import SchedulerRoute

Route: TypeAlias = SchedulerRoute[Calls] | VelocityRoute[Calls]
_NAME = "jitaccel"


class SharedHook(Uncopied, ModelHook, Generic[Calls]):  # type: ignore[misc]
    """Finds the route of a call; derived ones define `new_forward`."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.handles: dict[Route[Calls], Handle] = {}
        self.before: dict[str, object] = {}
        self.registry: Any = None  # that the hook was put into, until the module is as it was before
        self.class_forward: Forward | None = None  # of the module's class, when the hook was put on

    @property
    def routes(self) -> tuple[Route[Calls], ...]:
        """Pipelines first: a bare route answers whatever is left."""
        return tuple(sorted(self.handles, key=lambda route: isinstance(route, VelocityRoute)))

    def route_of(self, caller: object) -> Route[Calls] | None:
        """Returns the route that a call made inside `caller` (a pipeline, or None) belongs to; None for a dense one."""
        route = next((route for route in self.routes if route.accepts(caller)), None)
        return None if route is None or route.is_dense else route

    def original_of(self, module: nn.Module) -> Forward:
        """Returns the forward that the hook stands around; the class's of now, where that was replaced since.

        Raises:
            UnsupportedModelError: Where other hooks stand between, which call the one that was replaced.
        """
        original: Forward = self.fn_ref.original_forward
        own = type(module).forward
        beneath = forward_beneath_hooks(module, original)
        if own is self.class_forward or getattr(beneath, "__func__", None) is not self.class_forward:
            return original
        if beneath is original:
            return types.MethodType(own, module)
        raise UnsupportedModelError(
            f"jitaccel: {type(module).__name__}.forward must be replaced before apply where the model has hooks "
            f"(offloading), got one that was replaced since; remove() the handle, and apply again"
        )

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Diffusers calls this when a pipeline is done; only that pipeline's generation is over."""
        caller = calling_pipeline()
        for route in self.routes:
            if caller is None or (isinstance(route, SchedulerRoute) and route.is_of(caller)):
                route.reset()
        return module


def install(module: nn.Module, kind: type[SharedHook[Calls]], handle: Handle, route: Route[Calls]) -> None:
    """Lets the hook of a module, a new one where it has none, answer the calls of a route."""
    found = hook_of(module)
    hook = kind() if found is None else found
    what = f"{type(module).__name__} hook {_NAME!r}"
    handle.change(what, _uninstall, weakref.ref(module), weakref.ref(hook), weakref.ref(route))
    hook.handles[route] = handle
    if found is None:
        _register(module, hook)


def _register(module: nn.Module, hook: SharedHook[Calls]) -> None:
    """Puts a hook on a module; where that fails or is interrupted, nothing of it stays."""
    hook.before = {name: vars(module).get(name) for name in ("forward", HOOK_REGISTRY)}
    try:
        # torch.compile's wrapper shows its model's registry as its own; the hook belongs on the wrapper, outside the
        # graph, so the wrapper gets a registry in its own attributes.
        registry = put_hook_registry(module, HookRegistry(module))
        forward = module.forward
        hook.class_forward = type(module).forward
        hook.registry = registry
        registry.register_hook(hook, _NAME)
        functools.update_wrapper(module.forward, forward)  # diffusers before 0.40 hides the signature
    except BaseException:
        if hook_of(module) is hook:
            hook_registry(module).remove_hook(_NAME, recurse=False)
        _restore(module, hook.before)
        hook.registry = None
        raise


def _restore(module: nn.Module, before: Mapping[str, object]) -> None:
    for name, value in before.items():
        if value is None:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value


def _uninstall(
    of: weakref.ref[nn.Module], by: weakref.ref[SharedHook[Calls]], route: weakref.ref[Route[Calls]]
) -> None:
    """Removes the route, and after the last one the hook and all that registering it left on the instance.

    Goes on where it was interrupted.
    """
    module, hook = of(), by()
    if module is None or hook is None:
        return
    gone = route()
    if gone is not None:
        hook.handles.pop(gone, None)
    registry = hook_registry(module)
    if hook.handles or registry is None or registry is not hook.registry:
        return
    if registry.get_hook(_NAME) is hook:
        registry.remove_hook(_NAME, recurse=False)
    if not registry.hooks:
        _restore(module, hook.before)
    hook.registry = None


def named_arguments(
    module: nn.Module,
    bases: tuple[str, ...],
    original: Forward,
    args: Sequence[object],
    kwargs: Arguments,
) -> dict[str, Any]:
    """Returns the arguments of a call by name.

    bases: names of diffusers' classes, from one of which the module's derives. original: the forward that the model
    has, which may take more.
    """
    model: Any = type(uncompiled(module))
    signature = _signature_of(model, bases)
    further = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    if further:
        # What its own does not take is an error; a compiled model's takes anything.
        inspect.signature(original if module is uncompiled(module) else uncompiled(module).forward).bind(
            *args, **kwargs
        )
    known = {name: value for name, value in kwargs.items() if name not in further}
    arguments = dict(signature.bind(module, *args, **known).arguments)
    del arguments["self"]
    return {**arguments, **further}


@functools.cache
def _signature_of(model: Any, bases: tuple[str, ...]) -> inspect.Signature:
    return inspect.signature(next(kind for kind in model.__mro__ if kind.__name__ in bases).forward)


def hook_of(module: nn.Module) -> SharedHook[Any] | None:
    """Returns jitaccel's hook on a module, or None."""
    registry = hook_registry(module)
    return None if registry is None else registry.get_hook(_NAME)
