"""One generation of a diffusers pipeline with an empty prompt, used for warm-up."""

from __future__ import annotations

import torch

from jitaccel.errors import ConfigError

from ..foreign import Arguments, Pipeline
from .asked import call_parameters


def generate_once(pipeline: Pipeline, height: int, width: int, batch: int, call: Arguments) -> None:
    """Makes `batch` pictures or videos of one size, and discards them.

    Args:
        pipeline: A diffusers pipeline that generates from text.
        height: In pixels.
        width: In pixels.
        batch: Number of pictures or videos for the prompt.
        call: Further arguments of the call, which override these.

    Raises:
        ConfigError: If the pipeline takes no size because its input pictures determine it.
    """
    known = call_parameters(pipeline)
    if "height" not in known or "width" not in known:
        raise ConfigError(
            f"Handle.warmup: the pipeline must take height and width, got a {type(pipeline).__name__}, whose input "
            f"pictures determine the size; call it once with one of your pictures instead"
        )
    count = "num_videos_per_prompt" if "num_videos_per_prompt" in known else "num_images_per_prompt"
    settings = {"prompt": "", count: batch, "output_type": "latent", **call}
    pipeline(height=height, width=width, generator=torch.Generator("cpu").manual_seed(0), **settings)
