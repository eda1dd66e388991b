"""Forwards on noise with which a step of diffusers' FLUX.1, FLUX.2 and Chroma is timed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.limits import MOST_SIDE
from jitaccel.method.anchors import first_anchors
from jitaccel.method.presets import PRESETS
from jitaccel.method.run import Run
from jitaccel.method.steps import Step
from jitaccel.speed.cost import Probe

from .. import is_instance_of
from ..diffusers_private import accelerate_hook, execution_device, offloads_whole_models
from ..flux.calls import FluxCalls
from ..flux.kinds import channels_of, kind_of, token_multiple
from ..foreign import Arguments
from ..ranks import ranks_of
from ..split import Split
from .asked import call_parameters
from .hook import hook_of
from .pipelines import check_pipeline, check_transformer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

# Pipelines whose calls contain nothing unknown to a probe, such as masks, start pictures or ControlNets.
_MEASURED = ("FluxPipeline", "FluxControlPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "ChromaPipeline")
_TEXT_TOKENS = 512  # all these pipelines pad prompts to this by default
_PIXELS_PER_TOKEN = 16  # assumed for a bare transformer: a latent is 8 x 8 pixels, a token 2 x 2 latents
STEP = Step(index=0, stage=0, noise_level=0.5, next_level=0.4, may_end_stage=False)
"""The step that is timed."""
# The densities do not matter, because anchors are given. The lift is that of the presets.
SPARSE = PRESETS["7x"].replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)


def probe_pipeline(
    pipeline: DiffusionPipeline,
    size: tuple[int, int] | None,
    text_tokens: int | None,
    execution: Execution,
    call: Arguments,
) -> Probe:
    """Returns forwards of a pipeline's transformer for pictures of a size in pixels; None is the default size."""
    check_pipeline(pipeline)
    if not is_instance_of(pipeline, "diffusers", *_MEASURED):
        raise UnsupportedModelError(
            f"auto_config: target must be one of {', '.join(_MEASURED)}, got {type(pipeline).__name__}, whose calls "
            f"need inputs that cannot be measured beforehand (a mask, a picture, a ControlNet); "
            f'give a preset ("4x", "7x") instead'
        )
    _refuse_call(pipeline, call)
    scale = pipeline.vae_scale_factor
    side = pipeline.default_sample_size * scale
    made_for = getattr(getattr(pipeline.vae, "config", None), "sample_size", side)
    if size is None and made_for != side:
        raise ConfigError(
            f"auto_config: size must be given for this {type(pipeline).__name__}, whose default side is {side} pixels "
            f"although its autoencoder was made for {made_for}, got None; give (height, width) in pixels"
        )
    grid = _grid((side, side) if size is None else size, 2 * scale)
    text_tokens = text_tokens or _default_text_tokens(pipeline)
    return dataclasses.replace(
        _probe(pipeline.transformer, grid, text_tokens, execution, execution_device(pipeline)),
        release=functools.partial(offload, pipeline),
    )


def probe_transformer(
    transformer: ModelMixin,
    size: tuple[int, int] | None,
    text_tokens: int | None,
    execution: Execution,
    call: Arguments,
) -> Probe:
    """Returns forwards of a bare transformer for pictures of a size in pixels."""
    check_transformer(transformer)
    _refuse_call(transformer, call)
    if size is None:
        raise ConfigError(
            "auto_config: size must be given for a bare transformer, got None; give (height, width) in pixels"
        )
    hook = accelerate_hook(transformer)
    device = torch.device(getattr(hook, "execution_device", None) or transformer.device)
    return _probe(transformer, _grid(size, _PIXELS_PER_TOKEN), text_tokens or _TEXT_TOKENS, execution, device)


def _probe(
    model: ModelMixin, grid: tuple[int, int], text_tokens: int, execution: Execution, device: torch.device
) -> Probe:
    kind, hook, num_tokens = kind_of(model), hook_of(model), grid[0] * grid[1]
    assert kind is not None
    refuse_ranks(model)
    original = model if hook is None else hook.fn_ref.original_forward  # beneath the hook of an earlier apply
    calls = FluxCalls(model, SPARSE, dataclasses.replace(execution, compile=None))
    arguments = _arguments(model, grid, text_tokens, device)
    split = Split(arguments["hidden_states"], num_tokens, channels_of(model))

    def sparse(count: int) -> Callable[[], Tensor]:
        anchors = first_anchors(grid, count, torch.Generator("cpu").manual_seed(0))[None].to(device)
        run = Run(SPARSE, grid, STEP, split.state, anchors=anchors)

        def step() -> Tensor:
            answer = calls.evaluate(model, hook, original, arguments, split, run, split.state)
            return run.leave(STEP, split.state, run.gather(run.scatter(answer.values)))

        return step

    return Probe(
        grid=grid,
        num_tokens=num_tokens,
        text_tokens=text_tokens,
        device=device,
        dense=functools.partial(original, **{**arguments, "return_dict": False}),
        sparse=sparse,
        multiple=token_multiple(model),
    )


def _arguments(model: ModelMixin, grid: tuple[int, int], text_tokens: int, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of one call for one image, as the pipelines make them. Noise, because zeros run faster."""
    kind, settings, num_tokens = kind_of(model), model.config, grid[0] * grid[1]
    assert kind is not None
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, model.dtype)

    axes = len(settings.axes_dims_rope)
    rows, columns = torch.meshgrid(*(torch.arange(side, device="cpu") for side in grid), indexing="ij")
    image_ids = torch.zeros(num_tokens, axes, dtype=torch.float32, device="cpu")
    image_ids[:, 1], image_ids[:, 2] = rows.flatten(), columns.flatten()
    given: dict[str, Any] = {
        "hidden_states": noise(1, num_tokens, settings.in_channels),
        "encoder_hidden_states": noise(1, text_tokens, settings.joint_attention_dim),
        "timestep": torch.full((1,), STEP.noise_level, device=device, dtype=model.dtype),
        "img_ids": image_ids.to(device),
        "txt_ids": torch.zeros(text_tokens, axes, dtype=torch.float32, device=device),
    }
    if "pooled_projections" in kind.per_image:
        given["pooled_projections"] = noise(1, settings.pooled_projection_dim)
    if "guidance" in kind.per_image and settings.get("guidance_embeds", True):
        given["guidance"] = torch.full((1,), 3.5, dtype=torch.float32, device=device)
    for name in kind.masks:
        given[name] = torch.ones(1, text_tokens + num_tokens, dtype=torch.bool, device=device)
    return given


def _refuse_call(target: object, call: Arguments) -> None:
    if call:
        raise ConfigError(
            f"auto_config: call must be left out for a {type(target).__name__}, where size and text_tokens determine "
            f"the cost of a step, got {', '.join(call)}; leave it out"
        )


def _grid(size: tuple[int, int], unit: int) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or any(
        not isinstance(side, int) or not unit <= side <= MOST_SIDE or side % unit for side in sides
    ):
        raise ConfigError(
            f"auto_config: size must be (height, width) in multiples of {unit} pixels, {MOST_SIDE} at most, "
            f"got {size!r}; round it"
        )
    return sides[0] // unit, sides[1] // unit


def _default_text_tokens(pipeline: DiffusionPipeline) -> int:
    parameter = call_parameters(pipeline).get("max_sequence_length")
    return _TEXT_TOKENS if parameter is None else int(parameter.default)


def refuse_ranks(model: object) -> None:
    """Raises ConfigError if a transformer's tokens are divided among ranks."""
    if ranks_of(model).size > 1:
        raise ConfigError(
            "auto_config: transformer must not be divided among ranks, because their times differ, got context "
            "parallelism; give every rank the same preset"
        )


def offload(pipeline: DiffusionPipeline) -> None:
    """Offloads the transformer again if the pipeline offloads whole models."""
    if offloads_whole_models(pipeline):
        pipeline.maybe_free_model_hooks()
