"""Floating-point operations of FLUX transformers, attention and text included; a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MLP_RATIO = 4
_TIME_CHANNELS = 256
FLUX_DEV: Mapping[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""The configuration of FLUX.1-dev's transformer."""
FLUX_DEV_TEXT_TOKENS = 512  # FluxPipeline pads prompts to this length


def flux_dev_flops(image_tokens: int) -> int:
    """Returns the operations of one forward of FLUX.1-dev with `image_tokens` image tokens."""
    return flux_flops(FLUX_DEV, image_tokens, FLUX_DEV_TEXT_TOKENS)


def flux_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int, batch: int = 1) -> int:
    """Returns the operations of one forward of diffusers' `FluxTransformer2DModel`.

    Counts matrix products only; norms, activations and softmax are left out (under 1 % for FLUX.1-dev).

    Args:
        config: The model's configuration.
        image_tokens: M, the image tokens that enter the network.
        text_tokens: T5 tokens, padding included.
        batch: Number of images.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = image_tokens + text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    projections = blocks * tokens * (4 + 2 * _MLP_RATIO) * width**2
    attention = blocks * 2 * tokens**2 * width
    modulation = (12 * config["num_layers"] + 3 * config["num_single_layers"] + 2) * width**2
    conditions = 2 if config["guidance_embeds"] else 1
    embedding = conditions * (_TIME_CHANNELS * width + width**2)
    embedding += config["pooled_projection_dim"] * width + width**2
    return 2 * batch * (projections + attention + modulation + embedding + _ends(config, image_tokens, text_tokens))


def flux2_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int, batch: int = 1) -> int:
    """Returns the operations of one forward of diffusers' `Flux2Transformer2DModel`, as `flux_flops` counts them."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = image_tokens + text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    hidden = int(width * config["mlp_ratio"])
    projections = blocks * tokens * (4 * width**2 + 3 * hidden * width)  # gated: two projections in, one out
    attention = blocks * 2 * tokens**2 * width
    modulation = (6 + 6 + 3 + 2) * width**2  # shared by the blocks
    conditions = 2 if config.get("guidance_embeds", True) else 1  # diffusers 0.36 only has models with guidance
    embedding = conditions * (config["timestep_guidance_channels"] * width + width**2)
    return 2 * batch * (projections + attention + modulation + embedding + _ends(config, image_tokens, text_tokens))


def chroma_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int, batch: int = 1) -> int:
    """Returns the operations of one forward of diffusers' `ChromaTransformer2DModel`, as `flux_flops` counts them."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = image_tokens + text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    projections = blocks * tokens * (4 + 2 * _MLP_RATIO) * width**2
    attention = blocks * 2 * tokens**2 * width
    hidden = config["approximator_hidden_dim"]
    rows = 12 * config["num_layers"] + 3 * config["num_single_layers"] + 2  # modulation rows, made by one network
    approximator = config["approximator_num_channels"] * hidden
    approximator += config["approximator_layers"] * 2 * hidden**2 + hidden * width
    ends = _ends(config, image_tokens, text_tokens)
    return 2 * batch * (projections + attention + rows * approximator + ends)


def _ends(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> int:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    out_channels = config.get("out_channels") or config["in_channels"]
    per_image_token = (config["in_channels"] + out_channels) * width
    return image_tokens * per_image_token + text_tokens * config["joint_attention_dim"] * width
