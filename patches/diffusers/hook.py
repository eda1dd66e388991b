"""One hook on a diffusers module, shared by any number of patched pipelines."""

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
    """Finds the route of a call; subclasses define `new_forward`."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.handles: dict[Route[Calls], Handle] = {}
        self.before: dict[str, object] = {}
        self.registry: Any = None  # the registry that holds the hook, until the module is fully restored
        self.class_forward: Forward | None = None  # the forward of the module's class when the hook was installed

    @property
    def routes(self) -> tuple[Route[Calls], ...]:
        """The routes, pipelines first; a bare route answers all other calls."""
        return tuple(sorted(self.handles, key=lambda route: isinstance(route, VelocityRoute)))

    def route_of(self, caller: object) -> Route[Calls] | None:
        """Returns the route of a call made inside `caller` (a pipeline, or None); None if the call runs dense."""
        route = next((route for route in self.routes if route.accepts(caller)), None)
        return None if route is None or route.is_dense else route

    def original_of(self, module: nn.Module) -> Forward:
        """Returns the forward that the hook wraps, or the class's current forward if that was replaced since.

        Raises:
            UnsupportedModelError: If the class's forward was replaced, but other hooks in between call the old one.
        """
        original: Forward = self.fn_ref.original_forward
        own = type(module).forward
        beneath = forward_beneath_hooks(module, original)
        if own is self.class_forward or getattr(beneath, "__func__", None) is not self.class_forward:
            return original
        if beneath is original:
            return types.MethodType(own, module)
        raise UnsupportedModelError(
            f"jitaccel: {type(module).__name__}.forward must be replaced before apply if the model has hooks "
            f"(offloading), got one that was replaced afterwards; remove() the handle, and apply again"
        )

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Ends the generation of one pipeline; diffusers calls this when that pipeline is done."""
        caller = calling_pipeline()
        for route in self.routes:
            if caller is None or (isinstance(route, SchedulerRoute) and route.is_of(caller)):
                route.reset()
        return module


def install(module: nn.Module, kind: type[SharedHook[Calls]], handle: Handle, route: Route[Calls]) -> None:
    """Makes a module's hook answer the calls of a route; adds a hook if the module has none."""
    found = hook_of(module)
    hook = kind() if found is None else found
    what = f"{type(module).__name__} hook {_NAME!r}"
    handle.change(what, _uninstall, weakref.ref(module), weakref.ref(hook), weakref.ref(route))
    hook.handles[route] = handle
    if found is None:
        _register(module, hook)


def _register(module: nn.Module, hook: SharedHook[Calls]) -> None:
    """Installs a hook on a module. If this fails or is interrupted, the module is restored."""
    hook.before = {name: vars(module).get(name) for name in ("forward", HOOK_REGISTRY)}
    try:
        # torch.compile's wrapper exposes its model's registry. The hook belongs on the wrapper, outside the graph, so
        # the wrapper gets a registry of its own.
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
    """Removes the route. After the last route, removes the hook and everything it left on the instance.

    If interrupted, it can be called again to finish.
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

    Args:
        module: The module that is called.
        bases: Names of diffusers' classes, one of which is the module's class or a base of it.
        original: The model's forward, which may take more arguments.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    model: Any = type(uncompiled(module))
    signature = _signature_of(model, bases)
    further = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    if further:
        # Unknown arguments must be an error; the forward of a compiled model would accept anything.
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
