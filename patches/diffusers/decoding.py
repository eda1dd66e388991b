"""Decodes recorded tokens into pictures for reports, with the pipeline's own autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffusers_private import execution_device
from ..layout import unpatchify


@torch.no_grad()
def decode_tokens(pipeline: Any, tokens: Tensor, grid: tuple[int, ...], patch: int) -> Tensor:
    """Returns the frames (T, H, W, 3) float32 in [0, 1], on the CPU, of the tokens of one picture or video.

    The rescaling before `vae.decode` follows from the autoencoder: a scale and shift, or statistics of each channel.

    Args:
        pipeline: The pipeline whose autoencoder decodes, with its tiling and slicing settings.
        tokens: (1, N, D); within a token, channels vary slowest, then positions in the patch.
        grid: (h, w), or (t, h, w) of a video.
        patch: Number of latents along a token's side.
    """
    vae = pipeline.vae
    tokens = tokens.to(execution_device(pipeline), torch.float32)
    if (norm := getattr(vae, "bn", None)) is not None:  # FLUX.2 normalises tokens, not latents
        scale = torch.sqrt(norm.running_var.to(tokens) + vae.config.batch_norm_eps)
        latents = _latents(tokens * scale + norm.running_mean.to(tokens), grid, patch)
    else:
        latents = _rescaled(vae, _latents(tokens, grid, patch))
    if _is_video(vae) and latents.ndim == 4:
        latents = latents.unsqueeze(2)
    further = (latents.new_zeros(1).to(vae.dtype),) if vae.config.get("timestep_conditioning") else ()
    decoded = vae.decode(latents.to(vae.dtype), *further, return_dict=False)[0]
    frames = decoded.transpose(1, 2)[0] if decoded.ndim == 5 else decoded  # (T, 3, H, W)
    return (frames.float().permute(0, 2, 3, 1) / 2.0 + 0.5).clamp(0.0, 1.0).cpu()


def _latents(tokens: Tensor, grid: tuple[int, ...], patch: int) -> Tensor:
    return unpatchify(tokens, grid, (1, patch, patch)[-len(grid) :])


def _rescaled(vae: Any, latents: Tensor) -> Tensor:
    """Returns latents (1, C, ...) rescaled for the autoencoder."""
    scaling = vae.config.get("scaling_factor") or 1.0
    mean, std = (_by_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        return latents * std / scaling + mean
    return latents / scaling + (vae.config.get("shift_factor") or 0.0)


def _by_channel(vae: Any, name: str, latents: Tensor) -> Tensor | None:
    """Returns a per-channel statistic of the autoencoder, shaped to multiply latents; None if it has none."""
    values = getattr(vae, name) if isinstance(vars(vae).get("_buffers", {}).get(name), Tensor) else vae.config.get(name)
    if values is None:
        return None
    shape = (1, -1, *(1 for _ in latents.shape[2:]))
    return torch.as_tensor(values, device=latents.device, dtype=latents.dtype).view(shape)


def _is_video(vae: Any) -> bool:
    """Returns whether an autoencoder takes (B, C, T, H, W), judged by three-dimensional kernels in its decoder."""
    return any(weight.ndim == 5 for weight in vae.decoder.parameters())
