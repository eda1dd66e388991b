"""Tiny random pipelines of Qwen-Image, one way to call them, and its transformer's layers called directly."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.every_model import TEXT, qwen_transformer
from tests.support.models import noise

GRID = (10, 14)
PIXELS = 8  # along a token's side
REFERENCE = (64, 48)
"""Height and width to which the tests resize reference pictures; the pipelines would use a million pixels."""
LAYERED, LAYERS = "QwenImageLayeredPipeline", 2
"""Number of layers it makes, after a picture of all layers together, from a reference of the same size."""


@functools.cache
def _autoencoder() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=6,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    return vae.eval()


def qwen_pipeline(name: str = "QwenImagePipeline") -> Any:
    """Returns a silent pipeline of this class."""
    kind = getattr(diffusers, name)
    parts = {
        "scheduler": tiny.scheduler(), "vae": _autoencoder(), "text_encoder": None, "tokenizer": None,
        "processor": None, "transformer": qwen_transformer(),
    }  # fmt: skip
    if name == LAYERED:
        parts["transformer"] = qwen_transformer(use_layer3d_rope=True, use_additional_t_cond=True)
        parts["text_encoder"] = tiny.pipeline().text_encoder_2  # the pipeline reads its dtype
    pipe = kind(**{part: parts[part] for part in inspect.signature(kind).parameters})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_references(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes an Edit pipeline resize reference pictures to REFERENCE, and Layered to the size of GRID."""
    module = sys.modules[getattr(diffusers, name).__module__]
    size = (PIXELS * GRID[1], PIXELS * GRID[0]) if name == LAYERED else (REFERENCE[1], REFERENCE[0])
    answer = (*size, None) if name == "QwenImageEditPipeline" else size
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: answer)


def prompts(batch: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the embeddings of prompts and negative prompts."""
    return noise(1, batch, TEXT, 16), noise(2, batch, TEXT, 16)


def picture(name: str, batch: int = 1) -> Any:
    values = noise(3, 1, 3, PIXELS * GRID[0], PIXELS * GRID[1]).clamp(-1, 1) / 2 + 0.5
    if "Edit" not in name and name != LAYERED:
        return values.expand(batch, -1, -1, -1)
    return PIL.Image.fromarray((values[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def generate(pipe: Any, steps: int = 5, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents (B, N, D) of one call."""
    name = type(pipe).__name__
    positive, negative = prompts(batch)
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    settings: dict[str, Any] = {
        "prompt_embeds": positive, "prompt_embeds_mask": mask, "negative_prompt_embeds": negative,
        "negative_prompt_embeds_mask": mask, "true_cfg_scale": 3.0, "height": PIXELS * GRID[0],
        "width": PIXELS * GRID[1], "num_inference_steps": steps, "output_type": "latent", "return_dict": False,
        "image": picture(name, batch), "strength": 0.8, "layers": LAYERS,
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(batch)],
    }  # fmt: skip
    seen: list[Tensor] = []
    if name == LAYERED:
        # Without a prompt it would write one itself, and diffusers 0.42 cannot return its latents.
        settings |= {"prompt": ["any"] * batch, "output_type": "pt"}

        def see(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen[:] = [tensors["latents"]]
            return tensors

        settings["callback_on_step_end"] = see
    known = inspect.signature(type(pipe).__call__).parameters
    latents: Tensor = pipe(**{key: value for key, value in {**settings, **call}.items() if key in known})[0]
    return seen[0] if seen else latents


def qwen_on_tokens(
    model: Any, tokens: Tensor, at: Tensor, level: float, text: Tensor, references: Tensor | None = None
) -> Tensor:
    """Returns the velocity (1, M, D) of some tokens (1, M, D), by calling the layers directly, without hook or forward.

    `at` has their raster indices (M,). `references` (1, R, D) belong to a whole picture of size REFERENCE, or GRID with
    layers.
    """
    is_layered = model.config.use_layer3d_rope
    shapes, shown = [(1, *GRID)] * (LAYERS + 1 if is_layered else 1), tokens
    num_tokens = len(shapes) * GRID[0] * GRID[1]
    if references is not None:
        shapes.append((1, *GRID) if is_layered else (1, REFERENCE[0] // PIXELS, REFERENCE[1] // PIXELS))
        shown = torch.cat([tokens, references], dim=1)
    hidden, text = model.img_in(shown), model.txt_in(model.txt_norm(text))
    further = (torch.tensor([0]),) if is_layered else ()
    time = model.time_text_embed(torch.tensor([level]), hidden, *further)
    image_table, text_table = model.pos_embed([shapes], max_txt_seq_len=TEXT, device=tokens.device)
    rotary = (torch.cat([image_table[:num_tokens][at], image_table[num_tokens:]]), text_table)
    for block in model.transformer_blocks:
        text, hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None,
            temb=time,
            image_rotary_emb=rotary,
        )
    out: Tensor = model.proj_out(model.norm_out(hidden, time))
    return out[:, : len(at)]


def first_input(pipe: Any, **call: Any) -> Tensor:
    """Returns the transformer's input in the first step."""
    seen: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    generate(pipe, **{"steps": 1, "strength": 1.0, **call})
    hook.remove()
    return seen[0]
