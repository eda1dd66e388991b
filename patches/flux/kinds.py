"""The FLUX transformers of diffusers, with their differences described as data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.private import uncompiled
from jitaccel.generation.stats import Cost
from jitaccel.patches.flux.flops import chroma_flops, flux2_flops, flux_flops
from jitaccel.patches.foreign import Pipeline, settings_of
from jitaccel.patches.ranks import ranks_multiple


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One transformer class.

    Attributes:
        model: Name of the class.
        cost: Maps (configuration, image tokens, text tokens) to operations.
        per_image: Arguments with one row for each image, or a single row for all.
        masks: Arguments over text and image tokens, (B, T + S).
        tokens: Further arguments with one row for each image token, (B, S, C).
        residuals: Arguments that are lists of residuals added to image tokens, (B, S, width).
        refused: Arguments that cannot be accelerated, with a description for messages.
        attention_arguments: Entries of joint_attention_kwargs that do not depend on which tokens enter.
        packs: Whether packed execution supports it.
        divides: Whether it was tested with tokens divided among ranks.
        ids_ndim: Number of axes that the position ids must have if ranks divide them.
        patch: Number of latents along a token's side.
    """

    model: str
    cost: Callable[[Mapping[str, Any], int, int], int]
    per_image: tuple[str, ...]
    masks: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ("controlnet_block_samples", "controlnet_single_block_samples")
    refused: Mapping[str, str] = field(default_factory=dict)
    attention_arguments: tuple[str, ...] = ("scale", "ip_adapter_image_embeds")
    packs: bool = False
    divides: bool = False
    ids_ndim: int = 2
    patch: int = 2


FLUX = Kind(
    model="FluxTransformer2DModel",
    cost=flux_flops,
    per_image=("encoder_hidden_states", "pooled_projections", "timestep", "guidance"),
    packs=True,
    divides=True,
)
KINDS = (
    FLUX,
    Kind(
        model="Flux2Transformer2DModel",
        cost=flux2_flops,
        per_image=("encoder_hidden_states", "timestep", "guidance"),
        residuals=(),
        refused={"kv_cache": "a cache of keys and values", "kv_cache_mode": "a cache of keys and values"},
        attention_arguments=("scale",),
        divides=True,
        ids_ndim=3,
    ),
    Kind(
        model="ChromaTransformer2DModel",
        cost=chroma_flops,
        per_image=("encoder_hidden_states", "timestep", "attention_mask"),
        masks=("attention_mask",),
    ),
)
CONTROLNET = Kind(
    model="FluxControlNetModel",
    cost=flux_flops,
    per_image=(
        "controlnet_cond",
        "controlnet_mode",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
    ),
    tokens=("controlnet_cond",),
    residuals=(),
)
MODELS = tuple(kind.model for kind in KINDS)

# Pipelines by the transformer they run. With a mask, the repainted tokens are anchors from the start.
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
    ),
    "Flux2Transformer2DModel": ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    "ChromaTransformer2DModel": ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
}


_NUNCHAKU_TOKENS = 256  # its kernels pad a sequence to a multiple of this


def channels_of(model: nn.Module) -> int:
    """Returns the number of channels per token in a model's output.

    If `config.out_channels` is null, `config.in_channels` cannot be used instead, because loading a Control LoRA
    doubles it.
    """
    channels: Any = model.out_channels
    return int(channels)


def token_multiple(model: nn.Module) -> int:
    """Returns the multiple to which the number of anchors is rounded up: for ranks, and for nunchaku's padding."""
    is_nunchaku = any(kind.__name__.startswith("Nunchaku") for kind in type(model).__mro__)
    return math.lcm(_NUNCHAKU_TOKENS if is_nunchaku else 1, ranks_multiple(model))


def cost_of(model: nn.Module) -> Cost:
    """Returns a function from numbers of image and text tokens to the operations of one forward of a transformer.

    Raises:
        UnsupportedModelError: If the transformer is not one of the FLUX classes.
    """
    kind = kind_of(model)
    if kind is None:
        raise UnsupportedModelError(
            f"jitaccel: the transformer must be one of {', '.join(MODELS)}, got {type(model).__name__}; "
            f"read its operations from handle.stats()"
        )
    return functools.partial(kind.cost, settings_of(uncompiled(model)))


def cost_of_pipeline(pipeline: Pipeline) -> Cost:
    """Returns the same function as `cost_of`, for a pipeline's transformer."""
    return cost_of(pipeline.transformer)


def kind_of(model: nn.Module) -> Kind | None:
    """Returns the kind of a transformer, looking inside `torch.compile`'s wrapper and at base classes; else None."""
    names = [kind.__name__ for kind in type(uncompiled(model)).__mro__]
    return next((kind for kind in KINDS if kind.model in names), None)
