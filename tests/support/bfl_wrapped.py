"""A stand-in with the signature and conventions of Black Forest Labs' `Flux`, around a diffusers model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import tiny
from tests.support.tiny import CHANNELS, WIDTH


class Flux(nn.Module):
    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        self.inner = tiny.transformer(**overrides)
        self.out_channels = CHANNELS
        self.params = SimpleNamespace(
            in_channels=self.inner.config.in_channels, vec_in_dim=WIDTH, context_in_dim=WIDTH, hidden_size=32,
            num_heads=2, depth=1, depth_single_blocks=1, guidance_embed=True,
        )  # fmt: skip

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        block_controlnet_single_hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        if img.ndim != 3 or txt.ndim != 3 or img_ids.ndim != 3:
            raise ValueError("Input img and txt tensors must have 3 dimensions.")
        rows = []
        for k in range(len(img)):
            residuals, single = block_controlnet_hidden_states, block_controlnet_single_hidden_states
            if single is not None:  # added to text and image, text first, as in kohya's scripts
                assert all(x.shape[1] == txt.shape[1] + img.shape[1] for x in single)
                single = [x.expand(len(img), -1, -1)[k : k + 1, txt.shape[1] :] for x in single]
            residuals = residuals and [x.expand(len(img), img.shape[1], -1)[k : k + 1] for x in residuals]
            (row,) = self.inner(
                hidden_states=img[k : k + 1],
                img_ids=img_ids.expand(len(img), -1, -1)[k],
                encoder_hidden_states=txt[k : k + 1],
                txt_ids=txt_ids.expand(len(img), -1, -1)[k],
                timestep=timesteps[k : k + 1],
                pooled_projections=y[k : k + 1],
                guidance=None if guidance is None else guidance[k : k + 1],
                controlnet_block_samples=residuals,
                controlnet_single_block_samples=single,
                return_dict=False,
            )
            rows.append(row)
        return torch.cat(rows)
