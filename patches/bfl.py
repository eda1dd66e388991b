"""Black Forest Labs' own `Flux` (github.com/black-forest-labs/flux), and its copies in kohya's scripts and x-flux.

    forward(img, img_ids, txt, txt_ids, timesteps, y, guidance=None, ...)

Its position ids have one row for each image, so the images of a batch can have different anchors in one forward. The
model does not get the next noise level: pass the result of `get_schedule` as `noise_levels=`, or it is predicted.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from jitaccel.execution.options import Execution
from jitaccel.execution.private import uncompiled
from jitaccel.generation.handle import Handle, Installation, Patched
from jitaccel.generation.route import Answer
from jitaccel.method.config import JiTConfig
from jitaccel.method.run import Run
from jitaccel.patches.flux.flops import chroma_flops, flux_flops

from .flux.arguments import SeenIds, grid_of_ids, one_image, shown_timestep, single_level
from .flux.params import config_of
from .foreign import Arguments, Forward
from .loops.velocity import VelocityRoute
from .network import IndexedCalls, ModelCall, answered
from .split import Split

_PATCH = 2  # latents along a token's side, as set by `prepare` in its sampling code
_RESIDUALS = ("block_controlnet_hidden_states", "block_controlnet_single_hidden_states")


def prepare(
    model: nn.Module, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution
) -> Installation:
    """Returns the installation for a `Flux`."""
    calls, kind = IndexedCalls("Flux", execution), type(uncompiled(model))
    name = f"{kind.__module__} {kind.__name__}"
    route = VelocityRoute(config, levels, codebase=name, calls=calls, may_be_dense=execution.may_be_dense)

    def put(model: nn.Module, handle: Handle) -> None:
        handle.set_attribute(model, "forward", Patched(_forward_of(model, handle, route)))

    return Installation(route=route, install=put)


def _forward_of(model: nn.Module, handle: Handle, route: VelocityRoute[IndexedCalls]) -> Forward:
    """Returns the function that replaces the model's forward."""
    plain = uncompiled(model)
    original, signature, seen = model.forward, inspect.signature(type(plain).forward), SeenIds()

    # If torch.compile is applied outside the patch, each decision of the patch would break the graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if not handle.is_active:
            return original(*args, **kwargs)
        arguments = dict(signature.bind(plain, *args, **kwargs).arguments)
        del arguments["self"]
        extra = arguments.pop("kwargs", {})

        def compute() -> Tensor:
            call, split = _model_call(plain, original, {**arguments, **extra}, seen)
            return split.whole(route.forward(call))

        velocity: Tensor = answered(route, compute, functools.partial(original, *args, **kwargs))
        return velocity

    return forward


def _model_call(
    model: nn.Module, original: Forward, arguments: Arguments, seen: SeenIds
) -> tuple[ModelCall, Split]:
    ids, num_tokens = arguments["img_ids"], seen.num_generated(arguments["img_ids"])
    params: Any = model.params
    channels = int(getattr(model, "out_channels", None) or params.in_channels)
    split = Split(arguments["img"], num_tokens, channels)
    config = config_of(params, params.in_channels, channels)
    flops = chroma_flops if "approximator_layers" in config else flux_flops
    references = split.num_references  # a number, so that the cost function, which statistics keep, holds no tensor
    call = ModelCall(
        state=split.state,
        text_tokens=arguments["txt"].shape[1],
        cost=lambda image_tokens, text_tokens: flops(config, image_tokens + references, text_tokens),
        grid=lambda: grid_of_ids(one_image(ids)[:num_tokens], split.state.shape[1]),
        noise_level=lambda: single_level(arguments["timesteps"]),
        patch=_PATCH,
        evaluate=functools.partial(_evaluate, original, arguments, split),
    )
    return call, split


def _evaluate(
    original: Forward, arguments: Arguments, split: Split, run: Run, state: Tensor
) -> Answer:
    """Runs the model on the anchors: their tokens, position ids and residuals."""
    batch = state.shape[0]
    changed: dict[str, Any] = {"img": split.tokens(run, state)}
    if not run.is_dense:
        ids = arguments["img_ids"][0]  # checked to be the same for every image
        changed["img_ids"] = torch.stack([split.ids_at(ids, positions) for positions in run.plan.positions])
        changed["timesteps"] = shown_timestep(run, arguments["timesteps"])
        # A single row of ids can serve all images, but the anchors' ids have a row for each, so text ids need them too.
        changed["txt_ids"] = arguments["txt_ids"].expand(batch, -1, -1)
        for name in _RESIDUALS:
            if arguments.get(name) is not None:
                changed[name] = [_residual_at(residual, split, run) for residual in arguments[name]]
    return Answer(original(**{**arguments, **changed})[:, : run.num_active])


def _residual_at(residual: Tensor, split: Split, run: Run) -> Tensor:
    """Cuts a residual (B, S, width), or (B, T + S, width) of a single-stream block, to the anchors.

    As in the model, a single row serves every image, and a single entry every token.
    """
    if residual.shape[1] == 1:
        return residual
    text_tokens = max(0, residual.shape[1] - split.hidden.shape[1])
    every = residual.expand(run.anchors.shape[0], *residual.shape[1:])
    return split.entering(run.show_features, every, before=text_tokens)
