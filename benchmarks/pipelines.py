"""The pipelines to measure: the embedded one, and FLUX pipelines with random weights at any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jitaccel.patches.flux.flops import FLUX_DEV

# FLUX.1-dev's heads, a quarter of its width and three of its blocks. A dense step takes seconds on two cores, nearly
# all of it in matrix products, as in the large model.
FLUX_QUARTER: Mapping[str, Any] = {
    **FLUX_DEV,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 6,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 256,
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pipeline and one call of it. `has_quality` says whether its pictures are meaningful."""

    pipe: Any
    call: Mapping[str, Any]
    grid: tuple[int, int]
    text_tokens: int
    has_quality: bool


def embedded_subject(device: torch.device, grid: tuple[int, int], seed: int, text_tokens: int = 48) -> Subject:
    """Returns the embedded pipeline with a held-out prompt, for any grid."""
    from jitaccel.evaluation.scenes.prompts import held_out
    from jitaccel.loading import load_pipeline

    pipe = load_pipeline(None, device=str(device))
    cell = 2 * pipe.vae_scale_factor
    call = {
        "prompt": held_out(1, seed)[0][0],
        "max_sequence_length": text_tokens,
        "output_type": "np",
        "height": grid[0] * cell,
        "width": grid[1] * cell,
    }
    return Subject(pipe=_quiet(pipe), call=call, grid=grid, text_tokens=text_tokens, has_quality=True)


def random_subject(
    model: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    grid: tuple[int, int],
    seed: int,
    text_tokens: int,
) -> Subject:
    """Returns a FLUX pipeline with random weights, made on the device, without text encoders and autoencoder."""
    pipe = random_pipeline(model, device, dtype, seed)
    call = random_call(pipe, grid, seed, text_tokens)
    return Subject(pipe=pipe, call=call, grid=grid, text_tokens=text_tokens, has_quality=False)


def random_pipeline(model: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Returns a pipeline with only a scheduler and a transformer with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=random_transformer(model, device, dtype, seed),
    )
    return _quiet(pipe)


def random_call(pipe: Any, grid: tuple[int, int], seed: int, text_tokens: int) -> dict[str, Any]:
    """Returns the arguments of a call for latents of a grid, with random prompt embeddings."""
    settings, dtype = pipe.transformer.config, pipe.transformer.dtype
    generator = torch.Generator(pipe.transformer.device).manual_seed(seed)
    cell = 2 * pipe.vae_scale_factor
    return {
        "prompt_embeds": _normal(generator, dtype, 1, text_tokens, settings.joint_attention_dim),
        "pooled_prompt_embeds": _normal(generator, dtype, 1, settings.pooled_projection_dim),
        "output_type": "latent",
        "height": grid[0] * cell,
        "width": grid[1] * cell,
    }


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def random_transformer(model: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """Returns a FLUX transformer with weights drawn on the device, so that 12 billion need no memory elsewhere."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**model)
    transformer = transformer.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # norms and biases
    return transformer.eval()
