"""The example in docs/adding-a-model.md runs, and at density 1 gives the result of the unpatched toy model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel import patches
from jitaccel.patches import Patch

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.setattr(patches, "_REGISTERED", [])
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert "toy, indexed execution" in capsys.readouterr().out
    return names


def test_example_runs_and_is_the_plain_toy_at_density_one(example: dict[str, Any]) -> None:
    model, ids = example["model"], example["ids"]
    assert example["state"].isfinite().all() and "forward" not in vars(model)
    tokens, level = torch.ones(1, 256, 4), torch.tensor([0.5])
    dense = jitaccel.JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=2)
    with torch.no_grad():
        expected = model(tokens, ids, level)
        with jitaccel.apply(model, dense, noise_levels=(0.5, 0.2, 0.0)):
            assert torch.equal(model(tokens, ids, level), expected)
    counts = jitaccel.PRESETS["7x"].token_counts(256)
    assert [anchors.shape for anchors in example["handle"].stats().anchors] == [(2, count) for count in counts]


def test_entry_is_wans_under_another_name(example: dict[str, Any]) -> None:
    from jitaccel.patches.models.wan import WAN

    mine = example["MINE"]
    assert mine.adapter == dataclasses.replace(WAN.adapter, outputs=mine.adapter.outputs)
    assert mine.adapter.outputs.keys() == WAN.adapter.outputs.keys()
    given = {"hidden_states": torch.zeros(1, 4, 3, 12, 16)}
    config = {"patch_size": [1, 2, 2]}
    assert mine.grid(config, given) == WAN.grid(config, given) == (3, 6, 8)


def test_patch_of_the_same_name_is_replaced(example: dict[str, Any]) -> None:
    seen: list[str] = []

    def prepare(*_: Any) -> Any:
        seen.append("second")
        raise jitaccel.ConfigError("nothing is built here")

    patches.register(Patch(name="toy", matches=lambda _: True, prepare=prepare))
    with pytest.raises(jitaccel.ConfigError, match="nothing is built"):
        jitaccel.apply(example["model"])
    assert seen == ["second"] and len(patches._REGISTERED) == 1
    patches._REGISTERED.clear()
    with pytest.raises(jitaccel.UnsupportedModelError, match=r"one of: .*black-forest-labs Flux"):
        jitaccel.apply(example["model"])
