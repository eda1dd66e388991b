"""Target speeds for cut models, measured with the first transformer call of their pipeline."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.patches.models import model_of
from jitaccel.speed.auto import FAMILY, auto_config, measure_costs
from jitaccel.speed.cost import measured_counts
from tests.support import hunyuan, tiny, video
from tests.support.every_model import wan_transformer
from tests.support.generations import GENERATIONS
from tests.support.qwen import LAYERED, qwen_pipeline, small_references
from tests.support.timing import Clock

LATE = {"QwenImageImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"}
FROM_NOISE = [name for name in GENERATIONS if name not in LATE]
VIDEO = {**video.SIZE, **video.prompts()}


class _Recorded(Exception):
    pass


def call_of(pipe: Any, generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the arguments with which the tests call a pipeline."""
    kind, seen = type(pipe), dict[str, Any]()
    original = kind.__call__

    @functools.wraps(original)
    def record(self: Any, **call: Any) -> None:
        seen.update(call)
        raise _Recorded

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__call__", record)
        with pytest.raises(_Recorded):
            generate(pipe)
    return seen


def follow(clock: Clock, transformer: Any) -> None:
    """Lets every row of tokens that a transformer projects last take a millisecond."""
    model = model_of(transformer)
    assert model is not None
    *_, last = model.adapter.outputs
    transformer.get_submodule(last).register_forward_pre_hook(
        lambda _, args: setattr(clock, "now", clock.now + 1e-3 * args[0].flatten(0, -2).shape[0])
    )


@pytest.mark.parametrize("name", FROM_NOISE)
def test_every_pipeline_is_timed_at_four_numbers_of_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("QwenImageEdit") or name == LAYERED:
        small_references(monkeypatch, name)
    subject = GENERATIONS[name]
    pipe = subject.make()
    call = call_of(pipe, subject.generate, monkeypatch)
    with jitaccel.apply(pipe, tiny.SHORT) as handle:
        subject.generate(pipe)
    clock = Clock()
    follow(clock, pipe.transformer)
    costs, stats = measure_costs(pipe, clock=clock, call=call), handle.stats()
    num_tokens = torch.Size(stats.grid).numel()
    num_forced = 48 if name == hunyuan.FROM_IMAGES[0] else 0
    assert (costs.grid, costs.num_forced, costs.text_tokens) == (stats.grid, num_forced, stats.text_tokens)
    assert [tokens for tokens, _ in costs.measured] == [*measured_counts(num_tokens, 1, num_forced)]
    # One image, one branch; text and references that pass the last projection come on top.
    further = round(1000 * costs.dense_s) - num_tokens
    assert further >= 0 and costs.dense_s == pytest.approx(costs.measured[-1][1])
    if name != "ZImagePipeline":  # its model pads
        assert all(seconds == pytest.approx(1e-3 * (tokens + further)) for tokens, seconds in costs.measured)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("jitaccel.speed.cost.perf_counter", made)
    return made


@pytest.mark.parametrize("name", ["WanPipeline", "HunyuanVideoImageToVideoPipeline", "LTXPipeline"])
def test_prediction_is_what_the_loop_takes(name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = GENERATIONS[name]
    pipe = subject.make()
    follow(clock, pipe.transformer)
    call = call_of(pipe, subject.generate, monkeypatch)
    for speedup in (4.0, 6.0):
        with jitaccel.apply(pipe, jitaccel.Auto(speedup=speedup, call=call)) as handle:
            assert handle.choice is not None and handle.choice.predicted_speedup >= speedup
            assert handle.config == handle.choice.config and handle.config.schedule == "native"
            start = clock.now
            subject.generate(pipe, **subject.unguided)
        assert 1000 * (clock.now - start) == pytest.approx(handle.choice.predicted_ms)


def test_auto_is_the_same_as_applying_what_it_chose(clock: Clock) -> None:
    pipe = video.wan_pipeline()
    follow(clock, pipe.transformer)
    with jitaccel.apply(pipe, jitaccel.Auto(speedup=6.0, call=VIDEO), schedule="beta") as handle:
        assert handle.config in FAMILY  # with the preset's levels
        made = video.generate(pipe)
    with jitaccel.apply(pipe, handle.config):
        assert torch.equal(video.generate(pipe), made)


def test_measurement_leaves_no_trace() -> None:
    pipe = video.wan_pipeline()
    before = video.generate(pipe, 3)
    state, scheduler = torch.random.get_rng_state(), copy.deepcopy(vars(pipe.scheduler))
    pipe._progress_bar_config = {"disable": False}
    modules = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    measure_costs(pipe, call=VIDEO)
    assert torch.equal(torch.random.get_rng_state(), state) and pipe._progress_bar_config == {"disable": False}
    assert repr(vars(pipe.scheduler)) == repr(scheduler)
    assert modules == {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(video.generate(pipe, 3), before)


def test_measurement_sees_the_untouched_model_beneath_an_earlier_apply(clock: Clock) -> None:
    pipe = video.wan_pipeline()
    follow(clock, pipe.transformer)
    plain = measure_costs(pipe, call=VIDEO)
    with jitaccel.apply(pipe, tiny.SHORT) as handle:
        expected = video.generate(pipe)
        again = measure_costs(pipe, call=VIDEO)
        assert [tokens for tokens, _ in again.measured] == [tokens for tokens, _ in plain.measured]
        assert again(100) == pytest.approx(plain(100)) and again.dense_s == pytest.approx(plain.dense_s)
        assert handle.stats().generations == 1
        assert torch.equal(video.generate(pipe), expected)


def test_compiled_and_offloaded_transformers_are_timed(clock: Clock) -> None:
    for change in ("compiled", "offloaded"):
        pipe = video.wan_pipeline()
        follow(clock, pipe.transformer)
        if change == "compiled":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        else:
            tiny.offload_groups(pipe.transformer, "block_level")
        costs = measure_costs(pipe, call=VIDEO)
        assert costs.grid == video.GRID and [tokens for tokens, _ in costs.measured] == [46, 66, 87, 144]


def test_size_and_prompts_are_arguments_of_the_call() -> None:
    pipe = video.text_pipeline(wan_transformer(in_channels=16, out_channels=16))
    costs = measure_costs(pipe, (96, 128), 24, call={"num_frames": 9})
    assert costs.grid == video.GRID and costs.text_tokens == 24
    assert measure_costs(pipe, (96, 128), 24, call={"num_frames": 5}).grid == (2, 6, 8)


def test_pictures_that_start_late_ask_for_a_preset() -> None:
    for name in LATE:
        with pytest.raises(
            UnsupportedModelError, match=rf"starts from noise, got {name}.*give a preset"
        ):
            jitaccel.apply(GENERATIONS[name].make(), jitaccel.Auto(speedup=6.0))


def test_bare_transformer_asks_for_its_pipeline() -> None:
    with pytest.raises(UnsupportedModelError, match=r"got WanTransformer3DModel; give its pipeline, or a preset"):
        jitaccel.apply(wan_transformer(), jitaccel.Auto(speedup=6.0))


def test_what_the_pipeline_needs_and_does_not_take_is_said() -> None:
    pipe = hunyuan.pipeline(hunyuan.FROM_IMAGES[0])
    with pytest.raises(ConfigError, match=r"TypeError: .*'image'; pass the arguments it needs: Auto\(\.\.\., call="):
        auto_config(pipe, target_speedup=6.0)
    with pytest.raises(ConfigError, match=r"must take the given arguments, got frames, which it does not take"):
        auto_config(video.wan_pipeline(), target_speedup=6.0, call={"frames": 9})
    with pytest.raises(ConfigError, match=r"size must be \(height, width\) in pixels.*got \(0, 8\)"):
        auto_config(video.wan_pipeline(), target_speedup=6.0, size=(0, 8))
    with pytest.raises(ConfigError, match=r"got height, width, which it does not take"):
        auto_config(qwen_pipeline(LAYERED), target_speedup=6.0, size=(64, 64))
    with pytest.raises(ConfigError, match="call must be left out for a FluxPipeline"):
        auto_config(tiny.pipeline(), target_speedup=6.0, call={"num_frames": 9})


def test_scheduler_that_is_not_known_is_refused_before_anything_runs() -> None:
    import diffusers

    with pytest.raises(UnsupportedModelError, match="UniPCMultistepScheduler"):
        auto_config(video.wan_pipeline(diffusers.EulerDiscreteScheduler()), target_speedup=6.0, call=VIDEO)
