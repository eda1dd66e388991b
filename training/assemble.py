"""Assembles the trained parts into one diffusers pipeline, in float16, with a model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

# FLUX.1-dev's own settings.
_SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def assemble(text: Path, vae: Path, transformer: Path) -> FluxPipeline:
    """Returns the pipeline in float32, from folders: `text` has tokenizers and encoders, `transformer` is an `ema`."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER),
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=T5Tokenizer.from_pretrained(text / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(transformer),
    )
    return pipeline


def save(pipeline: FluxPipeline, out: Path) -> None:
    """Saves the weights in float16 so that `FluxPipeline.from_pretrained(out)` loads all of them in float32.

    transformers loads weights in the dtype given by a configuration, diffusers in float32. Without a change of the
    configuration, the text encoders would therefore be float16 next to a float32 transformer.
    """
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    for name in ("text_encoder", "text_encoder_2"):
        _rewrite(out / name / "config.json", lambda config: {**config, "dtype": "float32"})
    for name in ("transformer", "vae"):
        # Remove the path from which the weights were loaded.
        _rewrite(out / name / "config.json", lambda config: {k: v for k, v in config.items() if k != "_name_or_path"})


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")
