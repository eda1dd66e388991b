"""One generation of a pipeline of diffusers, of an empty prompt: what a warm-up makes."""

from __future__ import annotations

import torch

from jitaccel.errors import ConfigError

from ..foreign import Arguments, Pipeline
from .asked import call_parameters


def generate_once(pipeline: Pipeline, height: int, width: int, batch: int, call: Arguments) -> None:
    """Makes `batch` pictures or videos of one size in pixels, and drops them.

    Args:
        pipeline: A pipeline of diffusers from text.
        height: In pixels.
        width: In pixels.
        batch: How many of one prompt.
        call: Further arguments, which take the place of these.

    Raises:
        ConfigError: For a pipeline whose pictures are as large as those it is given.
    """
    known = call_parameters(pipeline)
    if "height" not in known or "width" not in known:
        raise ConfigError(
            f"Handle.warmup: the pipeline must take height and width, got a {type(pipeline).__name__}, which makes "
            f"pictures as large as those it is given; call it once with one of yours instead"
        )
    count = "num_videos_per_prompt" if "num_videos_per_prompt" in known else "num_images_per_prompt"
    settings = {"prompt": "", count: batch, "output_type": "latent", **call}
    pipeline(height=height, width=width, generator=torch.Generator("cpu").manual_seed(0), **settings)
