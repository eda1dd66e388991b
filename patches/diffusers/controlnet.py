"""Runs a ControlNet on the anchors only, if requested. Its residuals elsewhere are zeros, which are never added.

diffusers calls a ControlNet before the transformer, with the state and the position ids of the same step. Its first
call therefore starts a generation, and every later call finds the anchors of its step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetOutput
from torch import Tensor, nn

from jitaccel.errors import UnsupportedModelError
from jitaccel.generation.handle import Handle
from jitaccel.generation.route import Answer
from jitaccel.method.run import Run

from .. import is_instance_of
from ..flux.arguments import grid_of_ids, one_image, single_level
from ..flux.calls import FluxCalls
from ..flux.indexed import calls_at_anchors
from ..flux.kinds import CONTROLNET, Kind, kind_of, token_multiple
from ..foreign import Arguments, Forward, Pipeline, settings_of
from ..network import ModelCall, answered
from ..split import Split
from .caller import calling_pipeline
from .hook import SharedHook, install, named_arguments
from .refused import refuse_arguments
from .scheduler import SchedulerRoute


def apply_to_controlnet(pipeline: Pipeline, handle: Handle, route: SchedulerRoute[FluxCalls]) -> None:
    """Makes every ControlNet of a pipeline run on the anchors of a route."""
    for network in _networks(pipeline):
        install(network, _ControlNetHook, handle, route)


def check_controlnet(pipeline: Pipeline) -> None:
    """Raises UnsupportedModelError if a pipeline has no ControlNet, or one that reads the whole picture."""
    networks = _networks(pipeline)
    if not all(is_instance_of(network, "diffusers", CONTROLNET.model) for network in networks):
        kinds = [type(network).__name__ for network in networks]
        raise UnsupportedModelError(
            f"apply: controlnet='anchors' needs a pipeline with a {CONTROLNET.model}, got {', '.join(kinds)}; "
            f"leave it out"
        )
    if any(network.input_hint_block is not None for network in networks):
        raise UnsupportedModelError(
            "apply: controlnet='anchors' needs a ControlNet that takes tokens, got one that reads the whole picture "
            "(conditioning_embedding_channels is set); leave it out"
        )


def _networks(pipeline: Pipeline) -> list[nn.Module]:
    given = getattr(pipeline, "controlnet", None)
    return list(getattr(given, "nets", [given]))


class _ControlNetHook(SharedHook[FluxCalls]):
    """Starts a generation with its first call, and runs the ControlNet on the anchors of each step."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        original = self.original_of(module)
        route = self.route_of(calling_pipeline())
        if not isinstance(route, SchedulerRoute):  # None: a dense call
            return original(*args, **kwargs)
        arguments = named_arguments(module, (CONTROLNET.model,), original, args, kwargs)
        return answered(
            route,
            functools.partial(_at_anchors, original, route, arguments),
            functools.partial(original, *args, **kwargs),
        )


def _at_anchors(original: Forward, route: SchedulerRoute[FluxCalls], arguments: Arguments) -> object:
    transformer = route.transformer
    kind = kind_of(transformer)
    assert kind is not None
    split = Split(arguments["hidden_states"], *arguments["hidden_states"].shape[1:])
    # Refuse what the transformer would refuse before the generation begins.
    refuse_arguments(transformer, kind, {"joint_attention_kwargs": arguments.get("joint_attention_kwargs")})
    run = route.run_of(_beginning(route, kind, arguments, split))
    if run.is_dense:
        return original(**arguments)
    made = [
        original(**{**own, "return_dict": False})
        for own in calls_at_anchors(CONTROLNET, arguments, split, run, split.state)
    ]
    double, single = (_whole([each[k] for each in made], run) for k in (0, 1))
    if not arguments.get("return_dict", True):
        return double, single
    return FluxControlNetOutput(controlnet_block_samples=double, controlnet_single_block_samples=single)


def _beginning(route: SchedulerRoute[FluxCalls], kind: Kind, arguments: Arguments, split: Split) -> ModelCall:
    """Returns the call that starts the generation, with the values that the transformer will be called with."""
    return ModelCall(
        state=split.state,
        text_tokens=arguments["encoder_hidden_states"].shape[1],
        cost=functools.partial(kind.cost, settings_of(route.transformer)),
        grid=lambda: grid_of_ids(one_image(arguments["img_ids"]), split.num_tokens),
        noise_level=lambda: single_level(arguments["timestep"]),
        mask=lambda: route.inpainted_tokens(*split.hidden.shape[:2]),
        multiple=token_multiple(route.transformer),
        patch=kind.patch,
        evaluate=_not_evaluated,
    )


def _not_evaluated(run: Run, state: Tensor) -> Answer:
    raise AssertionError("a ControlNet returns no velocity")


def _whole(of_images: Sequence[Sequence[Tensor] | None], run: Run) -> list[Tensor] | None:
    """Returns residuals (B, N, width) from those computed at the anchors of each forward; None if there are none."""
    if of_images[0] is None:
        return None
    return [run.plan.spread(torch.cat([*rows])) for rows in zip(*of_images, strict=True)]
