"""Inputs that cannot be accelerated correctly are refused with the reason, or run dense if requested."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from tests.support import tiny
from tests.support.pipelines import flux_pipeline, run_pipeline
from tests.support.subjects import SUBJECTS
from tests.support.tiny import SHORT

LEVELS = jitaccel.noise_levels(SHORT)
SAMPLERS = {
    "Heun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "UniPC": diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    ),
    "DPM++": diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    ),
    "stochastic": tiny.scheduler(stochastic_sampling=True),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_of_another_order_is_refused_or_left_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny.pipeline(scheduler=SAMPLERS[name])
    untouched = {part: {**vars(getattr(pipe, part))} for part in ("transformer", "scheduler")}
    with pytest.raises(UnsupportedModelError, match="its scheduler must"):
        jitaccel.apply(pipe, "7x")
    with caplog.at_level(logging.WARNING, logger="jitaccel"):
        handle = jitaccel.apply(pipe, "7x", on_unsupported="dense")
    assert "runs dense" in caplog.text and "its scheduler must" in handle.stats().notes[0]
    assert handle.stats().execution == "dense" and not handle.is_active
    assert all({**vars(getattr(pipe, part))} == before for part, before in untouched.items())
    handle.remove()


def test_dense_pipeline_of_another_sampler_makes_its_own_picture() -> None:
    pipe = tiny.pipeline(scheduler=SAMPLERS["UniPC"])
    expected = tiny.generate(pipe, num_inference_steps=4)
    with jitaccel.apply(pipe, "7x", on_unsupported="dense"):
        assert torch.equal(tiny.generate(pipe, num_inference_steps=4), expected)


def test_unknown_model_is_left_alone_on_request() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="target must be one of"):
        jitaccel.apply(model)
    with jitaccel.apply(model, on_unsupported="dense") as handle:
        assert "target must be one of" in str(handle.stats()) and [*vars(handle.target)] == [*vars(nn.Linear(2, 2))]


def test_bad_settings_stay_errors() -> None:
    with pytest.raises(ConfigError, match="on_unsupported must be one of error, dense"):
        jitaccel.apply(tiny.pipeline(), on_unsupported="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='on_unsupported must be "error" with strict=True'):
        jitaccel.apply(tiny.pipeline(), on_unsupported="dense", strict=True)
    with pytest.raises(ConfigError, match="densities"):
        jitaccel.apply(tiny.pipeline(), densities=(2.0,), on_unsupported="dense")


UNKNOWN = {"joint_attention_kwargs": {"region_masks": torch.ones(1)}}


def _tolerant(pipe: Any) -> None:
    """Makes the network ignore the tests' arguments."""
    original = type(pipe.transformer).forward

    class Tolerant(type(pipe.transformer)):  # type: ignore[misc]
        def forward(self, *args: Any, joint_attention_kwargs: Any = None, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs)

    pipe.transformer.__class__ = Tolerant


def test_call_of_a_pipeline_is_refused_or_runs_dense_whole(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny.pipeline()
    _tolerant(pipe)
    with (
        jitaccel.apply(pipe, SHORT, steps=8, schedule="native"),
        pytest.raises(UnsupportedModelError, match="region_masks"),
    ):
        tiny.generate(pipe, num_inference_steps=8, **UNKNOWN)
    expected = tiny.generate(pipe, num_inference_steps=8, **UNKNOWN)
    with jitaccel.apply(pipe, SHORT, steps=8, schedule="native", on_unsupported="dense") as handle:
        with caplog.at_level(logging.WARNING, logger="jitaccel"):
            assert torch.equal(tiny.generate(pipe, num_inference_steps=8, **UNKNOWN), expected)
        assert len(caplog.records) == 1 and "region_masks" in caplog.text
        assert any("ran dense" in note for note in handle.stats().notes) and not handle.stats().steps
        sparse = tiny.generate(pipe, num_inference_steps=8)
        assert not torch.equal(sparse, expected) and len(handle.stats().steps) == 8
        assert not any("ran dense" in note for note in handle.stats().notes)


def test_both_branches_of_a_dense_generation_run_dense() -> None:
    pipe = tiny.pipeline()
    _tolerant(pipe)
    guided = {"negative_prompt": "green", "true_cfg_scale": 2.0, "num_inference_steps": 8, **UNKNOWN}
    expected = tiny.generate(pipe, **guided)
    with jitaccel.apply(pipe, SHORT, steps=8, schedule="native", on_unsupported="dense"):
        assert torch.equal(tiny.generate(pipe, **guided), expected)


GUIDERS = {
    "APG": (diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0), "AdaptiveProjectedGuidance"),
    "zero star": (diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=3.0), "ClassifierFreeZeroStarGuidance"),
    "rescaled": (diffusers.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.5), "ClassifierFreeGuidance"),
    "linear": (diffusers.ClassifierFreeGuidance(guidance_scale=3.0), ""),
}


@pytest.mark.parametrize("name", GUIDERS)
@torch.no_grad()
def test_guiders_of_modular_pipelines_must_be_linear(name: str) -> None:
    """A modular pipeline's blocks call the network with their pipeline in a variable `components`."""
    guider, refused = GUIDERS[name]
    subject = SUBJECTS["FLUX.1"]()

    def block(components: Any) -> Tensor:
        return _loop(subject)

    with jitaccel.apply(subject.model, SHORT, noise_levels=LEVELS):
        if refused:
            with pytest.raises(UnsupportedModelError, match=f"a guider that is not linear .{refused}"):
                block(SimpleNamespace(guider=guider))
        else:
            assert torch.equal(block(SimpleNamespace(guider=guider)), _loop(subject))


def _loop(subject: Any, **more: Any) -> Tensor:
    state = tiny.start()
    for level, after in itertools.pairwise(LEVELS):
        velocity = subject.model(
            hidden_states=state, img_ids=subject.ids, timestep=torch.tensor([level]), **subject.arguments, **more,
            return_dict=False,
        )[0]  # fmt: skip
        state = state + (after - level) * velocity
    return state


@torch.no_grad()
def test_calls_of_a_bare_transformer_run_dense_but_not_in_the_midst_of_a_generation() -> None:
    subject = SUBJECTS["FLUX.1"]()
    original = type(subject.model).forward

    class Tolerant(type(subject.model)):  # type: ignore[misc]
        def forward(self, *args: Any, joint_attention_kwargs: Any = None, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs)

    subject.model.__class__ = Tolerant
    expected = _loop(subject)
    with jitaccel.apply(subject.model, SHORT, noise_levels=LEVELS, on_unsupported="dense") as handle:
        assert torch.equal(_loop(subject, **UNKNOWN), expected)
        assert "calls ran dense" in handle.stats().notes[0]
        sparse = _loop(subject)
        assert not torch.equal(sparse, expected) and torch.equal(_loop(subject, **UNKNOWN), expected)
        state = tiny.start()
        call = {"img_ids": subject.ids, "return_dict": False, **subject.arguments}
        subject.model(hidden_states=state, timestep=torch.tensor([LEVELS[0]]), **call)
        with pytest.raises(UnsupportedModelError, match="region_masks"):
            subject.model(hidden_states=state, timestep=torch.tensor([LEVELS[1]]), **call, **UNKNOWN)


def test_dense_in_place_of_what_was_applied_before_takes_that_back() -> None:
    pipe = tiny.pipeline()
    first = jitaccel.apply(pipe, SHORT)
    second = jitaccel.apply(pipe, "4x", controlnet="anchors", on_unsupported="dense")
    assert not first.is_active and "needs a pipeline with a FluxControlNetModel" in second.stats().notes[0]
    assert "set_timesteps" not in vars(pipe.scheduler) and "_diffusers_hook" not in vars(pipe.transformer)


def test_controlnet_on_the_anchors_runs_dense_with_its_transformer_and_by_hand() -> None:
    pipe = flux_pipeline("FluxControlNetPipeline")
    for module in (pipe.transformer, pipe.controlnet):
        original = type(module).forward

        class Tolerant(type(module)):  # type: ignore[misc]
            def forward(self, *args: Any, _own: Any = original, joint_attention_kwargs: Any = None, **more: Any) -> Any:
                return _own(self, *args, **more)

        module.__class__ = Tolerant
    options = {"controlnet": "anchors", "schedule": "native", "steps": 8}
    expected = run_pipeline(pipe, **UNKNOWN)
    with jitaccel.apply(pipe, SHORT, on_unsupported="dense", **options) as handle:  # type: ignore[arg-type]
        assert torch.equal(run_pipeline(pipe, **UNKNOWN), expected)
        assert any("region_masks" in note for note in handle.stats().notes)
    with jitaccel.apply(pipe, SHORT, **options), pytest.raises(UnsupportedModelError, match="region_masks"):  # type: ignore[arg-type]
        run_pipeline(pipe, **UNKNOWN)


@torch.no_grad()
def test_refused_call_leaves_the_generation_of_another_image_alone() -> None:
    subject = SUBJECTS["FLUX.1"]()
    expected, call = None, {"img_ids": subject.ids, "return_dict": False, **subject.arguments}
    with jitaccel.apply(subject.model, SHORT, noise_levels=LEVELS):
        for is_disturbed in (False, True):
            state = tiny.start()
            for level, after in itertools.pairwise(LEVELS):
                velocity = subject.model(hidden_states=state, timestep=torch.tensor([level]), **call)[0]
                if is_disturbed:
                    with pytest.raises(UnsupportedModelError, match="region_masks"):
                        subject.model(hidden_states=tiny.start(5), timestep=torch.tensor([level]), **call, **UNKNOWN)
                state = state + (after - level) * velocity
            expected = state if expected is None else expected
    assert torch.equal(state, expected)
