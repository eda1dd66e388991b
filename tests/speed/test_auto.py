"""preset="auto": the rule, the measurement behind it, and what `apply` and the command make of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.cli import main
from jitaccel.method.config import PRESETS, sparse_start
from jitaccel.patches.flux.flops import flux_flops
from jitaccel.speed.auto import (
    DENSE_STEPS,
    FAMILY,
    Choice,
    auto_config,
    choose,
    decide,
    fastest,
    measure_costs,
)
from jitaccel.speed.control import schedule_flops
from jitaccel.speed.cost import Costs, Probe, fit, loop_seconds, measure, measured_counts, seconds_of_flops
from tests.support import models, pipelines, tiny
from tests.support.bfl_model import Flux

NUM_TOKENS = 4096
PAPERS = (
    *(PRESETS["4x-paper"].replace(steps=steps) for steps in range(DENSE_STEPS, 13, -1)),
    *(PRESETS["7x-paper"].replace(steps=steps) for steps in range(14, 5, -1)),
)
CURVES: dict[str, Callable[[int], float]] = {
    "linear": lambda tokens: tokens / NUM_TOKENS,
    "quadratic": lambda tokens: (tokens / NUM_TOKENS) ** 2,
    "constant": lambda tokens: 1.0,
    "overhead": lambda tokens: 0.3 + 0.4 * tokens / NUM_TOKENS + 0.3 * (tokens / NUM_TOKENS) ** 2,
    "falling": lambda tokens: 2.0 - tokens / NUM_TOKENS,  # of nothing that exists; noise may look like it
}
FLUX_DEV = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip


def costs(curve: str = "overhead", **changed: Any) -> Costs:
    """Costs whose dense step takes a second, or what the curve says."""
    terms = {"linear": (0.0, 1 / NUM_TOKENS, 0.0), "overhead": (0.3, 0.4 / NUM_TOKENS, 0.3 / NUM_TOKENS**2)}
    given = {
        "num_tokens": NUM_TOKENS, "text_tokens": 512, "dense_s": CURVES[curve](NUM_TOKENS), "measured": ((4096, 1.0),),
        "terms": terms[curve],
    }  # fmt: skip
    return Costs(**{**given, **changed})


# The rule


def test_family_is_of_the_presets_kind_the_most_steps_first() -> None:
    assert [config.steps for config in FAMILY] == [*range(DENSE_STEPS, 3, -1)]
    for name in ("4x", "7x", "10x"):
        preset, same = PRESETS[name], FAMILY[DENSE_STEPS - int(PRESETS[name].steps)]
        assert preset.replace(boundaries=same.boundaries) == same
        assert preset.stage_ends(int(preset.steps)) == same.stage_ends(int(same.steps))


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@settings(deadline=None, max_examples=30)
@given(budgets=st.lists(st.floats(4.0, 80.0), min_size=2, max_size=2))
def test_choice_keeps_the_budget_and_more_of_it_never_buys_fewer_steps(
    curve: Callable[[int], float], budgets: list[float]
) -> None:
    small, large = sorted(budgets)
    made = []
    for budget in (small, large):
        config = choose(curve, NUM_TOKENS, max(budget, fastest(curve, NUM_TOKENS)[1]))
        assert loop_seconds(config, NUM_TOKENS, curve) <= max(budget, fastest(curve, NUM_TOKENS)[1])
        made.append(int(config.steps))
    assert made[0] <= made[1]


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_choice_has_the_most_steps_that_fit(curve: Callable[[int], float]) -> None:
    budget = 0.7 * loop_seconds(FAMILY[0], NUM_TOKENS, curve)
    config = choose(curve, NUM_TOKENS, budget)
    assert config == sparse_start(int(config.steps))
    assert loop_seconds(sparse_start(int(config.steps) + 1), NUM_TOKENS, curve) > budget


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
    says = rf"^choose: budget_s must be at least \d+\.\d+, which {least} steps .*, got 0\.1; "
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
        ({"target_ms": 1e9, "size": (48, 47)}, "size must be (height, width) in multiples of 4 pixels, got (48, 47)"),
        ({"target_ms": 1e9, "size": 48}, "size must be (height, width)"),
        ({"target_ms": 1e9, "text_tokens": 0}, "text_tokens must be a whole number above 0, got 0"),
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


# The measurement


def test_fit_finds_the_curve_and_never_falls() -> None:
    for terms in [(0.2, 1e-4, 3e-8), (0.0, 1e-4, 0.0), (1.0, 0.0, 0.0)]:
        points = [(m, terms[0] + terms[1] * m + terms[2] * m**2) for m in (1310, 1884, 2498, 4096)]
        found = costs(terms=fit(points))
        assert all(found(m) == pytest.approx(seconds, rel=1e-6) for m, seconds in points)
    assert min(fit([(1000, 2.0), (2000, 1.0), (4000, 1.5)])) >= 0.0
    assert fit([(1, 0.0)])[0] >= 0.0  # a clock too coarse, a grid of one token


def test_measured_numbers_of_tokens_are_rounded_as_anchors_are() -> None:
    assert measured_counts(4096) == (1310, 1884, 2498, 4096)
    assert measured_counts(4096, 256) == (1536, 2048, 2560, 4096)
    assert measured_counts(2) == (1, 2)


class Clock:
    """Time that passes only where something is said to take it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def follow(self, model: Any) -> Any:
        """Lets every token that enters a transformer take a millisecond; returns the hook to remove."""

        def tick(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.now += 1e-3 * args[0].flatten(0, -2).shape[0]

        return model.x_embedder.register_forward_pre_hook(tick)


def _scripted(clock: Clock, tokens: int, times: Iterator[float], seen: list[int]) -> Callable[[], None]:
    def run() -> None:
        seen.append(tokens)
        clock.now += next(times)

    return run


@pytest.mark.parametrize(("step_s", "rounds"), [(0.002, 50), (0.03, 7), (0.5, 3), (30.0, 1)])
def test_rounds_follow_what_a_step_takes(step_s: float, rounds: int) -> None:
    clock, seen = Clock(), list[int]()
    run = partial(_scripted, clock, times=itertools.repeat(step_s), seen=seen)
    device = torch.device("cpu")
    measured = measure(
        Probe(num_tokens=100, text_tokens=8, device=device, dense=run(tokens=0), sparse=lambda m: run(tokens=m)), clock
    )
    assert seen[:5] == [0, 32, 46, 61, 100] and len(seen) == 5 * (1 + rounds)
    assert [sorted(seen[k : k + 5]) for k in range(0, len(seen), 5)] == [[0, 32, 46, 61, 100]] * (1 + rounds)
    assert len({*seen[5::5]}) == min(rounds, 5)  # each round starts with another
    assert measured.dense_s == pytest.approx(step_s)


def test_medians_are_taken_without_the_first_call() -> None:
    clock = Clock()
    times = {tokens: iter([100.0, 1.0, 9.0, tokens + 2.0] * 9) for tokens in (0, 32, 46, 61, 100)}
    probe = Probe(
        num_tokens=100,
        text_tokens=8,
        device=torch.device("cpu"),
        dense=_scripted(clock, 0, times[0], []),
        sparse=lambda m: _scripted(clock, m, times[m], []),
    )
    assert measure(probe, clock).dense_s == 2.0


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Clock]:
    """Replaces the clock of measurements by one that a transformer's forwards move."""

    def make(model: Any) -> Clock:
        clock = Clock()
        clock.follow(model)
        monkeypatch.setattr("jitaccel.speed.cost.perf_counter", clock)
        return clock

    return make


AUTO: dict[str, Any] = {"preset": "auto", "size": (48, 48), "text_tokens": tiny.TEXT_TOKENS}


def chosen_for(target: Any, **arguments: Any) -> Choice:
    """Returns the choice where every token takes a millisecond."""
    clock = Clock()
    hook = clock.follow(getattr(target, "transformer", target))
    try:
        return auto_config(target, clock=clock, target_speedup=6.0, text_tokens=8, **arguments)
    finally:
        hook.remove()


@pytest.mark.parametrize("execution", ["auto", "packed", "indexed"])
def test_measurement_runs_the_transformer_at_four_numbers_of_tokens(pipe: Any, execution: Any) -> None:
    with tiny.counted(pipe.transformer) as seen:
        choice = chosen_for(pipe, size=(48, 48), execution=execution)
    assert seen[:5] == [144, 46, 66, 87, 144]
    assert all(sorted(seen[k : k + 5]) == [46, 66, 87, 144, 144] for k in range(0, len(seen), 5))
    assert choice.costs.dense_s == pytest.approx(0.144)
    assert [tokens for tokens, _ in choice.costs.measured] == [46, 66, 87, 144]
    assert choice.costs(100) == pytest.approx(0.1)
    assert (choice.costs.num_tokens, choice.costs.text_tokens) == (144, 8)


def test_measurement_takes_size_and_text_of_the_pipelines_defaults(pipe: Any) -> None:
    pipe.default_sample_size = 16  # times 2, over 4 pixels a token
    costs = measure_costs(pipe)
    assert (costs.num_tokens, costs.text_tokens) == (64, 512)


def test_measurement_leaves_no_trace(pipe: Any) -> None:
    state = torch.random.get_rng_state()
    before = tiny.generate(pipe, num_inference_steps=4)
    attributes = {name: dict(vars(getattr(pipe, name))) for name in ("transformer", "scheduler")}
    chosen_for(pipe, size=(48, 48))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert attributes == {name: dict(vars(getattr(pipe, name))) for name in attributes}
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    assert torch.equal(tiny.generate(pipe, num_inference_steps=4), before)


@pytest.mark.parametrize("is_bare", [False, True])
def test_measurement_sees_the_untouched_model_beneath_an_earlier_apply(pipe: Any, is_bare: bool) -> None:
    target, size = (pipe.transformer, (192, 192)) if is_bare else (pipe, (48, 48))
    plain = chosen_for(target, size=size)
    with jitaccel.apply(target, "7x") as handle:
        assert chosen_for(target, size=size) == plain
        assert handle.is_active and handle.stats().generations == 0
    assert plain.costs.num_tokens == 144


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_measurement_of_an_offloaded_model_brings_its_weights_in(pipe: Any, kind: str) -> None:
    tiny.offload_groups(pipe.transformer, kind)
    assert chosen_for(pipe, size=(48, 48)).costs(100) == pytest.approx(0.1)


def test_measurement_of_a_compiled_model_calls_it_as_a_whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    costs = measure_costs(pipe, (48, 48), 8)
    assert [tokens for tokens, _ in costs.measured] == [46, 66, 87, 144] and costs.dense_s > 0.0


@pytest.mark.parametrize("make", ["flux2_transformer", "chroma_transformer"])
def test_other_transformers_are_measured(make: str) -> None:
    model = getattr(models, make)()
    choice = chosen_for(model, size=(192, 192))
    assert [tokens for tokens, _ in choice.costs.measured] == [46, 66, 87, 144]
    assert choice.costs(100) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["ChromaPipeline", "FluxControlPipeline", "Flux2Pipeline"])
def test_other_pipelines_are_measured(name: str) -> None:
    if name == "ChromaPipeline":
        parts = {part: tiny.pipeline().components[part] for part in ("vae", "scheduler")}
        model = models.chroma_transformer()
        pipe = diffusers.ChromaPipeline(**parts, text_encoder=None, tokenizer=None, transformer=model)
    elif name == "Flux2Pipeline":
        pipe = pipelines.flux2_pipeline(name)
    else:
        pipe = pipelines.flux_pipeline(name)
    unit = 2 * pipe.vae_scale_factor
    choice = chosen_for(pipe, size=(12 * unit, 12 * unit))
    assert choice.costs.num_tokens == 144


def test_bare_transformer_needs_a_size() -> None:
    with pytest.raises(ConfigError, match=r"size must be given for a bare transformer.*pixels"):
        auto_config(tiny.transformer(), target_speedup=6.0)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxKontextPipeline"])
def test_what_is_not_measured_asks_for_a_preset(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf'auto_config: .*got {name}.*give a preset \("4x", "7x"\)'):
        jitaccel.apply(pipelines.flux_pipeline(name), "auto", target_speedup=6.0)


def test_model_of_a_patch_without_measurement_asks_for_a_preset() -> None:
    with pytest.raises(UnsupportedModelError, match=r"black-forest-labs Flux.*give a preset"):
        jitaccel.apply(Flux.__new__(Flux), "auto", target_speedup=6.0)


# Apply, and the command


def test_auto_is_the_same_as_applying_what_it_chose(pipe: Any, ticking: Callable[[Any], Clock]) -> None:
    ticking(pipe.transformer)
    untouched = tiny.generate(pipe, num_inference_steps=4)
    with jitaccel.apply(pipe, target_speedup=6.0, **AUTO, micro_flow="exact") as handle:
        assert handle.choice is not None
        assert handle.config == handle.choice.config and handle.config.micro_flow == "exact"
        assert "auto: " in repr(handle) and "predicted" in repr(handle)
        made = tiny.generate(pipe)
        assert len(handle.stats().steps) == handle.config.steps
    assert torch.equal(tiny.generate(pipe, num_inference_steps=4), untouched)
    with jitaccel.apply(pipe, handle.config) as again:
        assert again.choice is None and "auto" not in repr(again)
        assert torch.equal(tiny.generate(pipe), made)


def test_prediction_is_what_the_loop_takes(pipe: Any, ticking: Callable[[Any], Clock]) -> None:
    clock = ticking(pipe.transformer)
    handle = jitaccel.apply(pipe, target_ms=1000.0, **AUTO)
    assert handle.choice is not None
    start = clock.now
    tiny.generate(pipe)
    assert 1000 * (clock.now - start) == pytest.approx(handle.choice.predicted_ms)
    assert handle.choice.predicted_ms <= 1000.0


def test_embedded_model_reaches_its_target_in_steps(ticking: Callable[[Any], Clock]) -> None:
    pipe = diffusers.FluxPipeline.from_pretrained(jitaccel.embedded_model())
    pipe.set_progress_bar_config(disable=True)
    ticking(pipe.transformer)
    call = {"height": 128, "width": 128, "max_sequence_length": 48, "output_type": "latent", "return_dict": False}

    def make() -> torch.Tensor:
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call)[0]

    cost = loop_seconds(PRESETS["7x"], 256, float)
    target_speedup = 0.999 * DENSE_STEPS * 256 / cost
    with jitaccel.apply(pipe, "auto", target_speedup=target_speedup, size=(128, 128), text_tokens=48):
        made = make()
    with jitaccel.apply(pipe, "7x"):
        assert torch.equal(make(), made)


def test_what_may_run_dense_does_where_it_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.flux_pipeline("FluxKontextPipeline")
    handle = jitaccel.apply(pipe, "auto", target_speedup=6.0, on_unsupported="dense")
    assert handle.choice is None and "runs dense" in caplog.text
    assert any("auto_config" in note for note in handle.stats().notes)


@pytest.mark.parametrize("target", ["--target-speedup=2", "--target-ms=1e6"])
def test_generate_measures_and_says_what_it_chose(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "a.png"
    status = main([
        "generate", "--model", str(tmp_path / "model"), "--prompt", "a", "--preset", "auto", target, "--height=48",
        "--width=48", "--text-tokens=8", "--out", str(out), "--stats",
    ])  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "auto: " in said.out and "predicted" in said.out and out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset=auto"], "one of target_speedup and target_ms must be given"),
        (["--preset=auto", "--target-ms=5", "--steps=5"], "--steps must be left out with --preset auto"),
        (["--preset=auto", "--target-speedup=1"], "target_speedup must be a finite number above 1, got 1.0"),
        (["--target-ms=5"], "--target-ms must come with --preset auto, got --preset 7x"),
        (["--preset=none", "--target-speedup=5"], "--target-speedup must come with --preset auto"),
    ],
)
def test_generate_refuses_bad_targets_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "a.png"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1
