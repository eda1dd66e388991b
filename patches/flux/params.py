"""Translates the parameter objects of Black Forest Labs' layout into diffusers' configuration names."""

from __future__ import annotations

from typing import Any

_APPROXIMATOR = ("approximator_num_channels", "approximator_hidden_dim", "approximator_layers")
_KOHYA = ("approximator_in_dim", "approximator_hidden_size", "approximator_depth")


def config_of(params: Any, in_channels: int, out_channels: int) -> dict[str, Any]:
    """Returns the configuration from which costs are computed.

    Args:
        params: The model's parameter object.
        in_channels: Input channels of a token.
        out_channels: Output channels of a token.
    """
    config = {
        "num_attention_heads": params.num_heads,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "joint_attention_dim": params.context_in_dim,
        "guidance_embeds": getattr(params, "guidance_embed", False),
        "pooled_projection_dim": getattr(params, "vec_in_dim", None),
        "mlp_ratio": getattr(params, "mlp_ratio", None),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "timestep_guidance_channels": 256,  # used by FLUX.2; a constant in this layout
    }
    # Sizes of Chroma's modulation network, under the names of ComfyUI and of kohya's scripts
    for names in (("in_dim", "hidden_dim", "n_layers"), _KOHYA):
        if all(hasattr(params, name) for name in names):
            found = (getattr(params, name) for name in names)
            config |= dict(zip(_APPROXIMATOR, found, strict=True))
    return config
