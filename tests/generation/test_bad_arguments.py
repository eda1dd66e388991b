"""Arguments of a wrong type or size raise an error of this package that names them."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import jitaccel
from jitaccel import ConfigError, JiTConfig, noise_levels
from tests.support import tiny
from tests.support.tiny import SHORT, counted

STEPS: list[Any] = [2**63, 10_001, 0, -1, 3.0, float("nan"), "5", True, [5]]


@pytest.mark.parametrize("steps", STEPS, ids=repr)
@pytest.mark.parametrize("schedule", ["beta", "log_snr"])
def test_number_of_steps_that_no_sampler_takes_is_refused(schedule: Any, steps: Any) -> None:
    with pytest.raises(ConfigError, match=r"noise_levels: steps must be a whole number from 1 to 10000"):
        noise_levels(SHORT.replace(schedule=schedule), steps)


@pytest.mark.parametrize("fields", [None, 3, [], "7x", [("steps", 3)], SHORT], ids=repr)
def test_what_is_no_mapping_is_no_configuration(fields: Any) -> None:
    with pytest.raises(ConfigError, match="from_dict: fields must be a mapping"):
        JiTConfig.from_dict(fields)


@pytest.mark.parametrize("count", [2**63, 10**400, 0, 1.5, float("inf")], ids=repr)
def test_number_of_tokens_beyond_the_limit_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_tokens must be a whole number from 1 to 2\^40"):
        SHORT.token_counts(count)


@pytest.mark.parametrize("levels", [3, "10", b"10", [None], ["x"], [10**400, 0.0], [[1.0], [0.0]]], ids=repr)
def test_levels_that_are_no_numbers_are_refused(levels: Any) -> None:
    with pytest.raises(ConfigError, match="apply: noise_levels must"):
        jitaccel.apply(tiny.transformer(), SHORT, noise_levels=levels)


@pytest.mark.parametrize(
    "sizes", [(48, 48), 48, None, "48x48", [(48,)], [(48, 48, 48)], [(48.0, 48)], [(0, 48)], [(48, True)], [None]],
    ids=repr,
)  # fmt: skip
def test_sizes_of_a_warm_up_that_are_no_pairs_are_refused_before_any_is_made(pipe: Any, sizes: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle, counted(pipe.transformer) as seen:
        with pytest.raises(ConfigError, match=r"warmup: sizes must be a list of \(height, width\)"):
            handle.warmup(sizes, progress=False)
        assert seen == []


@pytest.mark.parametrize("batches", [2, None, [0], [1.0], [True], "12"], ids=repr)
def test_batches_of_a_warm_up_that_are_no_counts_are_refused(pipe: Any, batches: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle, pytest.raises(ConfigError, match="warmup: batch_sizes must be a list"):
        handle.warmup([(48, 48)], batches, progress=False)


def test_warm_up_of_a_pipeline_that_is_gone_is_told() -> None:
    handle = jitaccel.apply(tiny.pipeline(), SHORT)
    gc.collect()
    with pytest.raises(ConfigError, match=r"Handle\.warmup: the pipeline must be alive"):
        handle.warmup([(48, 48)], progress=False)
