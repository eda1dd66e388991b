"""A Control LoRA (Depth, Canny) doubles `in_channels` on loading, on a model whose `config.out_channels` is null."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import noise_levels
from tests.support import tiny
from tests.support.tiny import CHANNELS, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH


def controlled(out_channels: int | None) -> Any:
    """Returns a transformer with a wider first layer, as loading the LoRA leaves it."""
    model = tiny.transformer(out_channels=out_channels)
    narrow = model.x_embedder
    model.x_embedder = torch.nn.Linear(2 * CHANNELS, narrow.out_features)
    weight = torch.randn(model.x_embedder.weight.shape, generator=torch.Generator().manual_seed(4))
    model.x_embedder.weight.data.copy_(0.15 * weight)
    model.x_embedder.bias.data.copy_(narrow.bias.data)
    model.register_to_config(in_channels=2 * CHANNELS)
    return model


def picture(model: Any, execution: Any) -> tuple[Tensor, int]:
    """Returns the picture of a custom loop, and its operations."""
    generator = torch.Generator().manual_seed(1)
    state, control = tiny.start(), torch.randn(1, NUM_TOKENS, CHANNELS, generator=generator)
    text, pooled = torch.randn(1, TEXT_TOKENS, WIDTH, generator=generator), torch.zeros(1, WIDTH)
    with torch.no_grad(), jitaccel.apply(model, SHORT, execution=execution) as handle:
        for level, after in pairwise(noise_levels(SHORT)):
            velocity = model(
                hidden_states=torch.cat([state, control], dim=2),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=torch.tensor([level]),
                img_ids=tiny.ids(),
                txt_ids=torch.zeros(TEXT_TOKENS, 3),
                guidance=torch.tensor([3.5]),
            ).sample
            state = state + (after - level) * velocity
        return state, handle.stats().flops


@pytest.mark.parametrize("execution", ["packed", "indexed"])
def test_picture_is_that_of_a_model_that_names_its_channels(execution: Any) -> None:
    model = controlled(None)
    assert model.config.out_channels is None and model.config.in_channels == 2 * CHANNELS
    found, flops = picture(model, execution)
    expected, expected_flops = picture(controlled(CHANNELS), execution)
    assert found.shape == (1, NUM_TOKENS, CHANNELS)
    assert torch.equal(found, expected) and flops == expected_flops
