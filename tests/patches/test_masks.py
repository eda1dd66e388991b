"""Masks that differ between images of a batch: each image equals the one made alone, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig, UnsupportedModelError
from tests.support import comfy_stand_in as comfy
from tests.support.comfy_models import applied, flux1, sample, start
from tests.support.models import noise
from tests.support.pipelines import call_of, flux_pipeline, picture
from tests.support.tiny import GRID, SHORT, relative_error

NAMES = ("FluxFillPipeline", "FluxInpaintPipeline", "FluxControlNetInpaintPipeline")
POOLED = JiTConfig(
    densities=(0.25, 0.7, 1.0), boundaries=(0.4, 0.7, 1.0), steps=5, pooling=(2, 1, 1), micro_flow="exact"
)  # pooled, then a subset whose regular part depends on the mask


def _mask(rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(1, 1, *(4 * side for side in GRID))
    mask[..., rows, columns] = 1.0
    return mask


LARGE, SMALL = _mask(slice(12, 32), slice(8, 24)), _mask(slice(0, 8), slice(0, 8))
MOVED = _mask(slice(16, 36), slice(12, 28))  # as many tokens as LARGE, at other places of the lattice


def _run(pipe: Any, masks: list[Tensor], seeds: list[int]) -> Tensor:
    call = {**call_of(type(pipe).__name__), "mask_image": torch.cat(masks), "prompt": ["a red circle"] * len(seeds)}
    call["image"] = torch.cat([picture(seed) for seed in seeds])
    if "control_image" in call:
        call["control_image"] = call["control_image"].expand(len(seeds), -1, -1, -1)
    latents: Tensor = pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in seeds])[0]
    return latents


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [SHORT, POOLED, jitaccel.PRESETS["7x"]], ids=["subset", "pooled", "7x"])
def test_image_of_a_batch_with_masks_of_its_own_is_the_picture_made_alone(name: str, config: JiTConfig) -> None:
    pipe = flux_pipeline(name)
    with jitaccel.apply(pipe, config):
        for masks in ([LARGE, MOVED], [LARGE, SMALL]):
            alone = [_run(pipe, [mask], [seed]) for seed, mask in enumerate(masks)]
            counts = {config.stage_tokens(GRID, int(mask[0, 0, ::4, ::4].sum())) for mask in masks}
            if len(counts) > 1:
                with pytest.raises(UnsupportedModelError, match="masks of a batch must cover equally many tokens"):
                    _run(pipe, masks, [0, 1])
                continue
            together = _run(pipe, masks, [0, 1])
            for image, single in enumerate(alone):
                assert relative_error(together[image, None], single) < 1e-4, (image, masks[1] is MOVED)


def test_batch_that_is_refused_for_its_masks_runs_dense_where_asked() -> None:
    pipe = flux_pipeline("FluxFillPipeline")
    with jitaccel.apply(pipe, SHORT, on_unsupported="dense") as handle:
        assert _run(pipe, [LARGE, SMALL], [0, 1]).isfinite().all()
        assert "masks of a batch" in handle.stats().notes[-1]
        _run(pipe, [LARGE, LARGE], [0, 1])
        assert len(handle.stats().steps) == 5


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    comfy.install(monkeypatch)
    return lambda: None


@pytest.mark.usefixtures("comfyui")
def test_masks_of_a_batch_in_comfyui_are_refused_or_run_dense() -> None:
    model = flux1()
    masks = torch.zeros(2, 1, 2 * GRID[0], 2 * GRID[1])
    masks[0, :, :8, :8] = masks[1, :, :12, :12] = 1.0
    given = {"denoise_mask": masks, "latent_image": noise(4, 2, 4, 2 * GRID[0], 2 * GRID[1])}
    with applied(model, SHORT) as handle:
        with pytest.raises(UnsupportedModelError, match="masks of a batch must cover equally many tokens"):
            sample(handle.target, start(model, batch=2), **given)
        assert sample(handle.target, start(model)).isfinite().all()
    with applied(model, SHORT, on_unsupported="dense") as handle:
        assert sample(handle.target, start(model, batch=2), **given).isfinite().all()
        assert "masks of a batch" in handle.stats().notes[0]
