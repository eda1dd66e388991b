"""Tiny random pipelines of video models, and one way to call them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.every_model import TEXT, vace_transformer, wan_transformer
from tests.support.models import noise

GRID = (3, 6, 8)
SIZE = {"num_frames": 9, "height": 96, "width": 128}
"""The size of a video whose latents are 3 frames of 12 x 16, which gives tokens of GRID."""


def unipc(**overrides: Any) -> Any:
    """Returns Wan's own scheduler."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **overrides}
    return diffusers.UniPCMultistepScheduler(**settings)


def dpm(**overrides: Any) -> Any:
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **overrides}
    return diffusers.DPMSolverMultistepScheduler(**settings)


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


SCHEDULERS = {"UniPC": unipc, "DPM-Solver++": dpm, "Euler": euler}


def wan_pipeline(scheduler: Any = None, boundary: float | None = None, **settings: Any) -> Any:
    """Returns a silent WanPipeline; with a boundary it has two transformers, like Wan 2.2."""
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=unipc() if scheduler is None else scheduler,
        transformer=wan_transformer(0),
        transformer_2=None if boundary is None else wan_transformer(1),
        boundary_ratio=boundary,
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    return vae.eval()


def text_pipeline(transformer: Any) -> Any:
    """Returns a WanPipeline with all parts, also text encoder and tokenizer, so that it can be saved and loaded."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny.pipeline().tokenizer_2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = transformer.config.text_dim
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=autoencoder(),
        scheduler=unipc(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vace_pipeline() -> Any:
    """Returns a WanVACEPipeline, which makes its own control video if none is given."""
    pipe = diffusers.WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        scheduler=unipc(),
        transformer=vace_transformer(in_channels=16, out_channels=16, vace_in_channels=96),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_pipeline(*, expand_timesteps: bool, boundary: float | None = None, **transformer: Any) -> Any:
    """Returns a WanImageToVideoPipeline with its first frame in further channels, or at timestep 0 (TI2V).

    With a `boundary` it has two transformers; `transformer` has further settings of them.
    """
    channels = {"in_channels": 16 if expand_timesteps else 36, "out_channels": 16}
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        scheduler=unipc(),
        image_processor=None,
        image_encoder=None,
        transformer=wan_transformer(**channels, **transformer),
        transformer_2=None if boundary is None else wan_transformer(1, **channels, **transformer),
        boundary_ratio=boundary,
        expand_timesteps=expand_timesteps,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image() -> Tensor:
    return noise(13, 1, 3, SIZE["height"], SIZE["width"]).clamp(-1, 1) / 2 + 0.5


def prompts(batch: int = 1) -> dict[str, Tensor]:
    return {
        "prompt_embeds": noise(11, batch, TEXT, 16),
        "negative_prompt_embeds": noise(12, batch, TEXT, 16),
    }


def generate(pipe: Any, steps: int = 5, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents (B, C, T, H, W) of one call."""
    # A single generator is not passed as a list, because some pipelines take no list.
    generators = [torch.Generator().manual_seed(seed + image) for image in range(batch)]
    settings = {
        **SIZE, **prompts(batch), "num_inference_steps": steps, "guidance_scale": 4.0,
        "generator": generators if batch > 1 else generators[0], "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    latents: Tensor = pipe(**{**settings, **call})[0]
    return latents


def first_input(pipe: Any, name: str = "hidden_states") -> Tensor:
    """Returns the transformer's input in the first step; an image-to-video pipeline gets an image."""
    seen: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs[name]), with_kwargs=True
    )
    generate(pipe, 1, **({"image": image()} if "Image" in type(pipe).__name__ else {}))
    hook.remove()
    return seen[0]


def _embedded(convolution: Any, tokens: Tensor) -> Tensor:
    return torch.nn.functional.linear(tokens, convolution.weight.flatten(1), convolution.bias)


def wan_on_tokens(
    model: Any,
    tokens: Tensor,
    at: Tensor,
    grid: tuple[int, ...],
    timestep: Tensor,
    text: Tensor,
    control: Tensor | None = None,
) -> Tensor:
    """Returns Wan's velocity (1, M, D) of some tokens (1, M, C), calling the layers directly, without hook or forward.

    `at` has their raster indices (M,); `timestep` is (1,) or (1, M); `control` (1, M, E) are tokens of VACE's control
    video.
    """
    hidden = _embedded(model.patch_embedding, tokens)
    latents = torch.empty(1, 1, grid[0], 2 * grid[1], 2 * grid[2])
    rotary = tuple(table[:, at] for table in model.rope(latents))
    per_token = timestep.ndim == 2
    time, modulation, text, _ = model.condition_embedder(
        timestep.flatten(), text, timestep_seq_len=timestep.shape[1] if per_token else None
    )
    modulation = modulation.unflatten(-1, (6, -1))
    hints = {}
    if control is not None:
        shown = _embedded(model.vace_patch_embedding, control)
        for index, block in zip(model.config.vace_layers, model.vace_blocks, strict=True):
            hints[index], shown = block(hidden, text, shown, modulation, rotary)
    for index, block in enumerate(model.blocks):
        hidden = block(hidden, text, modulation, rotary)
        if index in hints:
            hidden = hidden + hints[index]
    shift, scale = (model.scale_shift_table + time[..., None, :]).chunk(2, dim=-2)
    if per_token:
        shift, scale = shift[:, :, 0], scale[:, :, 0]
    out = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)
    # The model's output has a token's channels last; latents have them first.
    return out.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)
