"""Noise levels, stages by level, and the prediction of the next level."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jitaccel.errors import ConfigError
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS, resolve
from jitaccel.method.schedule import (
    LEVEL_TOLERANCE,
    beta_levels,
    match_level,
    noise_levels,
    predict_next_level,
    stage_of_level,
    stage_starts_by_level,
)

PUBLISHED_11 = (1, 0.9973, 0.9863, 0.9643, 0.9290, 0.8779, 0.8081, 0.7149, 0.5907, 0.4184, 0.0909, 0)
LEVELS = st.floats(1e-3, 1.0)


def _through_bfloat16(level: float) -> float:
    """Returns the level that a bfloat16 diffusers pipeline hands to its model: rounded twice."""
    return float(torch.tensor(level * 1000).bfloat16() / 1000)


def test_beta_levels_match_the_published_numbers() -> None:
    assert beta_levels(11, 1.4, 0.425) == pytest.approx(PUBLISHED_11, abs=5e-5)


@given(num_steps=st.integers(1, 100))
def test_beta_levels_fall_from_one_to_zero(num_steps: int) -> None:
    levels = beta_levels(num_steps, 1.4, 0.425)
    assert len(levels) == num_steps + 1
    assert levels[0] == 1.0 and levels[-1] == 0.0
    assert levels[-2] == pytest.approx(1 / num_steps)
    assert all(after < before for before, after in pairwise(levels))


def test_beta_levels_take_one_step_from_noise_to_data() -> None:
    assert beta_levels(1) == (1.0, 0.0)


def test_beta_levels_refuse_levels_that_do_not_fall() -> None:
    with pytest.raises(ConfigError, match="fall strictly"):
        beta_levels(50, 1.0, 1e-3)
    with pytest.raises(ConfigError, match="at least 1"):
        beta_levels(0)


def test_noise_levels_follow_the_schedule() -> None:
    explicit = JiTConfig(densities=(0.5, 1), boundaries=(0.5, 1), steps=2, schedule=(0.9, 0.4, 0.0))
    assert noise_levels(PRESETS["7x-paper"]) == beta_levels(11, 1.4, 0.425)
    assert noise_levels(PRESETS["7x-paper"], 7) == beta_levels(7, 1.4, 0.425)
    assert noise_levels(PRESETS["7x-paper"].replace(alpha=2, beta=0.6)) == beta_levels(11, 2.0, 0.6)
    assert noise_levels(explicit) == noise_levels(explicit, 2) == (0.9, 0.4, 0.0)
    assert len(noise_levels(resolve("7x", steps="caller"), 9)) == 10


def test_noise_levels_refuse_what_they_cannot_know() -> None:
    explicit = JiTConfig(densities=(1,), boundaries=(1,), steps=2, schedule=(0.9, 0.4, 0.0))
    with pytest.raises(ConfigError, match="native"):
        noise_levels(PRESETS["dense"])
    with pytest.raises(ConfigError, match="steps must be given"):
        noise_levels(resolve("7x", steps="caller"))
    with pytest.raises(ConfigError, match="use 2"):
        noise_levels(explicit, 3)


@pytest.mark.parametrize("name", ["4x", "7x", "10x", "4x-paper", "7x-paper"])
def test_stage_of_level_agrees_with_stage_of_step(name: str) -> None:
    config = PRESETS[name]
    levels, starts = noise_levels(config), stage_starts_by_level(config)
    steps = len(levels) - 1
    by_step = [config.stage_of_step(step, steps) for step in range(steps)]
    assert starts == tuple(levels[by_step.index(stage)] for stage in range(config.num_stages))
    # No stage of a preset begins within bfloat16's rounding of the level before it.
    for level, stage in zip(levels[:-1], by_step, strict=True):
        assert all(level > start * (1.0 + LEVEL_TOLERANCE) for start in starts[stage + 1 :])
        assert {stage_of_level(level, starts), stage_of_level(_through_bfloat16(level), starts)} == {stage}


@pytest.mark.parametrize("steps", [4, 7, 11, 18, 28])
def test_match_level_follows_a_run_through_bfloat16(steps: int) -> None:
    levels = beta_levels(steps)
    index = -1
    for step, level in enumerate(levels[:-1]):
        found = match_level(_through_bfloat16(level), levels, after=index)
        assert found == step
        index = found


def test_match_level_needs_after_where_bfloat16_collapses_levels() -> None:
    levels = beta_levels(18)
    second = _through_bfloat16(levels[1])
    assert second == _through_bfloat16(levels[0]) == 1.0
    assert match_level(second, levels) == 0
    assert match_level(second, levels, after=0) == 1


def test_match_level_ignores_far_and_final_levels() -> None:
    assert match_level(0.8, (1.0, 0.5, 0.0)) is None
    assert match_level(1e-9, (1.0, 0.5, 0.0)) is None
    assert match_level(0.5, (1.0, 0.5, 0.0), after=1) is None
    assert match_level(0.5, ()) is None
    assert match_level(0.5, (1.0, 0.5)) is None


def test_predict_next_level_reads_known_levels() -> None:
    levels = beta_levels(11)
    for level, following in pairwise(levels):
        assert predict_next_level(level, levels, previous=1.0) == following
    assert predict_next_level(1.0, beta_levels(18), previous=1.0, after=0) == beta_levels(18)[2]


def test_predict_next_level_repeats_the_last_step_elsewhere() -> None:
    assert predict_next_level(0.8, (), previous=0.9) == pytest.approx(0.7)
    assert predict_next_level(0.8, (1.0, 0.5, 0.0), previous=0.9) == pytest.approx(0.7)
    assert predict_next_level(0.3, (), previous=0.9) == 0.0


def test_predict_next_level_takes_the_next_known_level_without_a_step_to_repeat() -> None:
    assert predict_next_level(0.8, (1.0, 0.5, 0.0)) == 0.5
    assert predict_next_level(0.8, (1.0, 0.5, 0.0), previous=0.7) == 0.5
    assert predict_next_level(0.8, ()) == 0.0


@given(
    level=LEVELS,
    levels=st.lists(LEVELS, max_size=6),
    previous=st.none() | LEVELS,
    after=st.integers(-1, 5),
)
def test_predict_next_level_always_falls(
    level: float, levels: list[float], previous: float | None, after: int
) -> None:
    falling = (*sorted(set(levels), reverse=True), 0.0)
    assert 0.0 <= predict_next_level(level, falling, previous, after) < level


@pytest.mark.parametrize("level", [0.0, -0.1, float("nan")])
def test_predict_next_level_refuses_a_level_where_no_step_starts(level: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        predict_next_level(level, (1.0, 0.0))


def test_log_snr_levels_are_even_in_the_logarithm_of_the_ratio() -> None:
    config = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=6, schedule="log_snr", log_snr=(-4.0, 4.0))
    levels = noise_levels(config)
    assert (levels[0], levels[-1], len(levels)) == (1.0, 0.0, 7)
    assert [math.log((1 - level) / level) for level in levels[1:-1]] == pytest.approx([-4.0, -2.0, 0.0, 2.0, 4.0])
    assert noise_levels(config, steps=1) == (1.0, 0.0)
    assert noise_levels(config, steps=2) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("ends", [(1.0,), (3.0, -3.0), (-40.0, 1.0), (0.0, float("nan")), "even", None])
def test_ends_of_log_snr_that_make_no_levels_are_refused(ends: object) -> None:
    with pytest.raises(ConfigError, match="JiTConfig: log_snr must be"):
        JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=6, schedule="log_snr", log_snr=ends)  # type: ignore[arg-type]
