"""diffusers' FLUX.1, FLUX.2 and Chroma: their pipelines, and bare transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from jitaccel.config import JiTConfig
from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution import Execution
from jitaccel.handle import Handle

from . import is_instance_of
from .arguments import grid_of_ids, one_image, single_level
from .call import ModelCall
from .caller import calling_pipeline, inpainting_mask
from .kinds import MODELS, PIPELINES, Kind, kind_of, token_multiple
from .packed_calls import FluxCalls
from .scheduler_route import SchedulerRoute, check_scheduler, handle_of
from .split import SeenIds, Split
from .velocity_route import VelocityRoute

_HOOK = "jitaccel"
_FILL_CHANNELS = 6  # in to out: the state, a masked picture, and 8 x 8 mask values of each of its four pixels


def apply_to_pipeline(
    pipeline: Any, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Handle:
    """Returns the handle of a patched pipeline."""
    if levels is not None:
        raise ConfigError(
            "apply: noise_levels must be left out for a pipeline, whose scheduler is followed, got a list; "
            "use schedule=(...), steps=len(schedule) - 1 to set levels"
        )
    check_pipeline(pipeline)
    calls = FluxCalls(pipeline.transformer, config, execution)
    for old in _handles_of(pipeline):
        old.remove()
    _refuse_shared_scheduler(pipeline)
    name = f"diffusers {type(pipeline).__name__}"
    route = SchedulerRoute(pipeline, config, codebase=name, calls=calls, may_be_dense=execution.may_be_dense)
    handle = Handle(pipeline, route)
    handle.on_remove(calls.release)
    _install(pipeline.transformer, handle, route)
    route.install(handle)
    return handle


def _handles_of(pipeline: Any) -> list[Handle]:
    """Returns what patched this pipeline before, and on the same parts one that is gone, for whom nobody can answer.

    Found at the transformer or at the scheduler: either may have been replaced since.
    """
    hook = hook_of(pipeline.transformer)
    found = [*hook.handles.values()] if hook else []
    if (handle := handle_of(pipeline.scheduler)) is not None:
        found.append(handle)
    routes = [(handle, handle.route) for handle in dict.fromkeys(found)]
    return [
        handle
        for handle, route in routes
        if isinstance(route, SchedulerRoute) and (route.is_of(pipeline) or route.is_orphan)
    ]


def apply_to_transformer(
    transformer: Any, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Handle:
    """Returns the handle of a patched transformer that somebody's own loop calls."""
    if problems := _model_problems(transformer):
        raise UnsupportedModelError(_explain(transformer, problems))
    calls = FluxCalls(transformer, config, execution)
    name = f"diffusers {type(transformer).__name__}"
    route = VelocityRoute(config, levels, codebase=name, calls=calls, may_be_dense=execution.may_be_dense)
    hook = hook_of(transformer)
    for other in hook.routes if hook else ():
        if isinstance(other, VelocityRoute):
            hook.handles[other].remove()
            break
    handle = Handle(transformer, route)
    handle.on_remove(calls.release)
    _install(transformer, handle, route)
    return handle


class _Hook(ModelHook):  # type: ignore[misc]
    """The one hook on a transformer, whatever number of pipelines share it: it finds the route of a call."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.handles: dict[Any, Handle] = {}
        self.before: dict[str, Any] = {}
        self._ids = SeenIds()

    @property
    def routes(self) -> tuple[Any, ...]:
        """Pipelines first: a bare route answers whatever is left."""
        return tuple(sorted(self.handles, key=lambda route: isinstance(route, VelocityRoute)))

    # A graph around the hook would be broken at each of its decisions, and take minutes to make.
    @torch.compiler.disable
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.fn_ref.original_forward
        caller = calling_pipeline()
        route = next((route for route in self.routes if route.accepts(caller)), None)
        if route is None or route.is_dense:
            return original(*args, **kwargs)
        if _is_compiled_around(module, caller):
            route.calls.note_compiled_around()
        arguments = _arguments(module, args, kwargs)
        try:
            split = self._split(module, arguments)
            velocity = split.whole(route.forward(_model_call(module, self, original, route.calls, arguments, split)))
        except UnsupportedModelError as error:
            if route.leave_dense(error):
                return original(*args, **kwargs)
            route.abandon()
            raise
        except BaseException:
            route.abandon()
            raise
        return Transformer2DModelOutput(sample=velocity) if arguments.get("return_dict", True) else (velocity,)

    def _split(self, module: Any, arguments: Mapping[str, Any]) -> Split:
        """Returns what of a call is generated."""
        ids, hidden = arguments["img_ids"], arguments["hidden_states"]
        if ids.shape[-2] != hidden.shape[1]:
            raise ValueError(
                f"jitaccel: img_ids must be the raster of the {hidden.shape[1]} tokens given, and of references after "
                f"them, got {ids.shape[-2]} ids; build them as the pipelines do"
            )
        return Split(hidden, self._ids.num_generated(ids), module.config.out_channels or module.config.in_channels)

    def reset_state(self, module: Any) -> Any:
        """Diffusers calls this when a pipeline is done; only that pipeline's generation is over."""
        caller = calling_pipeline()
        for route in self.routes:
            if caller is None or (isinstance(route, SchedulerRoute) and route.is_of(caller)):
                route.reset()
        return module


def _install(transformer: Any, handle: Handle, route: Any) -> None:
    hook = hook_of(transformer)
    if hook is None:
        hook = _Hook()
        hook.before = {name: vars(transformer).get(name) for name in ("forward", "_diffusers_hook")}
        # torch.compile's wrapper shows its model's registry as its own; the hook belongs on the wrapper, outside the
        # graph, so the wrapper gets a registry in its own attributes.
        registry = vars(transformer).setdefault("_diffusers_hook", HookRegistry(transformer))
        forward = transformer.forward
        registry.register_hook(hook, _HOOK)
        functools.update_wrapper(transformer.forward, forward)  # diffusers before 0.40 hides the signature
    hook.handles[route] = handle
    handle.change(f"{type(transformer).__name__} hook {_HOOK!r}", _uninstall, transformer, hook, route)


def _uninstall(transformer: Any, hook: Any, route: Any) -> None:
    """Removes the route, and after the last one the hook and all that registering it left on the instance."""
    hook.handles.pop(route, None)
    registry = vars(transformer).get("_diffusers_hook")
    if hook.handles or registry is None or registry.get_hook(_HOOK) is not hook:
        return
    registry.remove_hook(_HOOK, recurse=False)
    if registry.hooks:
        return
    for name, value in hook.before.items():
        if value is None:
            vars(transformer).pop(name, None)
        else:
            vars(transformer)[name] = value


def hook_of(transformer: Any) -> Any:
    """Returns jitaccel's hook on a transformer, or None."""
    registry = vars(transformer).get("_diffusers_hook")
    return None if registry is None else registry.get_hook(_HOOK)


def check_pipeline(pipeline: Any) -> None:
    """Raises UnsupportedModelError with every reason why a pipeline cannot be accelerated correctly."""
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    models = [model for model, pipelines in PIPELINES.items() if any(name in pipelines for name in names)]
    if not models:
        known = ", ".join(name for pipelines in PIPELINES.values() for name in pipelines)
        problems = [f"pipeline must be one of {known}, got {type(pipeline).__name__}, which is not accelerated yet"]
    else:
        problems = _scheduler_problems(pipeline) + _model_problems(pipeline.transformer, models[:1])
    if problems:
        raise UnsupportedModelError(_explain(pipeline, problems))


def check_text_to_image(pipeline: Any, *, has_transformer: bool = True) -> None:
    """Raises UnsupportedModelError like `check_pipeline`, and for all but FLUX.1's `FluxPipeline`.

    has_transformer: whether the pipeline's own transformer is called.
    """
    if not any(kind.__name__ == "FluxPipeline" for kind in type(pipeline).__mro__):
        problems = [f"pipeline must be a FluxPipeline (text to image), got {type(pipeline).__name__}"]
    elif has_transformer:
        check_pipeline(pipeline)
        return
    else:
        problems = _scheduler_problems(pipeline)
    if problems:
        raise UnsupportedModelError(_explain(pipeline, problems))


def _scheduler_problems(pipeline: Any) -> list[str]:
    return [f"pipeline: {reason}" for reason in check_scheduler(pipeline.scheduler)]


def _model_problems(transformer: Any, models: Sequence[str] = MODELS) -> list[str]:
    if not is_instance_of(transformer, "diffusers", *models):
        return [f"transformer must be a {' or '.join(models)}, got {type(transformer).__name__}"]
    if getattr(transformer, "is_cache_enabled", False):
        return ["transformer must have no cache enabled, got one: call transformer.disable_cache() first"]
    return []


def _explain(target: Any, problems: list[str]) -> str:
    return f"apply: {type(target).__name__} cannot be accelerated: " + "; ".join(problems)


def _refuse_shared_scheduler(pipeline: Any) -> None:
    if "set_timesteps" in vars(pipeline.scheduler):
        raise ConfigError(
            "apply: pipeline must have a scheduler of its own, got one that is patched for another pipeline; "
            "set pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config) first"
        )


def _model_call(
    module: Any,
    hook: Any,
    original: Callable[..., Any],
    calls: FluxCalls,
    arguments: dict[str, Any],
    split: Split,
) -> ModelCall:
    kind = kind_of(module)
    assert kind is not None
    _refuse_arguments(module, kind, arguments)
    state = split.state
    cost = functools.partial(kind.cost, module.config)
    return ModelCall(
        state=state,
        text_tokens=arguments["encoder_hidden_states"].shape[1],
        cost=lambda image_tokens, text_tokens: cost(image_tokens + split.num_references, text_tokens),
        grid=lambda: grid_of_ids(one_image(arguments["img_ids"])[: split.num_tokens], state.shape[1]),
        noise_level=lambda: single_level(arguments["timestep"]),
        mask=lambda: _mask(split),
        multiple=token_multiple(module),
        evaluate=functools.partial(calls.evaluate, module, hook, original, arguments, split),
    )


def _mask(split: Split) -> Tensor | None:
    """Returns the tokens (B, N) that are painted anew, where a Fill model or a pipeline has a mask."""
    is_fill = split.hidden.shape[2] == _FILL_CHANNELS * split.channels or "Fill" in type(calling_pipeline()).__name__
    if split.extra is not None and is_fill:
        return (split.extra[..., split.channels :] > 0).any(dim=2)
    mask = inpainting_mask()
    if mask is None or mask.ndim != 3 or mask.shape[1] != split.num_tokens:
        return None
    return (mask > 0).any(dim=2).expand(split.hidden.shape[0], -1)


def _is_compiled_around(module: Any, caller: Any) -> bool:
    """Whether `torch.compile` is outside the hook on a module, where it can compile nothing."""
    is_wrapped = getattr(getattr(caller, "transformer", None), "_orig_mod", None) is module
    return is_wrapped or module._compiled_call_impl is not None


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name; a derived class may take more than diffusers' own."""
    model: Any = type(getattr(module, "_orig_mod", module))
    signature = _signature_of(model)
    further = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    known = {name: value for name, value in kwargs.items() if name not in further}
    arguments = dict(signature.bind(module, *args, **known).arguments)
    del arguments["self"]
    return {**arguments, **further}


@functools.cache
def _signature_of(model: Any) -> inspect.Signature:
    """Returns the signature of diffusers' class among those that a model's class derives from."""
    return inspect.signature(next(kind for kind in model.__mro__ if kind.__name__ in MODELS).forward)


def _refuse_arguments(module: Any, kind: Kind, arguments: Mapping[str, Any]) -> None:
    found = {reason for name, reason in kind.refused.items() if arguments.get(name) is not None}
    extra = arguments.get("joint_attention_kwargs") or {}
    found |= {f"joint_attention_kwargs[{name!r}]" for name in extra if name not in kind.attention_arguments}
    if getattr(module, "is_cache_enabled", False):
        found.add("a cache enabled on the transformer")
    if found:
        raise UnsupportedModelError(
            f"jitaccel: the call must use what is accelerated correctly, got {', '.join(sorted(found))}; "
            f"remove() the handle for this call"
        )
