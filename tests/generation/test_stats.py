"""A handle's statistics of the last generation."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import jitaccel
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.speed.control import schedule_flops
from tests.support import tiny

TOKENS = tiny.GRID[0] * tiny.GRID[1]


def test_statistics_before_a_generation_say_what_will_run(pipe: Any) -> None:
    stats = jitaccel.apply(pipe, tiny.SHORT).stats()
    assert (stats.generations, stats.steps, stats.anchors, stats.flops) == (0, (), (), 0)
    assert stats.dense_steps == 0.0 and stats.stage_seconds == ()
    assert "0 generations" in str(stats)


def test_token_steps_and_flops_add_up_over_the_steps(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, tiny.SHORT)
    tiny.generate(pipe)
    stats = handle.stats()
    counts = tiny.SHORT.token_counts(TOKENS)
    cost = functools.partial(flux_flops, pipe.transformer.config)
    assert [step.tokens for step in stats.steps] == [counts[0]] * 2 + [counts[1]] + [counts[2]] * 2
    assert stats.token_steps == 2 * counts[0] + counts[1] + 2 * counts[2]
    assert stats.flops == schedule_flops(tiny.SHORT, TOKENS, stats.text_tokens, cost, 5)
    assert stats.dense_steps == pytest.approx(stats.flops / cost(TOKENS, stats.text_tokens))


def test_anchors_of_every_stage_are_kept_and_nested(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, tiny.SHORT)
    tiny.generate(pipe, seed=[0, 1], prompt=["a red circle", "a blue square"])
    anchors = handle.stats().anchors
    assert [tuple(a.shape) for a in anchors] == [(2, count) for count in tiny.SHORT.token_counts(TOKENS)]
    for earlier, later in itertools.pairwise(anchors):
        for image in range(2):
            assert torch.isin(earlier[image], later[image]).all()


def test_true_guidance_counts_two_calls_a_step(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, tiny.SHORT)
    tiny.generate(pipe)
    assert "1 generation\n" in str(handle.stats())
    once = handle.stats().flops
    tiny.generate(pipe, negative_prompt="blue", true_cfg_scale=2.0)
    stats = handle.stats()
    assert {step.calls for step in stats.steps} == {2}
    assert stats.flops == 2 * once
    assert stats.generations == 2 and "2 generations\n" in str(stats)


def test_times_are_split_between_network_and_method(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, tiny.SHORT)
    tiny.generate(pipe)
    stats = handle.stats()
    assert all(step.network_s > 0 and step.outside_s > 0 for step in stats.steps)
    assert sum(stats.stage_seconds) == pytest.approx(stats.network_s + stats.outside_s)
    assert len(stats.stage_seconds) == 3


def test_statistics_print_as_one_line_a_step(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, tiny.SHORT)
    tiny.generate(pipe)
    lines = str(handle.stats()).splitlines()
    assert "packed execution with sdpa" in lines[0]
    assert len(lines) - next(i for i, line in enumerate(lines) if "tokens" in line and "stage" in line) - 1 == 5
