"""The step that a call belongs to, with known and with predicted sampler levels."""

from itertools import pairwise

import pytest
import torch

from jitaccel import PRESETS, ConfigError, JiTConfig, noise_levels
from jitaccel.method.steps import KnownLevels, PredictedLevels, Step

UNIFORM = tuple(1.0 - i / 20 for i in range(21))


def follow_all(clock: KnownLevels | PredictedLevels, levels: tuple[float, ...], dtype: torch.dtype) -> list[Step]:
    steps: list[Step] = []
    for level in torch.tensor(levels[:-1]).mul(1000).to(dtype).div(1000).tolist():
        step = clock.follow(steps[-1] if steps else None, level)
        assert step is not None
        steps.append(step)
    return steps


@pytest.mark.parametrize(
    ("preset", "stages"), [("4x-paper", [0] * 7 + [1] * 4 + [2] * 7), ("7x-paper", [0] * 4 + [1] * 3 + [2] * 4)]
)
def test_known_levels_give_the_stages_of_the_preset(preset: str, stages: list[int]) -> None:
    config = PRESETS[preset]
    levels = noise_levels(config)
    clock = KnownLevels(config, levels)
    steps = [clock.step(i) for i in range(clock.num_steps)]
    assert [step.stage for step in steps] == stages
    assert [(step.noise_level, step.next_level) for step in steps] == list(pairwise(levels))
    ends = [step.index for step in steps if step.may_end_stage]
    assert ends == [i for i in range(len(stages) - 1) if stages[i + 1] > stages[i]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["4x", "7x", "10x", "4x-paper", "7x-paper"])
@pytest.mark.parametrize("kind", [KnownLevels, PredictedLevels])
def test_clock_follows_the_configurations_own_levels_exactly(
    kind: type[KnownLevels] | type[PredictedLevels], preset: str, dtype: torch.dtype
) -> None:
    config = PRESETS[preset]
    levels = noise_levels(config)
    clock = KnownLevels(config, levels) if kind is KnownLevels else PredictedLevels(config)
    steps = follow_all(clock, levels, dtype)
    known = KnownLevels(config, levels)
    for i, step in enumerate(steps):
        expected = known.step(i)
        assert (step.index, step.stage) == (i, expected.stage)
        assert (step.noise_level, step.next_level) == (expected.noise_level, expected.next_level)
        assert step.may_end_stage or not expected.may_end_stage


def test_known_levels_refuse_another_level() -> None:
    levels = noise_levels(PRESETS["7x-paper"])
    clock = KnownLevels(PRESETS["7x-paper"], levels)
    assert clock.follow(None, 0.5) is None
    assert clock.follow(clock.step(3), levels[6]) is None
    assert clock.follow(clock.step(10), levels[10]) is None


def test_known_levels_of_too_few_steps_raise() -> None:
    with pytest.raises(ConfigError, match="use 4 steps"):
        KnownLevels(PRESETS["7x-paper"], (1.0, 0.7, 0.4, 0.0))


def test_predicted_levels_repeat_the_last_step_of_an_unknown_schedule() -> None:
    steps = follow_all(PredictedLevels(PRESETS["7x-paper"]), UNIFORM, torch.float32)
    assert [step.noise_level for step in steps] == pytest.approx(UNIFORM[:-1], abs=1e-6)
    assert [step.next_level for step in steps[2:]] == pytest.approx(UNIFORM[3:], abs=1e-6)
    stages = [step.stage for step in steps]
    assert stages == sorted(stages) and set(stages) == {0, 1, 2}
    assert all(step.may_end_stage == (step.stage < 2) for step in steps)


def test_level_near_an_expected_one_is_chance_once_the_levels_are_the_samplers_own() -> None:
    # In float16 the second could be 1.0, above the first; the last is one of the preset's.
    levels = (0.9998, 1.0 - 2.0**-11, 0.7, noise_levels(PRESETS["7x-paper"])[9])
    clock, steps = PredictedLevels(PRESETS["7x-paper"]), list[Step]()
    for level in levels:
        steps.append(clock.follow(steps[-1] if steps else None, level))
    assert [step.matched for step in steps] == [-1] * 4
    assert [step.noise_level for step in steps] == list(levels)
    assert steps[3].next_level == pytest.approx(levels[3] - (levels[2] - levels[3]))


def test_predicted_stage_starts_where_the_level_has_fallen_to_its_own() -> None:
    config = JiTConfig(densities=(0.3, 1.0), boundaries=(0.5, 1.0), steps=4, schedule=(1.0, 0.8, 0.55, 0.2, 0.0))
    steps = follow_all(PredictedLevels(config), UNIFORM, torch.float32)
    assert [step.stage for step in steps] == [int(level <= 0.551) for level in UNIFORM[:-1]]
