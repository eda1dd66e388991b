"""One packed forward of a tiny FLUX.1, and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jitaccel.execution.attention.choice import choose_backend, varlen_attention
from jitaccel.patches.flux.packed import Conditions, make_pack, packed_forward
from tests.support.tiny import WIDTH

GUIDED: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 3.0}
CPU = torch.device("cpu")


# One forward


def conditions(lengths: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> list[dict[str, Tensor]]:
    """Returns the arguments of one image for each text length; levels differ too."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "encoder_hidden_states": torch.randn(1, length, WIDTH, generator=g).to(dtype),
            "pooled_projections": torch.randn(1, WIDTH, generator=g).to(dtype),
            "timestep": torch.tensor([0.9 - 0.2 * k], dtype=dtype),
            "guidance": torch.tensor([3.0 + k]),
            "txt_ids": torch.zeros(length, 3),
        }
        for k, length in enumerate(lengths)
    ]


def packed(model: Any, states: list[Tensor], image_ids: list[Tensor], each: list[dict[str, Tensor]]) -> list[Tensor]:
    backend = choose_backend("sdpa", CPU, states[0].dtype, 16)
    tokens = torch.cat([state[0] for state in states])
    given = Conditions(
        text=torch.cat([c["encoder_hidden_states"][0] for c in each]),
        pooled=torch.cat([c["pooled_projections"] for c in each]),
        level=torch.cat([c["timestep"] for c in each]),
        guidance=torch.cat([c["guidance"] for c in each]),
    )
    pack = make_pack(model, [c["txt_ids"] for c in each], image_ids)
    out = packed_forward(model, pack, tokens, given, lambda q, k, v, layout: varlen_attention(q, k, v, layout, backend))
    return [*out.split([state.shape[1] for state in states])]
