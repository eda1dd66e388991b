"""One generation of the recorded model of the golden vectors, against the released code's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jitaccel import PRESETS
from tests.support.golden import GOLDEN, recorded_model
from tests.support.made_up import drive


@pytest.fixture(scope="module")
def golden_model() -> Any:
    return recorded_model()


@pytest.mark.parametrize("name", ["4x_384x640", "4x_512x512", "7x_384x640", "7x_512x512"])
def test_run_reproduces_the_released_trajectory(name: str, golden_model: Any) -> None:
    path = GOLDEN / f"trajectory_{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    recorded = load_file(path)
    grid = (int(metadata["height_tokens"]), int(metadata["width_tokens"]))

    def run_model(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        rows, columns = anchors[0] // grid[1], anchors[0] % grid[1]
        velocity: Tensor = golden_model(
            hidden_states=tokens,
            encoder_hidden_states=recorded["prompt_embeds"],
            pooled_projections=recorded["pooled"],
            timestep=torch.tensor([level]),
            guidance=torch.tensor([3.5]),
            txt_ids=torch.zeros(recorded["prompt_embeds"].shape[1], 3),
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=1).float(),
            return_dict=False,
        )[0]
        return velocity

    seen: list[Tensor] = []
    with torch.no_grad():
        states = drive(
            PRESETS[f"{name[:2]}-paper"],
            recorded["initial"],
            run_model,
            visit=lambda run, *_: seen.append(run.anchors[0]),
            grid=grid,
            anchors=recorded["anchors0"][None],
            noise=recorded["fresh_noise"],
        )
    ends = PRESETS[f"{name[:2]}-paper"].stage_ends(len(states))
    assert torch.equal(seen[ends[0]], recorded["anchors1"])
    assert torch.equal(seen[ends[1]], recorded["anchors2"])
    assert len(states) == len(recorded["steps"])
    for actual, released in zip(states, recorded["steps"], strict=True):
        assert float((actual[0] - released).abs().max() / released.abs().max()) < 1e-4
