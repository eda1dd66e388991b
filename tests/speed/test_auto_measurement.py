"""Measurements for `auto`: which forwards on which models, and that the model is left unchanged."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.speed.auto import auto_config, measure_costs
from jitaccel.speed.cost import Probe, fit, measure, measured_counts
from tests.support import models, pipelines, tiny
from tests.support.bfl_model import Flux
from tests.support.timing import Clock, chosen_for, costs, scripted


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


@pytest.mark.parametrize(("step_s", "rounds"), [(0.002, 50), (0.03, 7), (0.5, 3), (30.0, 1)])
def test_rounds_follow_what_a_step_takes(step_s: float, rounds: int) -> None:
    clock, seen = Clock(), list[int]()
    run = partial(scripted, clock, times=itertools.repeat(step_s), seen=seen)
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
        dense=scripted(clock, 0, times[0], []),
        sparse=lambda m: scripted(clock, m, times[m], []),
    )
    assert measure(probe, clock).dense_s == 2.0


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
        pipe = pipelines.chroma_pipeline(name)
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
    with pytest.raises(UnsupportedModelError, match=r"FLUX\.1.*, got Flux; give its pipeline"):
        jitaccel.apply(Flux.__new__(Flux), "auto", target_speedup=6.0)
