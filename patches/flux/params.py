"""What the parameter objects of Black Forest Labs' layout say, in diffusers' words."""

from __future__ import annotations

from typing import Any

_APPROXIMATOR = ("approximator_num_channels", "approximator_hidden_dim", "approximator_layers")
_KOHYA = ("approximator_in_dim", "approximator_hidden_size", "approximator_depth")


def config_of(params: Any, in_channels: int, out_channels: int) -> dict[str, Any]:
    """Returns the configuration from which costs follow. in_channels, out_channels: of a token."""
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
        "timestep_guidance_channels": 256,  # of FLUX.2, a constant in this layout
    }
    # Chroma's network of modulations, as ComfyUI and kohya's scripts name its sizes
    for names in (("in_dim", "hidden_dim", "n_layers"), _KOHYA):
        if all(hasattr(params, name) for name in names):
            found = (getattr(params, name) for name in names)
            config |= dict(zip(_APPROXIMATOR, found, strict=True))
    return config
