"""Recording a generation: opt-in, without effect on the picture, and faithful to the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import jitaccel
from jitaccel import PRESETS, ConfigError
from tests.support import tiny
from tests.support.reports import CONFIGS, DENSE, POOLED, recorded
from tests.support.tiny import SHORT, generate
from tests.support.transformer_loop import LEVELS, Loop


@pytest.mark.parametrize("preset", ["dense", "7x", "7x-paper", "few-steps"])
def test_recorded_picture_is_the_same_bit_for_bit(preset: str) -> None:
    pipe = tiny.pipeline()
    config = PRESETS[preset].replace(steps=6) if preset == "dense" else PRESETS[preset]
    with jitaccel.apply(pipe, config) as handle:
        plain = generate(pipe)
        handle.record()
        assert torch.equal(generate(pipe), plain)
        handle.playback(progress=False)
        assert torch.equal(generate(pipe), plain)


def test_recorded_picture_with_true_guidance_is_the_same_bit_for_bit() -> None:
    call: dict[str, Any] = {"negative_prompt": "blue square", "true_cfg_scale": 3.0}
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        plain = generate(pipe, **call)
        assert torch.equal(generate(pipe, **call), plain)
        handle.record()
        assert torch.equal(generate(pipe, **call), plain)


def test_global_random_state_is_untouched_by_a_report(tmp_path: Any) -> None:
    handle, _ = recorded(SHORT)
    before = torch.get_rng_state()
    generate(handle.pipe)
    handle.report(tmp_path / "report.html", progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_kept_unless_asked() -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        generate(pipe)
        history = handle.route.history
        assert history is not None and history.tape is None
        with pytest.raises(ConfigError, match=r"handle\.record\(\)"):
            handle.report("never.html")


def test_record_none_drops_what_was_kept() -> None:
    handle, _ = recorded(SHORT)
    assert handle.route.history.tape is not None
    handle.record(None)
    assert handle.route.history.tape is None
    generate(handle.pipe)
    assert handle.route.history.tape is None


@pytest.mark.parametrize("image", [-1, True, 1.0, "first"])
def test_image_that_is_no_index_is_refused(image: Any) -> None:
    with pytest.raises(ConfigError, match="image must be an index"):
        jitaccel.apply(tiny.pipeline(), SHORT).record(image)


def test_image_beyond_the_batch_is_refused_and_the_pipeline_goes_on() -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        handle.record(1)
        with pytest.raises(ConfigError, match="below the batch of 1, got 1"):
            generate(pipe)
        handle.record(0)
        generate(pipe)
        assert len(handle.playback(progress=False).moments) == SHORT.steps


def test_target_that_runs_untouched_cannot_be_recorded() -> None:
    pipe = tiny.pipeline(scheduler=None)
    handle = jitaccel.apply(pipe, SHORT, on_unsupported="dense")
    with pytest.raises(ConfigError, match="runs dense"):
        handle.record()


@pytest.mark.parametrize("name", CONFIGS)
def test_finished_picture_is_the_pipelines_own(name: str) -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, CONFIGS[name]) as handle:
        handle.record()
        own = generate(pipe, output_type="np")
        found = handle.playback(progress=False)
    assert found.has_true_colours
    _assert_alike(found.final, own)


def _assert_alike(found: Any, own: Any) -> None:
    """Rounding to float16, and to 8 bits, is all that may differ."""
    own = np.asarray(own).reshape(found.shape)
    assert np.abs(found.astype(int) - np.round(255.0 * own)).max() <= 2
    assert own.std() > 0.01


def test_each_prediction_follows_from_the_step_that_the_sampler_took() -> None:
    handle, _ = recorded(DENSE)
    frames = handle.route.history.tape.frames
    states = [*(frame.state for frame in frames), handle.route.history.tape.final]
    assert len(frames) == DENSE.steps
    for frame, after in zip(frames, states[1:], strict=True):
        step, before = frame.step, frame.state.float()
        length = step.noise_level - step.next_level
        velocity = (before - after.float()) / length
        rounding = 0.004 / length  # of float16, by the division
        assert torch.allclose(frame.clean.float(), before - step.noise_level * velocity, atol=rounding)


def test_each_state_is_the_one_that_the_sampler_brings() -> None:
    seen: list[torch.Tensor] = []

    def note(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return {}

    handle, latents = recorded(POOLED, callback_on_step_end=note)
    tape = handle.route.history.tape
    for frame, before in zip(tape.frames[1:], seen, strict=False):
        assert torch.allclose(frame.state.float(), before[0], atol=2e-3)
    assert torch.allclose(tape.final.float(), latents[0], atol=4e-3)


def test_image_of_a_batch_is_the_one_made_alone() -> None:
    batch, _ = recorded(SHORT, image=1, seed=[3, 4], prompt=["a red circle", "blue square"])
    alone, _ = recorded(SHORT, seed=4, prompt="blue square")
    found, expected = (each.playback(progress=False) for each in (batch, alone))
    assert found.image == 1
    for one, other in zip(found.moments, expected.moments, strict=True):
        assert np.abs(one.clean.astype(int) - other.clean).max() <= 2
    tokens = [each.stats.anchors[0][each.image] for each in (found, expected)]
    assert torch.equal(*tokens)


def test_only_the_last_generation_is_kept() -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        handle.record()
        generate(pipe, 1)
        first = handle.playback(progress=False)
        generate(pipe, 2)
        second = handle.playback(progress=False)
    assert len(second.moments) == SHORT.steps
    assert not np.array_equal(first.moments[0].noisy, second.moments[0].noisy)


def test_custom_loop_is_shown_in_false_colours() -> None:
    loop = Loop()
    with jitaccel.apply(loop.model, "7x-paper", noise_levels=LEVELS["7x-paper"]) as handle:
        plain = loop.run(LEVELS["7x-paper"], tiny.start())
        handle.record()
        states = loop.run(LEVELS["7x-paper"], tiny.start())
        found = handle.playback(progress=False)
        with pytest.raises(ConfigError, match="previews='vae'"):
            handle.playback(previews="vae", progress=False)
    assert torch.equal(states[-1], plain[-1])
    assert not found.has_true_colours
    assert len(found.moments) == PRESETS["7x-paper"].steps
    assert found.final.shape == (1, 120, 120, 3)
    assert found.final.std() > 10


@pytest.mark.parametrize(("argument", "value"), [("previews", "fast"), ("frames", 0)])
def test_bad_playback_arguments_are_refused(argument: str, value: Any) -> None:
    handle, _ = recorded(SHORT)
    with pytest.raises(ConfigError, match=argument):
        handle.playback(progress=False, **{argument: value})


@pytest.mark.parametrize(
    ("config", "name"),
    [("7x", "7x"), (PRESETS["7x"].replace(steps=8), "7x, 8 steps"), (SHORT, "custom")],
)
def test_report_calls_a_generation_by_its_preset(config: Any, name: str) -> None:
    handle, _ = recorded(config)
    assert handle.playback(progress=False, previews="colours").name == name
