"""The finished picture in a report equals the picture decoded by each family's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import jitaccel
from jitaccel import JiTConfig
from tests.support import hunyuan, ltx, qwen, sd3, tiny, video
from tests.support.every_model import wan_transformer
from tests.support.models import flux2_transformer, noise

CONFIG = JiTConfig(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=4, schedule="native")


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def _wan() -> tuple[Any, Any]:
    pipe = video.wan_pipeline(video.euler())
    pipe.register_modules(vae=video.autoencoder(), transformer=wan_transformer(in_channels=16, out_channels=16))
    return pipe, video.generate


def _ltx() -> tuple[Any, Any]:
    pipe = ltx.pipeline()
    vae = _seeded(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=pipe.transformer.config.in_channels,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
    )
    vae.latents_mean.copy_(noise(1, len(vae.latents_mean)))
    vae.latents_std.copy_(1.0 + noise(2, len(vae.latents_std)).abs())
    pipe.register_modules(vae=vae)
    return pipe, ltx.generate


def _flux2() -> tuple[Any, Any]:
    vae = _seeded(
        lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=tiny.CHANNELS // 4,
        )
    )
    vae.bn.running_mean.copy_(noise(1, tiny.CHANNELS))
    vae.bn.running_var.copy_(1.0 + noise(2, tiny.CHANNELS).abs())
    pipe = diffusers.Flux2Pipeline(
        scheduler=tiny.scheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=flux2_transformer()
    )
    pipe.set_progress_bar_config(disable=True)
    height, width = (tiny.PIXELS_PER_TOKEN * side for side in tiny.GRID)

    def generate(pipe: Any, **call: Any) -> Any:
        embeds = noise(11, 1, tiny.TEXT_TOKENS, tiny.WIDTH)
        settings = {"prompt_embeds": embeds, "height": height, "width": width, "return_dict": False}
        generator = torch.Generator().manual_seed(0)
        return pipe(**settings, num_inference_steps=4, generator=generator, **call)[0]

    return pipe, generate


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "FLUX.1": lambda: (tiny.pipeline(), tiny.generate),
    "FLUX.2": _flux2,
    "Stable Diffusion 3": lambda: (sd3.pipeline(), sd3.generate),
    "Qwen-Image": lambda: (qwen.qwen_pipeline(), qwen.generate),
    "Wan": _wan,
    "HunyuanVideo-1.5": lambda: (hunyuan.pipeline("HunyuanVideo15Pipeline"), hunyuan.generate),
    "LTX-Video": _ltx,
}


@pytest.mark.parametrize("name", CASES)
def test_finished_picture_is_the_pipelines_own(name: str) -> None:
    pipe, generate = CASES[name]()
    with jitaccel.apply(pipe, CONFIG) as handle, torch.no_grad():
        handle.record()
        own = np.asarray(generate(pipe, output_type="np"))
        found = handle.playback(frames=100, progress=False)
    assert found.has_true_colours
    own = own.reshape(-1, *own.shape[-3:])
    assert found.final.shape == own.shape
    assert own.std() > 0.003
    assert np.abs(found.final.astype(int) - np.round(255.0 * own)).max() <= 3
