"""diffusers' FLUX.1, FLUX.2 and Chroma: their pipelines, and bare transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.execution.private import is_compiled_in_place, uncompiled
from jitaccel.generation.handle import Handle, Installation
from jitaccel.method.config import JiTConfig

from .. import is_instance_of
from ..flux.arguments import SeenIds, check_guidance, grid_of_ids, one_image, single_level
from ..flux.calls import FluxCalls
from ..flux.kinds import MODELS, PIPELINES, channels_of, kind_of, token_multiple
from ..foreign import Arguments, Forward, Pipeline, settings_of
from ..loops.velocity import VelocityRoute
from ..models import MODELS as CUT
from ..models.refused import remark_on
from ..network import ModelCall, answered, cache_problem, refuse_controlnet
from ..ranks import check_divided, check_order, rank_problems, ranks_multiple, ranks_of
from ..split import Split
from .caller import calling_pipeline
from .controlnet import apply_to_controlnet, check_controlnet
from .decoding import decode_tokens
from .hook import Route, SharedHook, hook_of, install, named_arguments
from .refused import refuse_arguments
from .scheduler import SchedulerRoute, check_scheduler
from .warm import generate_once
from .wrapped import scheduler_handle

_FILL_CHANNELS = 6  # in to out: the state, a masked picture, and 8 x 8 mask values of each of its four pixels


def prepare_pipeline(
    pipeline: Pipeline, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Installation:
    """Returns the patch to install on a pipeline."""
    if levels is not None:
        raise ConfigError(
            "apply: noise_levels must be left out for a pipeline, whose scheduler is followed, got a list; "
            "use schedule=(...), steps=len(schedule) - 1 to set levels"
        )
    check_pipeline(pipeline)
    on_anchors = execution.controlnet == "anchors"
    if on_anchors:
        check_controlnet(pipeline)
    replaces = handles_of(pipeline, [pipeline.transformer])
    refuse_shared_scheduler(pipeline, replaces)
    calls = FluxCalls(pipeline.transformer, config, execution)
    name = f"diffusers {type(pipeline).__name__}"
    route = SchedulerRoute(pipeline, config, codebase=name, calls=calls, may_be_dense=execution.may_be_dense)

    def put(pipeline: Pipeline, handle: Handle) -> None:
        install(pipeline.transformer, _Hook, handle, route)
        if on_anchors:
            apply_to_controlnet(pipeline, handle, route)
        route.install(handle)

    return Installation(
        route=route,
        install=put,
        release=calls.release,
        check_idle=route.check_idle,
        replaces=replaces,
        generate=generate_once,
        decode=decode_tokens,
    )


def handles_of(pipeline: Pipeline, transformers: Sequence[nn.Module]) -> tuple[Handle, ...]:
    """Returns the handles of this pipeline, and those of a pipeline that is gone but shared its parts.

    They are found at the transformers or at the scheduler, because either may have been replaced since.
    """
    hooks = [hook for transformer in transformers if (hook := hook_of(transformer))]
    found = [handle for hook in hooks for handle in hook.handles.values()]
    if (handle := scheduler_handle(pipeline.scheduler)) is not None:
        found.append(handle)
    routes = [(handle, handle.route) for handle in dict.fromkeys(found)]
    return tuple(
        handle
        for handle, route in routes
        if isinstance(route, SchedulerRoute) and (route.is_of(pipeline) or route.is_orphan)
    )


def prepare_transformer(
    transformer: nn.Module, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Installation:
    """Returns the patch to install on a transformer that a custom loop calls."""
    check_transformer(transformer)
    refuse_controlnet(execution)
    calls = FluxCalls(transformer, config, execution)
    name = f"diffusers {type(transformer).__name__}"
    route = VelocityRoute(config, levels, codebase=name, calls=calls, may_be_dense=execution.may_be_dense)

    def put(transformer: nn.Module, handle: Handle) -> None:
        install(transformer, _Hook, handle, route)

    return Installation(route=route, install=put, release=calls.release)


class _Hook(SharedHook[FluxCalls]):
    """Answers the calls of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self._ids = SeenIds()
        self._totals: WeakKeyDictionary[Route[FluxCalls], int] = WeakKeyDictionary()  # image tokens of the last call

    # A graph traced around the hook would break at each of its decisions and take minutes to compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        original = self.original_of(module)
        caller = calling_pipeline()
        route = self.route_of(caller)
        if route is None:
            return original(*args, **kwargs)
        if _is_compiled_around(module, caller):
            route.calls.note_compiled_around()
        arguments = named_arguments(module, MODELS, original, args, kwargs)
        return answered(
            route,
            functools.partial(self._sparse, module, original, route, arguments),
            functools.partial(original, *args, **kwargs),
        )

    def _sparse(
        self, module: nn.Module, original: Forward, route: Route[FluxCalls], arguments: Arguments
    ) -> object:
        check_order(module, self)
        split = self._split(module, route, arguments)
        velocity = split.whole(route.forward(_model_call(module, self, original, route, arguments, split)))
        return Transformer2DModelOutput(sample=velocity) if arguments.get("return_dict", True) else (velocity,)

    def _split(self, module: nn.Module, route: Route[FluxCalls], arguments: Arguments) -> Split:
        """Returns which part of a call is generated."""
        ids, hidden = arguments["img_ids"], arguments["hidden_states"]
        if ids.shape[-2] != hidden.shape[1]:
            raise ValueError(
                f"jitaccel: img_ids must be the raster of the {hidden.shape[1]} tokens given, and of references after "
                f"them, got {ids.shape[-2]} ids; build them as the pipelines do"
            )
        # FLUX.2's pipelines create new ids in every step. Reading them waits for the device, so the count is kept.
        count = route.num_tokens if self._totals.get(route) == ids.shape[-2] else None
        if count is None:
            count = self._ids.num_generated(ids)
        self._totals[route] = ids.shape[-2]
        return Split(hidden, count, channels_of(module))


def check_pipeline(pipeline: Pipeline) -> None:
    """Raises UnsupportedModelError with every reason why a pipeline cannot be accelerated correctly."""
    models = [model for model, names in PIPELINES.items() if is_instance_of(pipeline, "diffusers", *names)]
    if not models:
        kinds = (*PIPELINES.values(), *(model.pipelines for model in CUT))
        known = ", ".join(name for pipelines in kinds for name in pipelines)
        remark = remark_on(getattr(pipeline, "transformer", None))
        problems = [
            f"pipeline must be one of {known}, got {type(pipeline).__name__}, which is not accelerated yet{remark}"
        ]
    else:
        problems = _scheduler_problems(pipeline) + _model_problems(pipeline.transformer, models[:1])
    if problems:
        raise UnsupportedModelError(explain(pipeline, problems))


def check_transformer(transformer: nn.Module) -> None:
    """Raises UnsupportedModelError with every reason why a bare transformer cannot be accelerated correctly."""
    if problems := _model_problems(transformer):
        raise UnsupportedModelError(explain(transformer, problems))


def check_text_to_image(pipeline: Pipeline, *, has_transformer: bool = True) -> None:
    """Raises UnsupportedModelError like `check_pipeline`, and for all but FLUX.1's `FluxPipeline`.

    has_transformer: whether the pipeline's own transformer is called.
    """
    if not is_instance_of(pipeline, "diffusers", "FluxPipeline"):
        problems = [f"pipeline must be a FluxPipeline (text to image), got {type(pipeline).__name__}"]
    elif has_transformer:
        check_pipeline(pipeline)
        return
    else:
        problems = _scheduler_problems(pipeline)
    if problems:
        raise UnsupportedModelError(explain(pipeline, problems))


def _scheduler_problems(pipeline: Pipeline) -> list[str]:
    return [f"pipeline: {reason}" for reason in check_scheduler(pipeline.scheduler)]


def _model_problems(transformer: nn.Module, models: Sequence[str] = MODELS) -> list[str]:
    if not is_instance_of(transformer, "diffusers", *models):
        return [f"transformer must be a {' or '.join(models)}, got {type(transformer).__name__}"]
    if (problem := cache_problem(transformer)) is not None:
        return [f"transformer must have no cache, got {problem}"]
    kind = kind_of(transformer)
    return rank_problems(transformer, is_known=kind is not None and kind.divides)


def explain(target: object, problems: list[str]) -> str:
    """Returns the message of a target that cannot be accelerated, with every reason."""
    return f"apply: {type(target).__name__} cannot be accelerated: " + "; ".join(problems)


def refuse_shared_scheduler(pipeline: Pipeline, replaces: Sequence[Handle]) -> None:
    """Raises ConfigError if the scheduler of this pipeline carries the patch of another pipeline."""
    handle = scheduler_handle(pipeline.scheduler)
    if handle is not None and handle.is_active and handle not in replaces:
        raise ConfigError(
            "apply: pipeline must have a scheduler of its own, got one that is patched for another pipeline; "
            "set pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config) first"
        )


def _model_call(
    module: nn.Module,
    hook: _Hook,
    original: Forward,
    route: Route[FluxCalls],
    arguments: Arguments,
    split: Split,
) -> ModelCall:
    kind = kind_of(module)
    assert kind is not None
    refuse_arguments(module, kind, arguments)
    state = split.state
    text_tokens = arguments["encoder_hidden_states"].shape[1]

    def grid() -> tuple[int, ...]:
        check_guidance(arguments.get("guidance"))
        return grid_of_ids(one_image(arguments["img_ids"])[: split.num_tokens], state.shape[1])

    check_divided(
        ranks_multiple(module), route.config, grid, split.num_tokens, text_tokens, split.num_references
    )
    settings = {**settings_of(module), "out_channels": split.channels}
    cost, references = functools.partial(kind.cost, settings), split.num_references  # and no tensor is kept
    return ModelCall(
        state=state,
        text_tokens=text_tokens,
        cost=lambda image_tokens, text_tokens: cost(image_tokens + references, text_tokens),
        grid=grid,
        noise_level=lambda: single_level(arguments["timestep"]),
        mask=lambda: _mask(split, route),
        multiple=token_multiple(module),
        ranks=ranks_of(module),
        patch=kind.patch,
        evaluate=functools.partial(route.calls.evaluate, module, hook, original, arguments, split),
    )


def _mask(split: Split, route: Route[FluxCalls]) -> Tensor | None:
    """Returns the tokens (B, N) that are repainted, or None if neither a Fill model nor its pipeline has a mask."""
    if split.extra is not None and split.hidden.shape[2] == _FILL_CHANNELS * split.channels:
        return (split.extra[..., split.channels :] > 0).any(dim=2)
    found: Tensor | None = route.inpainted_tokens(split.hidden.shape[0], split.num_tokens)
    return found


def _is_compiled_around(module: nn.Module, caller: object) -> bool:
    """Returns whether `torch.compile` wraps the hook on a module, where it can compile nothing."""
    called = getattr(caller, "transformer", None)
    is_wrapped = called is not module and uncompiled(called) is module
    return is_wrapped or is_compiled_in_place(module)
