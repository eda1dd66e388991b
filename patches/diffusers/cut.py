"""Pipelines and bare transformers of diffusers that are cut: all models described in patches/models."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.execution.private import is_compiled_in_place, uncompiled
from jitaccel.generation.handle import Handle, Installation
from jitaccel.method.config import JiTConfig

from ..cutting import problems_of
from ..foreign import Arguments, Forward, Pipeline
from ..loops.velocity import VelocityRoute
from ..models import MODELS, model_of, model_of_pipeline
from ..models.calls import CutCalls
from ..models.model import Model
from ..network import answered, cache_problem
from ..ranks import rank_problems
from .caller import calling_pipeline
from .decoding import decode_tokens
from .guidance import guidance_problem, mixes_tokens
from .hook import Route, SharedHook, install, named_arguments
from .latents import LatentsRoute
from .multistep import scheduler_problems
from .pipelines import explain, handles_of, refuse_shared_scheduler
from .warm import generate_once

_NAMES = ("transformer", "transformer_2")  # attributes of a pipeline; Wan 2.2 has one for each half of the levels


def prepare_pipeline(
    pipeline: Pipeline, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Installation:
    """Returns the installation for a pipeline.

    Raises:
        ConfigError: If levels are given, which the pipeline's scheduler sets, or another patched pipeline uses the
            same scheduler.
        UnsupportedModelError: If the pipeline cannot be accelerated correctly; the message lists every reason.
    """
    if levels is not None:
        raise ConfigError(
            "apply: noise_levels must be left out for a pipeline, where the scheduler sets them, got a list; "
            "use schedule=(...), steps=len(schedule) - 1 to set levels"
        )
    model = model_of_pipeline(pipeline)
    assert model is not None
    networks = networks_of(pipeline)
    check_pipeline(pipeline, model, config)
    replaces = handles_of(pipeline, list(networks.values()))
    refuse_shared_scheduler(pipeline, replaces)
    calls = CutCalls(model, list(networks.values()), execution)
    route = LatentsRoute(
        pipeline,
        networks,
        model.layout(uncompiled(next(iter(networks.values()))).config),
        config,
        codebase=f"diffusers {type(pipeline).__name__}",
        calls=calls,
        may_be_dense=execution.may_be_dense,
        spacings=model.spacings,
    )

    def put(pipeline: Pipeline, handle: Handle) -> None:
        for network in networks_of(pipeline).values():
            install(network, _Hook, handle, route)
        _install_cut(calls, model, handle)
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


def prepare_transformer(
    transformer: nn.Module, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Installation:
    """Returns the installation for a transformer that a custom Euler loop calls.

    Raises:
        UnsupportedModelError: If the transformer cannot be accelerated correctly; the message lists every reason.
    """
    model = model_of(transformer)
    assert model is not None
    if problems := _model_problems(transformer, model):
        raise UnsupportedModelError(explain(transformer, problems))
    calls = CutCalls(model, [transformer], execution)
    route = VelocityRoute(
        config,
        levels,
        codebase=f"diffusers {type(uncompiled(transformer)).__name__}",
        calls=calls,
        may_be_dense=execution.may_be_dense,
    )

    def put(transformer: nn.Module, handle: Handle) -> None:
        install(transformer, _Hook, handle, route)
        _install_cut(calls, model, handle)

    return Installation(route=route, install=put, release=calls.release)


def check_pipeline(pipeline: Pipeline, model: Model, config: JiTConfig) -> None:
    """Raises UnsupportedModelError with every reason why a pipeline of a model cannot be accelerated correctly."""
    networks = networks_of(pipeline)
    found = scheduler_problems(pipeline.scheduler, config.solver, model.inverts_levels)
    problems = [f"pipeline: {reason}" for reason in found]
    if not networks:
        problems.append("pipeline must have a transformer, got none")
    for name, network in networks.items():
        problems += [f"{name}: {reason}" for reason in _model_problems(network, model)]
    if problems:
        raise UnsupportedModelError(explain(pipeline, problems))


def networks_of(pipeline: object) -> dict[str, nn.Module]:
    """Returns a pipeline's transformers, by attribute name."""
    return {name: network for name in _NAMES if (network := getattr(pipeline, name, None)) is not None}


def _install_cut(calls: CutCalls, model: Model, handle: Handle) -> None:
    places = ", ".join((*model.adapter.outputs, *model.adapter.blocks, *model.adapter.methods))
    handle.change(f"{model.name} cut at {places}", calls.remove)
    calls.install()


def _model_problems(transformer: nn.Module, model: Model) -> list[str]:
    found = model_of(transformer)
    if found is not model:
        return [f"transformer must be a {model.name}, got {type(transformer).__name__}"]
    problems = problems_of(uncompiled(transformer), model.adapter)
    problems += rank_problems(uncompiled(transformer), is_known=model.divides)
    if (reason := model.problem(uncompiled(transformer).config)) is not None:
        problems.append(reason)
    if (problem := cache_problem(transformer)) is not None:
        problems.append(f"transformer must have no cache, got {problem}")
    return problems


class _Hook(SharedHook[CutCalls]):
    """Answers the calls of a cut transformer."""

    # A graph around the hook would break at each of its decisions.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        original, caller = self.original_of(module), calling_pipeline()
        route = self.route_of(caller)
        if route is None:
            return original(*args, **kwargs)
        if _is_compiled_around(module, caller):
            route.calls.note_compiled_around()
        arguments = named_arguments(module, tuple(model.name for model in MODELS), original, args, kwargs)
        return answered(
            route,
            functools.partial(_sparse, module, original, route, arguments, caller),
            functools.partial(original, *args, **kwargs),
        )


def _sparse(
    module: nn.Module, original: Forward, route: Route[CutCalls], arguments: Arguments, caller: object
) -> object:
    model = route.calls.model
    if (problem := guidance_problem(caller)) is not None:
        raise UnsupportedModelError(
            f"jitaccel: the call may only use features that can be accelerated correctly, got {problem}; "
            f"remove() the handle for this call"
        )
    arguments, branches = model.words.read(arguments), 1
    if model.branches == "batch" and isinstance(route, LatentsRoute):
        branches = route.branches_of(arguments["hidden_states"].shape[0])
    given = route.calls.given(module, arguments, branches, mixes_tokens(caller))
    route.calls.check_divided(module, given, route.config)
    output = model.words.returned(given.output(route.forward(route.calls.call(module, original, given))))
    if not arguments.get("return_dict", True):
        return (output, *given.further)
    return Transformer2DModelOutput(sample=output) if model.result is None else model.result(output, *given.further)


def _is_compiled_around(module: nn.Module, caller: object) -> bool:
    """Returns whether `torch.compile` was applied outside the hook on a module, where it has no effect."""
    called = [network for network in networks_of(caller).values() if network is not module]
    return is_compiled_in_place(module) or any(uncompiled(network) is module for network in called)
