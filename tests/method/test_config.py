"""Configuration: presets, validation, stages of steps and token counts."""

import dataclasses
import json
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitaccel.errors import ConfigError
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import PRESETS, resolve
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.speed.control import equivalent_dense_steps
from tests.support.timing import FLUX_DEV

TWO_STAGES: dict[str, Any] = {"densities": (0.5, 1.0), "boundaries": (0.5, 1.0), "steps": 10}


@pytest.mark.parametrize(
    ("name", "steps", "ends"), [("4x-paper", 18, (7, 11, 18)), ("7x-paper", 11, (4, 7, 11)), ("dense", 50, (50,))]
)
def test_presets_have_the_papers_stages(name: str, steps: int, ends: tuple[int, ...]) -> None:
    assert PRESETS[name].steps == steps
    assert PRESETS[name].stage_ends(steps) == ends


def test_presets_have_the_released_defaults() -> None:
    config = PRESETS["7x-paper"]
    assert config.densities == (0.32, 0.60, 1.0)
    assert PRESETS["4x-paper"].densities == (0.35, 0.62, 1.0)
    assert (config.schedule, config.alpha, config.beta) == ("beta", 1.4, 0.425)
    assert (config.lifter, config.micro_flow, config.relax_steps) == ("velocity", "released", 3)
    assert (config.noise, config.importance_window, config.blur_scale) == ("fresh", 3, 0.4)
    assert PRESETS["4x-paper"] == config.replace(densities=(0.35, 0.62, 1.0), steps=18)
    assert PRESETS["dense"].schedule == "native"


@pytest.mark.parametrize(("name", "most"), [("4x", 12.5), ("7x", 7.2), ("10x", 5.0)])
def test_default_presets_pool_half_of_their_steps_and_cost_what_they_promise(name: str, most: float) -> None:
    """Dense steps of FLUX.1-dev at 1024x1024 with 512 text tokens, attention counted."""
    config = PRESETS[name]
    assert isinstance(config.steps, int) and config.pooling == (2, 1) and config.solver == "dpmpp_2m"
    assert 2 * config.stage_ends(config.steps)[0] >= config.steps
    assert equivalent_dense_steps(config, 4096, 512, partial(flux_flops, FLUX_DEV)) <= most


def test_few_steps_has_one_sparse_step_at_any_number_that_it_allows() -> None:
    config = PRESETS["few-steps"]
    assert config.pooling == () and config.stage_ends(7) == (1, 7)
    assert config.replace(steps=6).stage_ends(6)[0] == 1


def test_presets_are_read_only() -> None:
    with pytest.raises(TypeError):
        PRESETS["7x"] = PRESETS["4x"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["7x"].steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("densities", (), "non-empty tuple of finite numbers"),
        ("densities", (0.5, math.nan, 1.0), "finite"),
        ("densities", (0.5, math.inf), "finite"),
        ("densities", (0.5, True), "finite"),
        ("densities", (0.5, "1.0"), "finite"),
        ("densities", "0.5", "non-empty tuple"),
        ("densities", (0.0, 1.0), "(0, 1]"),
        ("densities", (0.5, 1.5), "(0, 1]"),
        ("densities", (1.0, 1.0), "rise strictly"),
        ("densities", (0.5, 0.9), "end in 1.0"),
        ("densities", (0.2, 0.5, 1.0), "as many as"),
        ("boundaries", (0.9, 0.5), "rise strictly"),
        ("boundaries", (-0.1, 1.0), "(0, 1]"),
        ("boundaries", (0.5, 0.99), "end in 1.0"),
        ("steps", 0, "whole number"),
        ("steps", -4, "whole number"),
        ("steps", 10.0, "whole number"),
        ("steps", True, "whole number"),
        ("steps", "ten", "whole number"),
        ("steps", 1, "at least one step"),
        ("schedule", "betas", 'did you mean "beta"'),
        ("schedule", 3, "non-empty tuple"),
        ("schedule", (1.0, 0.5, 0.1), "fall strictly"),
        ("schedule", (1.0, 1.0, 0.0), "fall strictly"),
        ("schedule", (1.2, 0.5, 0.0), "fall strictly"),
        ("schedule", (0.0,), "fall strictly"),
        ("schedule", (1.0, 0.5, 0.0), "steps=2"),
        ("alpha", 0.0, "above 0"),
        ("alpha", "1.4", "above 0"),
        ("beta", math.nan, "above 0"),
        ("blur_scale", -1, "above 0"),
        ("blur_scale", False, "above 0"),
        ("lifter", "velocities", 'did you mean "velocity"'),
        ("lifter", None, "velocity, clean"),
        ("micro_flow", "release", 'did you mean "released"'),
        ("noise", "Own", 'did you mean "own"'),
        ("relax_steps", 0, "above 0"),
        ("relax_steps", 1.5, "whole number"),
        ("importance_window", 4, "odd"),
        ("importance_window", -3, "odd"),
        ("multiple", 0, "in 1..4096"),
        ("multiple", 1.5, "whole number"),
        ("importance_window", 1025, "1..1023"),
        ("importance_window", 2**63 + 1, "1..1023"),
        ("alpha", 10**400, "above 0"),
        ("densities", (10**400, 1.0), "finite numbers"),
        ("schedule", (1.0, 10**400, 0.0), "finite numbers"),
        ("log_snr", (-(10**400), 3.0), "finite numbers"),
    ],
)
def test_config_refuses_a_bad_field_by_name(field: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        JiTConfig(**{**TWO_STAGES, field: value})
    lines = [line for line in str(raised.value).splitlines() if says in line]
    assert lines, str(raised.value)
    assert lines[0].startswith("JiTConfig: ")
    assert field in lines[0]
    assert ", got " in lines[0] and "; " in lines[0]


@pytest.mark.parametrize(
    ("own", "given", "counts"),
    [(1, 1, (358, 634, 1024)), (2, 1, (358, 634, 1024)), (4, 1, (360, 636, 1024)), (4, 6, (360, 636, 1024))],
)
def test_numbers_of_tokens_are_multiples_of_what_is_set_and_of_what_is_given(
    own: int, given: int, counts: tuple[int, ...]
) -> None:
    config = JiTConfig(densities=(0.35, 0.62, 1.0), boundaries=(0.4, 0.6, 1.0), steps=10, multiple=own)
    assert config.token_counts(1024, multiple=given) == config.stage_tokens((32, 32), multiple=given) == counts
    assert JiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_reports_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        JiTConfig(
            densities=(0.6, 0.5),
            boundaries=(0.5,),
            steps=0,
            schedule="no",  # type: ignore[arg-type]
            alpha=-1,
            noise="no",  # type: ignore[arg-type]
            relax_steps=0,
        )
    message = str(raised.value)
    for name in ("densities", "boundaries", "steps", "schedule", "alpha", "noise", "relax_steps"):
        assert f"JiTConfig: {name} must" in message


def test_config_accepts_lists_and_whole_numbers_and_stores_plain_values() -> None:
    config = JiTConfig(densities=[0.5, 1], boundaries=[0.5, 1], steps=np.int64(4), alpha=2)  # type: ignore[arg-type]
    assert config == JiTConfig(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=4, alpha=2.0)
    assert hash(config) == hash(config.replace())
    assert [type(config.steps), type(config.alpha), type(config.densities[1])] == [int, float, float]


@pytest.mark.parametrize(
    ("steps", "boundary", "end"), [(100, 0.29, 29), (50, 0.58, 29), (3, 1 / 3, 1), (10, 0.3, 3)]
)
def test_stage_ends_are_those_of_the_exact_product(steps: int, boundary: float, end: int) -> None:
    config = JiTConfig(densities=(0.5, 1.0), boundaries=(boundary, 1.0), steps=steps)
    assert config.stage_ends(steps) == (end, steps)


def test_stage_ends_name_the_step_count_that_works_where_a_stage_is_skipped() -> None:
    with pytest.raises(ConfigError, match=r"1, 1, 3.*use 4 steps"):
        PRESETS["7x-paper"].stage_ends(3)
    assert PRESETS["7x-paper"].stage_ends(4) == (1, 2, 4)
    with pytest.raises(ConfigError, match="use 4 steps"):
        PRESETS["7x-paper"].replace(steps=3)


def test_stage_ends_of_impossible_boundaries_ask_for_wider_ones() -> None:
    config = JiTConfig(densities=(0.5, 0.7, 1.0), boundaries=(0.5, 0.5 + 1e-7, 1.0), steps="caller")
    with pytest.raises(ConfigError, match="further apart"):
        config.stage_ends(20)


@given(steps=st.integers(4, 200))
def test_stage_of_step_agrees_with_stage_ends(steps: int) -> None:
    config = PRESETS["7x-paper"]
    stages = [config.stage_of_step(step, steps) for step in range(steps)]
    first, second, third = (stages.count(stage) for stage in range(config.num_stages))
    assert stages == sorted(stages)
    assert (first, first + second, first + second + third) == config.stage_ends(steps)


@pytest.mark.parametrize("step", [-1, 11, 0.5])
def test_stage_of_step_refuses_a_step_outside(step: Any) -> None:
    with pytest.raises(ConfigError, match=r"0\.\.10"):
        PRESETS["7x-paper"].stage_of_step(step, 11)


def test_token_counts_match_the_paper() -> None:
    assert PRESETS["7x-paper"].token_counts(4096) == (1213 + 97, 2457, 4096)
    assert PRESETS["4x-paper"].token_counts(4096) == (1213 + 220, 2539, 4096)
    assert PRESETS["7x-paper"].token_counts(1024) == (349 - 22, 614, 1024)
    assert JiTConfig(densities=(0.29, 1.0), boundaries=(0.5, 1.0), steps=2).token_counts(100)[0] == 29


def test_token_counts_may_be_equal_but_not_zero() -> None:
    config = JiTConfig(densities=(0.8, 0.9, 1.0), boundaries=(0.4, 0.7, 1.0), steps=10)
    assert config.token_counts(3) == (2, 2, 3)
    with pytest.raises(ConfigError, match="use 4 tokens"):
        PRESETS["7x-paper"].token_counts(3)
    assert PRESETS["7x-paper"].token_counts(4)[0] == 1


@pytest.mark.parametrize(("micro_flow", "weight"), [("exact", 1.0), ("released", 1 / 3), ("none", 0.0)])
def test_move_weight_follows_the_micro_flow(micro_flow: Any, weight: float) -> None:
    assert PRESETS["7x"].replace(micro_flow=micro_flow).move_weight == weight


def test_replace_refuses_unknown_names_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'step must be a field.*did you mean "steps"'):
        PRESETS["7x"].replace(step=3, lifter="clean")


def test_resolve_takes_a_preset_or_a_config_with_overrides() -> None:
    assert resolve("7x") is PRESETS["7x"]
    assert resolve("7x", steps=20).steps == 20
    assert resolve(PRESETS["4x-paper"], lifter="clean") == PRESETS["4x-paper"].replace(lifter="clean")


@pytest.mark.parametrize(
    ("name", "nearest"), [("7X", "7x"), ("4", "4x"), ("7x-papers", "7x-paper"), ("dens", "dense")]
)
def test_resolve_names_the_nearest_preset(name: Any, nearest: str) -> None:
    names = "4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, dense"
    with pytest.raises(ConfigError, match=f'{names}.*did you mean "{nearest}'):
        resolve(name)


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        PRESETS["few-steps"].replace(steps=2, schedule=(0.9, 0.4, 0.0), densities=(0.5, 1), boundaries=(0.5, 1)),
    ],
)
def test_config_survives_json(config: JiTConfig) -> None:
    assert JiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_unknown_and_missing_names() -> None:
    with pytest.raises(ConfigError, match='did you mean "densities"'):
        JiTConfig.from_dict({"density": (1.0,)})
    with pytest.raises(ConfigError, match="boundaries, steps"):
        JiTConfig.from_dict({"densities": (1.0,)})
