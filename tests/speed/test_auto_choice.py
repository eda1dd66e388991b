"""The rule that chooses a configuration for a target speed, and the targets it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jitaccel
from jitaccel import ConfigError
from jitaccel.method.presets import DENSE_STEPS, PRESETS
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.speed.auto import FAMILY, choose, decide, fastest
from jitaccel.speed.control import schedule_flops
from jitaccel.speed.cost import loop_seconds, seconds_of_flops
from tests.support.timing import CURVES, FLUX_DEV, NUM_TOKENS, costs

PAPERS = (
    *(PRESETS["4x-paper"].replace(steps=steps) for steps in range(DENSE_STEPS, 13, -1)),
    *(PRESETS["7x-paper"].replace(steps=steps) for steps in range(14, 5, -1)),
)


# The rule


def test_family_holds_the_presets_and_is_the_dearest_first() -> None:
    assert {PRESETS[name] for name in ("7x", "10x")} <= set(FAMILY)
    costs = [loop_seconds(config, NUM_TOKENS, CURVES["quadratic"]) for config in FAMILY]
    assert costs == sorted(costs, reverse=True)
    pooled = [config for config in FAMILY if config.pooling]
    assert FAMILY[0].steps == DENSE_STEPS and FAMILY[-len(pooled) :] == tuple(pooled)
    assert all(2 * config.stage_ends(int(config.steps))[0] >= config.steps for config in pooled)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@settings(deadline=None, max_examples=30)
@given(budgets=st.lists(st.floats(4.0, 80.0), min_size=2, max_size=2))
def test_choice_keeps_the_budget_and_more_of_it_never_buys_a_worse_plan(
    curve: Callable[[int], float], budgets: list[float]
) -> None:
    small, large = sorted(budgets)
    made = []
    for budget in (small, large):
        config = choose(curve, NUM_TOKENS, max(budget, fastest(curve, NUM_TOKENS)[1]))
        assert loop_seconds(config, NUM_TOKENS, curve) <= max(budget, fastest(curve, NUM_TOKENS)[1])
        made.append(FAMILY.index(config))
    assert made[0] >= made[1]


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_choice_is_the_best_plan_that_fits(curve: Callable[[int], float]) -> None:
    budget = 0.7 * loop_seconds(FAMILY[0], NUM_TOKENS, curve)
    config = choose(curve, NUM_TOKENS, budget)
    dearer = FAMILY[: FAMILY.index(config)]
    assert dearer and all(loop_seconds(each, NUM_TOKENS, curve) > budget for each in dearer)


def test_denser_stages_are_taken_from_their_least_steps_on() -> None:
    at_14 = loop_seconds(PRESETS["4x-paper"].replace(steps=14), NUM_TOKENS, CURVES["linear"])
    assert choose(CURVES["linear"], NUM_TOKENS, at_14, PAPERS) == PRESETS["4x-paper"].replace(steps=14)
    below = choose(CURVES["linear"], NUM_TOKENS, 0.999 * at_14, PAPERS)
    assert below.densities == PRESETS["7x-paper"].densities


def test_choice_is_made_of_the_family_given() -> None:
    family = (PRESETS["7x-paper"], PRESETS["4x-paper"])
    assert choose(CURVES["linear"], NUM_TOKENS, 100.0, family) is family[0]
    assert fastest(CURVES["constant"], NUM_TOKENS, family) == (family[0], 11.0)


def test_flops_of_flux_dev_choose_the_papers_presets() -> None:
    cost = partial(flux_flops, FLUX_DEV)
    seconds = seconds_of_flops(cost, 512, flops_per_s=1e15)
    dense = DENSE_STEPS * seconds(NUM_TOKENS)
    assert choose(seconds, NUM_TOKENS, dense / 4.13, PAPERS) == PRESETS["4x-paper"]
    assert choose(seconds, NUM_TOKENS, dense / 6.95, PAPERS) == PRESETS["7x-paper"]
    flops = schedule_flops(PRESETS["7x-paper"], NUM_TOKENS, 512, cost, 11)
    assert loop_seconds(PRESETS["7x-paper"], NUM_TOKENS, seconds) == pytest.approx(flops / 1e15)


def test_budget_beyond_the_largest_configuration_gets_that() -> None:
    assert choose(CURVES["linear"], NUM_TOKENS, 1e9) is FAMILY[0]


def test_budget_below_the_cheapest_names_it() -> None:
    least = FAMILY[-1].steps
    says = rf"^choose: budget_s must be at least \d+(\.\d+)?, which {least} steps .*, got 0\.1; "
    with pytest.raises(ConfigError, match=says):
        choose(CURVES["linear"], NUM_TOKENS, 0.1)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match="budget_s must be a finite number above 0"):
        choose(CURVES["linear"], NUM_TOKENS, budget)


def test_numbers_of_anchors_that_are_rounded_up_cost_what_they_are_rounded_to() -> None:
    config = PRESETS["7x-paper"]  # 4 steps of 1310, 3 of 2457, 4 of 4096 tokens
    assert loop_seconds(config, NUM_TOKENS, float) == 4 * 1310 + 3 * 2457 + 4 * 4096
    assert loop_seconds(config, NUM_TOKENS, float, multiple=256) == 4 * 1536 + 3 * 2560 + 4 * 4096


def test_loop_of_the_callers_steps_has_no_cost() -> None:
    with pytest.raises(ValueError, match='got "caller"'):
        loop_seconds(PRESETS["7x"].replace(steps="caller"), NUM_TOKENS, float)


# Targets


def test_decision_predicts_what_it_promises() -> None:
    choice = decide(costs(), target_speedup=6.0)
    seconds = loop_seconds(choice.config, NUM_TOKENS, CURVES["overhead"])
    assert choice.predicted_ms == pytest.approx(1000 * seconds)
    assert choice.predicted_speedup == pytest.approx(50 / seconds) and choice.predicted_speedup >= 6.0
    assert decide(costs(), target_ms=50_000 / 6.0) == choice
    assert f"{choice.config.steps} steps" in str(choice) and f"{choice.predicted_ms:.1f} ms" in str(choice)


def test_decision_keeps_other_fields() -> None:
    choice = decide(costs(), target_speedup=6.0, micro_flow="exact")
    assert choice.config == decide(costs(), target_speedup=6.0).config.replace(micro_flow="exact")


def test_speedup_is_against_the_untouched_model() -> None:
    slow = decide(costs(dense_s=2.0), target_speedup=12.0)
    assert slow.config == decide(costs(), target_speedup=6.0).config


@pytest.mark.parametrize("curve", ["linear", "overhead"])
@pytest.mark.parametrize("target", ["target_speedup", "target_ms"])
def test_limit_that_an_error_names_can_be_asked_for(curve: str, target: str) -> None:
    asked = {"target_speedup": 1e4, "target_ms": 1e-3}[target]
    least = FAMILY[-1].steps
    says = rf"^auto_config: {target} must be at \w+ .*{least} steps.*got {asked!r}; "
    with pytest.raises(ConfigError, match=says) as raised:
        decide(costs(curve), **{target: asked})
    limit = float(str(raised.value).split("must be at ")[1].split()[1])
    assert decide(costs(curve), **{target: limit}).config.steps == least


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "one of target_speedup and target_ms must be given, got none"),
        ({"target_speedup": 4.0, "target_ms": 4.0}, "must be given, got both"),
        ({"target_speedup": 1.0}, "target_speedup must be a finite number above 1, got 1.0"),
        ({"target_speedup": math.inf}, "target_speedup must be a finite number above 1, got inf"),
        ({"target_speedup": "8"}, "target_speedup must be a finite number above 1, got '8'"),
        ({"target_ms": 0}, "target_ms must be a finite number above 0, got 0"),
        ({"target_ms": True}, "target_ms must be a finite number above 0, got True"),
        ({"target_ms": 1.0, "steps": 9}, "steps must be left out, got 9"),
        ({"target_ms": 1.0, "densities": (1.0,)}, "densities must be left out"),
        ({"target_ms": 1.0, "step": 9}, 'did you mean "steps"'),
        ({"target_ms": 1e9, "noise_levels": (1.0, 0.0)}, "noise_levels must be left out"),
        ({"target_ms": 1e9, "size": (48, 47)}, "of 4 pixels, 16384 at most, got (48, 47)"),
        ({"target_ms": 1e9, "size": 48}, "size must be (height, width)"),
        ({"target_ms": 1e9, "text_tokens": 0}, "text_tokens must be a whole number in 1..4096, got 0"),
    ],
)
def test_apply_refuses_bad_targets_and_changes_nothing(pipe: Any, arguments: dict[str, Any], says: str) -> None:
    before = {name: dict(vars(getattr(pipe, name))) for name in ("transformer", "scheduler")}
    with pytest.raises(ConfigError) as raised:
        jitaccel.apply(pipe, "auto", **arguments)
    assert says in str(raised.value)
    assert before == {name: dict(vars(getattr(pipe, name))) for name in before}


@pytest.mark.parametrize("name", ["target_speedup", "target_ms", "size", "text_tokens"])
def test_targets_go_with_auto_alone(pipe: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf'apply: {name} must be left out unless preset="auto"'):
        jitaccel.apply(pipe, "7x", **{name: (48, 48) if name == "size" else 8})
