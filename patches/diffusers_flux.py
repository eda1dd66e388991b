"""diffusers' FLUX.1: `FluxPipeline`, and a bare `FluxTransformer2DModel`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from jitaccel.config import JiTConfig
from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution import Execution
from jitaccel.flops import flux_flops
from jitaccel.handle import Handle
from jitaccel.run import Run

from . import is_instance_of
from .call import ModelCall
from .caller import calling_pipeline
from .packed_calls import FluxCalls
from .scheduler_route import SchedulerRoute, check_scheduler, handle_of
from .velocity_route import VelocityRoute

_HOOK = "jitaccel"
_PARAMETERS = inspect.signature(FluxTransformer2DModel.forward)
_ATTENTION_ARGUMENTS = ("scale", "ip_adapter_image_embeds")  # those that any subset of the tokens may have
_PER_IMAGE = ("encoder_hidden_states", "pooled_projections", "timestep", "guidance")
_NOT_YET = {
    "controlnet_block_samples": "ControlNet residuals",
    "controlnet_single_block_samples": "ControlNet residuals",
}


def apply_to_pipeline(
    pipeline: Any, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Handle:
    """Returns the handle of a patched `FluxPipeline`."""
    if levels is not None:
        raise ConfigError(
            "apply: noise_levels must be left out for a pipeline, whose scheduler is followed, got a list; "
            "use schedule=(...), steps=len(schedule) - 1 to set levels"
        )
    check_pipeline(pipeline)
    calls = FluxCalls(pipeline.transformer, config, execution, _run_indexed)
    for old in _handles_of(pipeline):
        old.remove()
    _refuse_shared_scheduler(pipeline)
    route = SchedulerRoute(pipeline, config, codebase=f"diffusers {type(pipeline).__name__}", calls=calls)
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
    calls = FluxCalls(transformer, config, execution, _run_indexed)
    route = VelocityRoute(config, levels, codebase=f"diffusers {type(transformer).__name__}", calls=calls)
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

    @property
    def routes(self) -> tuple[Any, ...]:
        """Pipelines first: a bare route answers whatever is left."""
        return tuple(sorted(self.handles, key=lambda route: isinstance(route, VelocityRoute)))

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.fn_ref.original_forward
        caller = calling_pipeline()
        route = next((route for route in self.routes if route.accepts(caller)), None)
        if route is None:
            return original(*args, **kwargs)
        arguments = dict(_PARAMETERS.bind(module, *args, **kwargs).arguments)
        del arguments["self"]
        try:
            velocity = route.forward(_model_call(module, self, original, route.calls, arguments))
        except BaseException:
            route.abandon()
            raise
        return Transformer2DModelOutput(sample=velocity) if arguments.get("return_dict", True) else (velocity,)

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
        registry.register_hook(hook, _HOOK)
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
    problems = _pipeline_problems(pipeline)
    if _is_text_to_image(pipeline):
        problems += _model_problems(pipeline.transformer)
    if problems:
        raise UnsupportedModelError(_explain(pipeline, problems))


def check_without_transformer(pipeline: Any) -> None:
    """Raises UnsupportedModelError like `check_pipeline`, for a pipeline whose transformer is not called."""
    if problems := _pipeline_problems(pipeline):
        raise UnsupportedModelError(_explain(pipeline, problems))


def _pipeline_problems(pipeline: Any) -> list[str]:
    if not _is_text_to_image(pipeline):
        return [
            f"pipeline must be a FluxPipeline (text to image), got {type(pipeline).__name__}, "
            f"which is not accelerated yet"
        ]
    return [f"pipeline: {reason}" for reason in check_scheduler(pipeline.scheduler)]


def _is_text_to_image(pipeline: Any) -> bool:
    """Returns whether this is diffusers' `FluxPipeline`, or derived from it."""
    return any(kind.__name__ == "FluxPipeline" for kind in type(pipeline).__mro__)


def _model_problems(transformer: Any) -> list[str]:
    if not is_instance_of(transformer, "diffusers", "FluxTransformer2DModel"):
        return [f"transformer must be a FluxTransformer2DModel, got {type(transformer).__name__}"]
    problems = []
    config = transformer.config
    if config.out_channels not in (None, config.in_channels):
        problems.append(
            f"transformer must have as many channels out as in, got {config.in_channels} in and {config.out_channels} "
            f"out (Fill and Control models are not accelerated yet)"
        )
    if getattr(transformer, "is_cache_enabled", False):
        problems.append("transformer must have no cache enabled, got one: call transformer.disable_cache() first")
    return problems


def _explain(target: Any, problems: list[str]) -> str:
    return f"apply: {type(target).__name__} cannot be accelerated: " + "; ".join(problems)


def _refuse_shared_scheduler(pipeline: Any) -> None:
    if "set_timesteps" in vars(pipeline.scheduler):
        raise ConfigError(
            "apply: pipeline must have a scheduler of its own, got one that is patched for another pipeline; "
            "set pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config) first"
        )


def _model_call(
    module: Any, hook: Any, original: Callable[..., Any], calls: FluxCalls, arguments: dict[str, Any]
) -> ModelCall:
    _refuse_arguments(module, arguments)
    state = arguments["hidden_states"]
    return ModelCall(
        state=state,
        text_tokens=arguments["encoder_hidden_states"].shape[1],
        cost=functools.partial(flux_flops, module.config),
        grid=lambda: grid_of_ids(arguments["img_ids"], state.shape[1]),
        noise_level=lambda: _single_level(arguments["timestep"]),
        evaluate=functools.partial(calls.evaluate, module, hook, original, arguments),
    )


def _refuse_arguments(module: Any, arguments: Mapping[str, Any]) -> None:
    found = {reason for name, reason in _NOT_YET.items() if arguments.get(name) is not None}
    extra = arguments.get("joint_attention_kwargs") or {}
    found |= {f"joint_attention_kwargs[{name!r}]" for name in extra if name not in _ATTENTION_ARGUMENTS}
    if getattr(module, "is_cache_enabled", False):
        found.add("a cache enabled on the transformer")
    if found:
        raise UnsupportedModelError(
            f"jitaccel: the call must use what is accelerated correctly, got {', '.join(sorted(found))}; "
            f"remove() the handle for this call"
        )


def grid_of_ids(img_ids: Tensor, num_tokens: int) -> tuple[int, int]:
    """Returns (grid_h, grid_w) of position ids (N, 3) or (B, N, 3), rows (0, row, column) in raster order.

    Waits for the device. Raises UnsupportedModelError for reference tokens (first id 1 and above), ValueError for
    ids that are no raster, differ between images, or are not as many as the tokens.
    """
    ids = img_ids.detach()
    if ids.ndim == 3:
        if not bool((ids == ids[:1]).all()):
            raise ValueError("jitaccel: img_ids must be the same for every image, got ids that differ; pass (N, 3)")
        ids = ids[0]
    if bool((ids[:, 0] != 0).any()):
        raise UnsupportedModelError(
            "jitaccel: img_ids must start with 0 (generated tokens), got reference tokens; "
            "Kontext is not accelerated yet"
        )
    height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    raster = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    if ids.shape[0] != num_tokens or height * width != num_tokens or not torch.equal(ids.cpu().long(), raster):
        raise ValueError(
            f"jitaccel: img_ids must be the raster of the {num_tokens} tokens given, got {ids.shape[0]} ids up to row "
            f"{height - 1}, column {width - 1}; build them as FluxPipeline does"
        )
    return height, width


def _single_level(timestep: Tensor) -> float:
    levels = timestep.detach().float().flatten().tolist()
    if any(level != levels[0] for level in levels):
        raise UnsupportedModelError(
            f"jitaccel: timestep must be one noise level for the whole batch, got {levels}; call image by image"
        )
    if not 0.0 < levels[0] <= 1.0:
        raise ValueError(f"jitaccel: timestep must be a noise level in (0, 1], got {levels[0]:g}; divide it by 1000")
    return float(levels[0])


def _run_indexed(original: Callable[..., Any], arguments: dict[str, Any], run: Run, state: Tensor) -> Tensor:
    """Runs the model on the run's anchors of a state; image by image where their anchors differ."""
    if run.is_dense:
        return _velocity(original, arguments, hidden_states=state)
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    tokens = run.gather(state)
    if run.has_shared_anchors:
        return _velocity(original, arguments, hidden_states=tokens, img_ids=ids[run.anchors[0]])
    return torch.cat(
        [
            _velocity(
                original,
                {**arguments, **_of_image(arguments, image)},
                hidden_states=tokens[image : image + 1],
                img_ids=ids[run.anchors[image]],
            )
            for image in range(state.shape[0])
        ]
    )


def _of_image(arguments: Mapping[str, Any], image: int) -> dict[str, Any]:
    present = ((name, arguments.get(name)) for name in _PER_IMAGE)
    # One row serves every image of a batch, as it does in the model.
    rows: dict[str, Any] = {name: _row(value, image) for name, value in present if value is not None}
    extra = arguments.get("joint_attention_kwargs") or {}
    if "ip_adapter_image_embeds" in extra:
        embeds = [_row(adapter, image) for adapter in extra["ip_adapter_image_embeds"]]
        rows["joint_attention_kwargs"] = {**extra, "ip_adapter_image_embeds": embeds}
    return rows


def _row(values: Tensor, image: int) -> Tensor:
    return values[image : image + 1] if values.shape[0] > 1 else values


def _velocity(original: Callable[..., Any], arguments: dict[str, Any], **changed: Any) -> Tensor:
    velocity: Tensor = original(**{**arguments, **changed, "return_dict": False})[0]
    return velocity
