"""Tiny random pipelines of LTX-2, one way to call them, and its transformer on some tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.support import tiny
from tests.support.ltx_models import ltx2_transformer
from tests.support.models import TEXT, noise
from tests.support.video import GRID

AUDIO = 18
"""Number of audio tokens for the frames of GRID, at 24 frames per second."""
UNGUIDED = {
    "guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0,
    "modality_scale": 1.0, "audio_modality_scale": 1.0,
}  # fmt: skip
EVERY_GUIDANCE = {
    "guidance_scale": 3.0, "audio_guidance_scale": 4.0, "stg_scale": 0.5, "audio_stg_scale": 0.75,
    "modality_scale": 2.0, "audio_modality_scale": 1.5,
}  # fmt: skip


class _Module(nn.Module):
    device, dtype = torch.device("cpu"), torch.float32


class _Part(_Module):
    """The attributes that the pipeline reads from an autoencoder without calling it."""

    def __init__(self, channels: int, config: dict[str, Any], **attributes: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        for name, value in attributes.items():
            setattr(self, name, value)


class _Connectors(_Module):
    def forward(self, embeds: Tensor, mask: Tensor, padding_side: str) -> tuple[Tensor, Tensor, Tensor]:
        return embeds, embeds.flip(1), mask


def pipeline(**transformer: Any) -> Any:
    """Returns a silent LTX2Pipeline; `transformer` has further settings of the transformer."""
    audio = {"sample_rate": 16000, "mel_hop_length": 160, "mel_bins": 12, "latent_channels": 2}
    pipe = diffusers.LTX2Pipeline(
        scheduler=tiny.scheduler(),
        vae=_Part(4, {"scaling_factor": 1.0}, spatial_compression_ratio=32, temporal_compression_ratio=8),
        audio_vae=_Part(6, audio, mel_compression_ratio=4, temporal_compression_ratio=4),
        text_encoder=None,
        tokenizer=None,
        connectors=_Connectors(),
        transformer=ltx2_transformer(perturbed_attn=True, **transformer),
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Encoded(diffusers.LTX2Pipeline):  # type: ignore[misc]
    """Knows one prompt."""

    def encode_prompt(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (positive, negative), mask = prompts(), torch.ones(1, TEXT)
        return positive, mask, negative, mask


RATE = 8000
"""Of the sound of `sounding_pipeline`, in hertz."""


def sounding_pipeline() -> Any:
    """Returns an LTX2Pipeline that decodes frames and sound; whatever the prompt, it is the same."""
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    silent = pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frames = diffusers.AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )  # fmt: skip
        mel = diffusers.AutoencoderKLLTX2Audio(base_channels=6, num_res_blocks=1, latent_channels=2, mel_bins=12)
        vocoder = LTX2Vocoder(
            in_channels=24, hidden_channels=8, upsample_kernel_sizes=[16, 20], upsample_factors=[8, 10],
            output_sampling_rate=RATE,
        )  # fmt: skip
    decoders = {"vae": frames.eval(), "audio_vae": mel.eval(), "vocoder": vocoder.eval()}
    parts = {name: getattr(silent, name) for name in ("scheduler", "text_encoder", "tokenizer", "connectors")}
    pipe = _Encoded(transformer=silent.transformer, **parts, **decoders)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch: int = 1) -> list[Tensor]:
    """Returns the embeddings of prompts and of negative prompts."""
    return [noise(seed, batch, TEXT, 16) for seed in (80, 90)]


def generate(pipe: Any, steps: int = 5, seed: int = 0, batch: int = 1, **call: Any) -> Tensor:
    """Returns the final latents of video and audio of one call, flattened and joined for each item of the batch."""
    positive, negative = prompts(batch)
    settings: dict[str, Any] = {
        **UNGUIDED, "guidance_scale": 3.0, "audio_guidance_scale": 4.0, "spatio_temporal_guidance_blocks": [1],
        "prompt_embeds": positive, "prompt_attention_mask": torch.ones(batch, TEXT),
        "negative_prompt_embeds": negative, "negative_prompt_attention_mask": torch.ones(batch, TEXT),
        "num_frames": 8 * (GRID[0] - 1) + 1, "height": 32 * GRID[1], "width": 32 * GRID[2],
        "num_inference_steps": steps, "output_type": "latent", "return_dict": False,
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(batch)],
    }  # fmt: skip
    return torch.cat([each.flatten(1) for each in pipe(**{**settings, **call})], dim=1)


def start(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the packed noise that the pipeline draws for the video (1, N, D) and the audio (1, AUDIO, 6)."""
    generator = torch.Generator().manual_seed(seed)
    video, audio = torch.randn(1, 4, *GRID, generator=generator), torch.randn(1, 2, AUDIO, 3, generator=generator)
    return video.flatten(2).transpose(1, 2).contiguous(), audio.transpose(1, 2).flatten(2)


def end(video: Tensor, audio: Tensor) -> Tensor:
    """Returns packed latents of video and audio in the form of `generate`."""
    return torch.cat([video.transpose(1, 2).flatten(1), audio.unflatten(2, (2, 3)).transpose(1, 2).flatten(1)], dim=1)


def on_tokens(
    model: Any,
    tokens: Tensor,
    audio: Tensor,
    at: Tensor,
    level: float,
    text: Tensor,
    grid: tuple[int, ...] = GRID,
    shown_level: float | None = None,
    **further: Any,
) -> tuple[Tensor, Tensor]:
    """Returns the model's velocities of some video tokens (1, M, D), without the other video tokens, and of the audio.

    `at` has their raster indices (M,) in `grid`; `shown_level` is the video's level if it differs from the audio's.
    """
    coordinates = model.rope.prepare_video_coords(1, *grid, tokens.device, fps=24.0)
    timestep = torch.tensor([1000.0 * (level if shown_level is None else shown_level)])
    out: tuple[Tensor, Tensor] = model(
        hidden_states=tokens,
        audio_hidden_states=audio,
        encoder_hidden_states=text,
        audio_encoder_hidden_states=text.flip(1),
        timestep=timestep,
        audio_timestep=torch.tensor([1000.0 * level]),
        sigma=timestep,
        audio_sigma=torch.tensor([1000.0 * level]),
        encoder_attention_mask=torch.ones(1, TEXT),
        audio_encoder_attention_mask=torch.ones(1, TEXT),
        video_coords=coordinates[:, :, at],
        audio_num_frames=AUDIO,
        use_cross_timestep=True,
        return_dict=False,
        **further,
    )
    return out
