"""The network's input in a stage, as a picture and in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import jitaccel
from jitaccel.evaluation.pictures import show_active, show_pooled, show_stage
from tests.support import tiny
from tests.support.pooled import POOLED
from tests.support.tiny import GRID

CONFIG = POOLED.replace(densities=(0.25, 0.6, 1.0), boundaries=(0.4, 0.7, 1.0), pooling=(2, 1, 1))


@pytest.mark.parametrize("side", [8, 9])
def test_blocks_of_a_pooled_picture_are_their_means(side: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    shown = show_pooled(picture, 4)
    assert shown.shape == picture.shape
    for top in range(0, side, 4):
        for left in range(0, side, 4):
            block = picture[top : top + 4, left : left + 4].reshape(-1, 3).astype(float).mean(axis=0)
            assert np.abs(shown[top : top + 4, left : left + 4] - block).max() <= 1.0


def test_stages_are_named_and_shown_as_they_ran() -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, CONFIG) as handle:
        tiny.generate(pipe)
        stats = handle.stats()
    assert [stats.shown(stage) for stage in range(3)] == ["pooled 2", "subset", "dense"]
    lines = str(stats).splitlines()
    assert sum("pooled 2" in line for line in lines) == 2 and sum("subset" in line for line in lines) == 1
    picture = np.random.default_rng(0).integers(0, 255, (4 * GRID[0], 4 * GRID[1], 3)).astype(np.uint8)
    assert np.array_equal(show_stage(picture, stats, 0), show_pooled(picture, 2))
    anchors = stats.anchors[1][0]
    assert torch.is_tensor(anchors)
    assert np.array_equal(show_stage(picture, stats, 1), show_active(picture, anchors.numpy(), GRID))
    assert np.array_equal(show_stage(picture, stats, 2), picture)
