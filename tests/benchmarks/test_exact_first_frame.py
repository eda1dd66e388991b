"""The exact laboratory's videos of a causal decoder: the first frame has more detail, with a measured benefit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks.lab.exact.first_frame import FirstFrameStudy, _anchors_of, _lifter, _video, first_frame
from benchmarks.lab.exact.levels import BETA
from benchmarks.lab.exact.plan import Plan, Stage, dense
from benchmarks.lab.exact.subset import Variant

SHAPE = (3, 8, 8)
LEVELS = BETA.levels(6, 1.4, 0.425)
SPARSE = Plan((Stage(steps=2, density=0.4), Stage(steps=2, density=0.6), Stage(steps=2)))


def test_first_frame_has_the_variance_that_means_of_pictures_lose() -> None:
    variance = np.diag(_video(SHAPE, 3.0, 3.0).covariance).reshape(3, -1)
    assert np.allclose(variance, variance.mean(axis=1, keepdims=True))
    first, *others = variance.mean(axis=1)
    assert first > 1.1 * others[0] and np.allclose(others, others[0]) and np.isclose(variance.mean(), 1.0)


def test_dense_steps_are_those_of_each_direction_alone() -> None:
    video, study = _video(SHAPE, 3.0, 1.0), FirstFrameStudy(SHAPE, (3.0,))
    power = np.maximum(np.linalg.eigvalsh(video.covariance), 0.0)
    state = np.ones_like(power)
    for level, following in pairwise(LEVELS):
        gain = (1.0 - level) * power / ((1.0 - level) ** 2 * power + level**2)
        state = following / level * state + (1.0 - following / level) * gain * state
    expected = ((state - np.sqrt(power)) ** 2).mean()
    assert np.isclose(study.errors(dense(6), LEVELS, "euler")[0], expected, rtol=1e-6)


@pytest.mark.parametrize("is_first_dense", [False, True])
def test_stages_show_as_many_tokens_and_hold_those_before(is_first_dense: bool) -> None:
    grid = FirstFrameStudy(SHAPE, (3.0,)).grid
    first, second, last = (_anchors_of(SPARSE, stage, grid, is_first_dense, 0) for stage in SPARSE.stages)
    assert first is not None and second is not None and last is None
    assert (len(first), len(second)) == (19, 28) and set(first) < set(second)
    assert (set(range(16)) <= set(first)) is is_first_dense


def test_lift_keeps_what_was_shown_and_stays_within_a_frame() -> None:
    seen = _video(SHAPE, 3.0, 1.0).latents_of((0, 5, 17, 33))
    weights = _lifter(seen, (3, 4, 4))
    assert weights.shape == (192, 16) and np.allclose(weights.sum(axis=1), 1.0)
    assert np.allclose(weights[[*seen]], np.eye(16))
    assert not weights[:64, 8:].any() and not weights[64:, :8].any()


@pytest.mark.parametrize("lifter", ["clean", "velocity"])
def test_dense_first_frame_takes_error_from_it_and_gives_it_to_others(lifter: str) -> None:
    variant = Variant(lifter)  # type: ignore[arg-type]
    alike, favoured = (FirstFrameStudy(SHAPE, (3.6,), is_first_dense=each, variant=variant) for each in (False, True))
    before, after = (each.errors_of_frames(SPARSE, LEVELS, "dpmpp_2m", 3.6) for each in (alike, favoured))
    assert after[0] < before[0] and after[2] > before[2]


def test_rows_tell_the_frames_apart() -> None:
    rows = [each.fields for each in first_frame(FirstFrameStudy((5, 4, 8), (3.0,)))]
    assert len(rows) == 12 and len({row["variant"] for row in rows}) == 12
    for row in rows:
        first, last = row["error_of_first_frame"]["3.0"], row["error_of_last_frame"]["3.0"]
        assert first > 0.0 and last > 0.0 and first + last < 5 * row["relative_mse"]["3.0"]
