"""`jitaccel.apply` on a diffusers FluxPipeline: its steps, levels and statistics."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel import PRESETS
from jitaccel.patches.flux.flops import flux_flops
from tests.support import tiny
from tests.support.tiny import DENSE, GRID, SHORT, forwards, generate

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


@pytest.mark.parametrize(
    ("overrides", "asked", "steps"),
    [({}, 50, 11), ({"steps": 14}, 50, 14), ({"steps": "caller"}, 9, 9), ({"steps": 9, "schedule": "native"}, 28, 9)],
)
def test_number_of_steps_is_the_configurations_or_the_callers(
    pipe: Any, overrides: dict[str, Any], asked: int, steps: int
) -> None:
    config = PRESETS["7x-paper"].replace(**overrides)
    with jitaccel.apply(pipe, config, execution="indexed") as handle, forwards(pipe.transformer) as seen:
        calls: list[int] = []
        generate(pipe, num_inference_steps=asked, callback_on_step_end=lambda _, i, *__: calls.append(i) or {})  # type: ignore[func-returns-value]
        assert calls == list(range(steps)) and len(seen) == steps
        assert pipe.num_timesteps == steps
    notes = handle.stats().notes
    assert bool(notes) == (asked != steps)
    assert all(f"sets {steps} steps; the pipeline asked for {asked}" in note for note in notes)


def test_native_levels_are_the_schedulers_own_for_that_number_of_steps(pipe: Any) -> None:
    with jitaccel.apply(pipe, "7x", schedule="native", steps=9) as handle:
        generate(pipe, num_inference_steps=28)
        levels = [step.noise_level for step in handle.stats().steps]
    generate(pipe, num_inference_steps=9)
    assert levels == pipe.scheduler.sigmas[:-1].tolist()


def test_explicit_levels_are_used(pipe: Any) -> None:
    levels = (1.0, 0.9, 0.6, 0.25, 0.0)
    seen: list[float] = []
    with jitaccel.apply(pipe, SHORT, schedule=levels, steps=4) as handle:
        generate(pipe, callback_on_step_end=lambda _, __, t, ___: seen.append(float(t) / 1000) or {})  # type: ignore[func-returns-value]
        assert seen == pytest.approx(levels[:-1])
        assert [step.next_level for step in handle.stats().steps] == list(levels[1:])


def test_custom_sigmas_of_the_call_are_kept_with_native_levels(pipe: Any) -> None:
    sigmas = [1.0, 0.8, 0.5, 0.2]
    plain = generate(pipe, num_inference_steps=4, sigmas=sigmas)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, num_inference_steps=4, sigmas=sigmas), plain)


def test_statistics_say_what_ran(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle:
        assert handle.stats().steps == () and handle.stats().generations == 0
        generate(pipe, (1, 2), prompt=["a", "red"], negative_prompt=["", ""], true_cfg_scale=2.0)
        stats = handle.stats()
    counts = SHORT.token_counts(tiny.NUM_TOKENS)
    tokens = [counts[0]] * 2 + [counts[1]] + [counts[2]] * 2
    assert [step.tokens for step in stats.steps] == tokens and stats.token_steps == sum(tokens)
    cost = functools.partial(flux_flops, pipe.transformer.config)
    assert [step.flops for step in stats.steps] == [2 * 2 * cost(n, tiny.TEXT_TOKENS) for n in tokens]
    assert stats.flops == sum(step.flops for step in stats.steps)
    assert stats.dense_step_flops == 2 * cost(tiny.NUM_TOKENS, tiny.TEXT_TOKENS)
    assert stats.dense_steps == pytest.approx(stats.flops / stats.dense_step_flops)
    assert (stats.batch, stats.grid, stats.text_tokens) == (2, GRID, tiny.TEXT_TOKENS)
    assert (stats.generations, stats.codebase, stats.execution) == (1, "diffusers FluxPipeline", "packed")
    assert len(stats.stage_seconds) == 3
    assert sum(stats.stage_seconds) == pytest.approx(stats.network_s + stats.outside_s)
    assert all(step.network_s > 0 and step.outside_s > 0 for step in stats.steps)
    assert "batch 2, grid 12x12, 8 text tokens" in str(stats)


def test_statistics_outlive_the_handle(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle:
        generate(pipe)
    assert handle.stats().generations == 1 and len(handle.stats().steps) == 5


def test_nothing_is_printed(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with jitaccel.apply(pipe, "7x"):
        generate(pipe)
    assert capfd.readouterr() == ("", "")


def test_steps_asked_for_and_not_taken_are_logged(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with jitaccel.apply(pipe, SHORT), caplog.at_level(logging.INFO, "jitaccel"):
        generate(pipe)
        generate(pipe, num_inference_steps=6)
        generate(pipe, num_inference_steps=5)
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert "sets 5 steps; the pipeline asked for 6" in caplog.text
