"""Tiny random FLUX pipelines, made in milliseconds, and one way to call them.

A picture of 4 h x 4 w pixels is a grid of h x w tokens. The autoencoder halves two times fewer than FLUX.1's, so that
small pictures have enough tokens to be sparse.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from jitaccel import JiTConfig

GRID = (12, 12)
NUM_TOKENS = GRID[0] * GRID[1]
TEXT_TOKENS = 8
WIDTH = 32
CHANNELS = 16
PIXELS_PER_TOKEN = 4
WORDS = ("a", "red", "blue", "green", "circle", "square", "on", "left", "of", "striped")

DENSE = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps="caller", schedule="native")
SHORT = JiTConfig(densities=(0.35, 0.65, 1.0), boundaries=(0.4, 0.7, 1.0), steps=5, micro_flow="exact")
"""Stages of two, one and two steps, the cheapest run in which all stages can be distinguished."""


def transformer(seed: int = 0, **overrides: Any) -> FluxTransformer2DModel:
    """Returns a random FLUX of one double and one single block, with weights large enough that every input matters."""
    settings: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    model = FluxTransformer2DModel(**{**settings, **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def scheduler(**overrides: Any) -> FlowMatchEulerDiscreteScheduler:
    """Returns FLUX.1-dev's scheduler."""
    return FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, "shift": 3.0, **overrides})


def pipeline(seed: int = 0, **components: Any) -> FluxPipeline:
    """Returns a silent FluxPipeline; the same seed gives the same weights."""
    parts = {**_shared_parts(), "scheduler": scheduler(), **components}
    if "transformer" not in parts:
        parts["transformer"] = transformer(seed)
    pipe = FluxPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def beside(pipe: FluxPipeline) -> FluxPipeline:
    """Returns a silent pipeline on the same weights that may run in another thread, as docs/reliability.md shows."""
    own = {
        "scheduler": pipe.scheduler.from_config(pipe.scheduler.config),
        "tokenizer": copy.deepcopy(pipe.tokenizer),
        "tokenizer_2": copy.deepcopy(pipe.tokenizer_2),
    }
    other = type(pipe)(**{**pipe.components, **own})
    other.set_progress_bar_config(disable=True)
    return other


@functools.cache
def _shared_parts() -> dict[str, Any]:
    """Returns autoencoder, text encoders and tokenizers, which no test changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=CHANNELS // 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
            scaling_factor=1.0,
        )
        clip_tokens, t5_tokens = _tokenizers()
        clip = CLIPTextConfig(
            vocab_size=len(clip_tokens),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=clip_tokens.bos_token_id,
            eos_token_id=clip_tokens.eos_token_id,
            pad_token_id=clip_tokens.pad_token_id,
        )
        t5 = T5Config(vocab_size=len(t5_tokens), d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
        return {
            "vae": vae.eval(),
            "text_encoder": CLIPTextModel(clip).eval(),
            "text_encoder_2": T5EncoderModel(t5).eval(),
            "tokenizer": clip_tokens,
            "tokenizer_2": t5_tokens,
        }


def _tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Returns tokenizers of WORDS: CLIP's by letters, T5's by words. Training would number tokens anew each time."""
    letters = sorted({*"".join(WORDS)})
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[list[str]] = []
    numbers = {token: number for number, token in enumerate(vocabulary)}
    clip = CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=77)
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -9.0)]
    return clip, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def generate(
    pipe: Any,
    seed: int | Sequence[int] = 0,
    grid: tuple[int, int] = GRID,
    **call: Any,
) -> Tensor:
    """Returns the final latents (B, N, D) of one call; `seed` is that of one generator, or of one for each image."""
    generator: Any = torch.Generator().manual_seed(seed) if isinstance(seed, int) else None
    if not isinstance(seed, int):
        generator = [torch.Generator().manual_seed(each) for each in seed]
    settings: dict[str, Any] = {
        "prompt": "a red circle",
        "height": grid[0] * PIXELS_PER_TOKEN,
        "width": grid[1] * PIXELS_PER_TOKEN,
        "max_sequence_length": TEXT_TOKENS,
        "output_type": "latent",
        "generator": generator,
    }
    images: Tensor = pipe(**{**settings, **call}, return_dict=False)[0]
    return images


def start(seed: int = 0, grid: tuple[int, int] = GRID, batch: int = 1) -> Tensor:
    """Returns noise (B, N, D), for `latents=` of a pipeline or for a custom loop."""
    return torch.randn(batch, grid[0] * grid[1], CHANNELS, generator=torch.Generator().manual_seed(seed))


def ids(grid: tuple[int, int] = GRID) -> Tensor:
    """Returns position ids (N, 3) as FluxPipeline makes them."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def offload_groups(model: Any, kind: str) -> None:
    """Enables group offloading of blocks or leaves, from the CPU to the CPU."""
    cpu = torch.device("cpu")
    options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    with pytest.MonkeyPatch.context() as patch:
        if torch.accelerator.current_accelerator() is None:  # diffusers before 0.41 assumes that there is one
            patch.setattr(torch.accelerator, "current_accelerator", lambda *_: cpu)
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)


@contextmanager
def forwards(model: Any, grid: tuple[int, int] = GRID) -> Iterator[list[list[int]]]:
    """Collects the tokens of each forward that really runs, as raster indices from its position ids."""
    seen: list[list[int]] = []

    def note(_: Any, args: tuple[Tensor, ...]) -> None:
        image_ids = args[0][TEXT_TOKENS:].long()
        seen.append((image_ids[:, 1] * grid[1] + image_ids[:, 2]).tolist())

    hook = model.pos_embed.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Collects the image tokens of each forward that really runs, packed or not."""
    seen: list[int] = []
    hook = model.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).shape[0]))
    try:
        yield seen
    finally:
        hook.remove()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference divided by the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())
