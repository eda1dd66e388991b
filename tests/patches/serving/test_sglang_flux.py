"""SGLang's own FLUX.1 against a stand-in with the engine's signatures (tests/support/sglang_native.py)."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jitaccel import ConfigError, NonFiniteVelocityError, UnsupportedModelError
from jitaccel.method.presets import resolve
from jitaccel.patches.serving.settings import asked
from jitaccel.patches.serving.sglang import register
from tests.support import engines, sglang_native, tiny
from tests.support.sglang_network import AttentionBackendEnum

PAPER = '{"preset": "7x-paper", "steps": 9}'
SETTINGS = (
    PAPER,
    "7x",
    "few-steps",
    "dense",
    '{"preset": "4x-paper", "schedule": "native"}',
    '{"preset": "7x", "pooling": [2, 1], "noise": "own", "steps": 7}',
)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that makes the engine's stage for settings, with our hooks on its class."""

    def serve(settings: str, kind: type = sglang_native.DenoisingStage, **server: Any) -> Any:
        monkeypatch.setenv("JITACCEL_CONFIG", settings)
        hooks = engines.install(monkeypatch).hooks
        register()
        hooks.apply_to(monkeypatch, sglang_native.DenoisingStage)
        return sglang_native.served(tiny.pipeline(), stage=kind, **server)

    return serve


def config_of(settings: str) -> Any:
    given = dict(asked({"JITACCEL_CONFIG": settings}) or {})
    return resolve(given.pop("preset"), **given)


@pytest.fixture(scope="module")
def dense() -> Tensor:
    """Returns the engine's own picture of a request, six steps, without jitaccel."""
    return sglang_native.made(sglang_native.served(tiny.pipeline()), sglang_native.request_of())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)])
def test_picture_is_that_of_diffusers(native: Any, settings: str, batch: int, scale: float) -> None:
    stage, request, config = native(settings), sglang_native.request_of(batch, scale), config_of(settings)
    picture = sglang_native.made(stage, request)
    expected = engines.through_diffusers(engines.request_of(batch, scale), config)
    assert tiny.relative_error(picture, expected) < 1e-5
    assert request.counted == config.steps
    assert config.num_stages == 1 or min(each["tokens"] for each in stage.passed) < tiny.NUM_TOKENS
    assert all(each["gate"] is None for each in stage.passed)


def test_pooled_stage_sees_the_smaller_picture_at_its_own_level(native: Any) -> None:
    stage = native("7x")
    sglang_native.made(stage, sglang_native.request_of())
    levels = [float(each["timestep"][0]) for each in stage.passed]
    tokens = [each["tokens"] for each in stage.passed]
    assert tokens == [tiny.NUM_TOKENS // 4] * 6 + [tiny.NUM_TOKENS] * 5
    assert levels[0] == 1000.0 and levels[6] > levels[5]  # the pooled picture is less noisy than the state


def test_steps_of_a_request_count_where_the_settings_leave_them_to_it(native: Any) -> None:
    settings = '{"preset": "7x-paper", "schedule": "native", "steps": "caller"}'
    request = sglang_native.request_of(num_inference_steps=11)
    picture = sglang_native.made(native(settings), request)
    config = config_of(settings).replace(steps=11)
    assert request.counted == 11
    assert tiny.relative_error(picture, engines.through_diffusers(engines.request_of(), config)) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dense_steps_are_the_engines_own_bit_for_bit(native: Any, scale: float) -> None:
    make = functools.partial(sglang_native.request_of, batch=2, scale=scale)
    expected = sglang_native.made(sglang_native.served(tiny.pipeline()), make())
    assert torch.equal(sglang_native.made(native('{"preset": "dense", "steps": 6}'), make()), expected)


@pytest.mark.parametrize("settings", [PAPER, "7x", "few-steps"])
@pytest.mark.parametrize("latents", [torch.bfloat16, torch.float32])
def test_state_keeps_its_dtype_beside_a_network_in_half_precision(
    native: Any, settings: str, latents: torch.dtype
) -> None:
    stage = native(settings)
    stage.transformer.to(torch.bfloat16)
    request = sglang_native.cast(sglang_native.request_of(batch=2, scale=2.0), torch.bfloat16, latents)
    picture = sglang_native.made(stage, request)
    assert picture.dtype == latents and picture.isfinite().all()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a scheduler that draws noise": ({}, {}, "scheduler must not draw noise, got stochastic_sampling"),
    "another scheduler": ({}, {}, "scheduler must be FlowMatchEulerDiscreteScheduler, got Other"),
    "graphs": ({}, {"enable_breakable_cuda_graph": True}, "enable_breakable_cuda_graph must be off, got on"),
    "ComfyUI": ({}, {"comfyui_mode": True}, "comfyui_mode must be off"),
    "sparse attention": ({}, {}, "attention must be dense, got sparge_attn"),
    "cache-dit": ({}, {}, "cache-dit must be off, got on"),
    "progressive resolution": ({"progressive_mode": "dct"}, {}, "progressive_mode must be fullres, got 'dct'"),
    "TeaCache": ({"enable_teacache": True}, {}, "enable_teacache must be False"),
    "Spectrum": ({"enable_spectrum": True}, {}, "enable_spectrum must be False"),
    "reused guidance": ({"cfg_gate_step": 0.5}, {}, "cfg_gate_step must be 1, got 0.5"),
    "rescaled guidance": ({"guidance_rescale": 0.7}, {}, "guidance_rescale must be 0, got 0.7"),
    "normalised guidance": ({"cfg_normalization": 1.0}, {}, "cfg_normalization must be 0, got 1.0"),
    "another policy": ({}, {}, "cfg_policy must be CFGPolicy, got Other"),
    "ControlNet": ({"control": {"controlnet_block_samples": []}}, {}, "got controlnet_block_samples; leave out"),
    "an image": ({"image_latent": torch.zeros(1, 1)}, {}, "image_latent must be None"),
    "rollout": ({"rollout": True}, {}, "rollout must be False"),
    "too few steps": ({"num_inference_steps": 2}, {}, "steps must give every stage at least one step, got 2"),
}


def _changed(name: str, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes a stage in ways that no argument of a request or server can."""
    other = type("Other", (sglang_native.CFGPolicy,), {})
    if name == "a scheduler that draws noise":
        stage.scheduler.register_to_config(stochastic_sampling=True)
    elif name == "another scheduler":
        stage.scheduler = type("Other", (type(stage.scheduler),), {}).from_config(stage.scheduler.config)
    elif name == "sparse attention":
        stage.attn_backend = SimpleNamespace(get_enum=lambda: AttentionBackendEnum.SPARGE_ATTN)
    elif name == "cache-dit":
        stage._cache_dit_enabled = True
    elif name == "another policy":
        monkeypatch.setattr(sglang_native.FluxPipelineConfig, "cfg_policy", other())


def _refused(native: Any, name: str, strict: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, str]:
    given, server, says = REFUSED[name]
    steps = '"caller"' if name == "too few steps" else "9"
    settings = f'{{"preset": "7x-paper", "schedule": "native", "steps": {steps}, "strict": {strict}}}'
    kind = sglang_native.DenoisingStage
    if name == "progressive resolution":
        kind = sglang_native.FluxProgressiveDenoisingStage
    stage = native(settings, kind, **server)
    _changed(name, stage, monkeypatch)
    return stage, sglang_native.request_of(**given), says


@pytest.mark.parametrize("name", REFUSED)
def test_refused_request_runs_dense_as_the_engine_would_and_the_log_says_why(
    native: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, request, says = _refused(native, name, "false", monkeypatch)
    steps = request.num_inference_steps
    sglang_native.made(stage, request)
    assert "jitaccel: SGLang runs this request dense, because " in caplog.text and says in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR
    assert [each["tokens"] for each in stage.passed] == [tiny.NUM_TOKENS] * steps
    assert all(each["gate"] is not None for each in stage.passed)  # the engine's own step


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_raised_with_strict_before_any_forward(
    native: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, request, says = _refused(native, name, "true", monkeypatch)
    with pytest.raises(UnsupportedModelError, match=says):
        sglang_native.made(stage, request)
    assert stage.passed == []


def test_refused_and_warm_up_requests_are_the_engines_bit_for_bit(native: Any, dense: Tensor) -> None:
    stage = native(PAPER)
    assert torch.equal(sglang_native.made(stage, sglang_native.request_of(enable_spectrum=True)), dense)
    assert torch.equal(sglang_native.made(stage, sglang_native.request_of(is_warmup=True)), dense)
    assert not torch.equal(sglang_native.made(stage, sglang_native.request_of()), dense)


def test_request_after_one_that_failed_makes_its_own_picture(native: Any) -> None:
    stage = native(PAPER)
    expected = sglang_native.made(stage, sglang_native.request_of())
    embedder = stage.transformer.inner.x_embedder
    overflows = lambda _, args: (args[0] / 0,)  # noqa: E731
    for broken, error in ((lambda *_: 1 / 0, ZeroDivisionError), (overflows, NonFiniteVelocityError)):
        hook = embedder.register_forward_pre_hook(broken)
        with pytest.raises(error):
            sglang_native.made(stage, sglang_native.request_of())
        hook.remove()
        assert torch.equal(sglang_native.made(stage, sglang_native.request_of()), expected)


def test_another_pipeline_of_the_engine_runs_as_it_is(
    native: Any, dense: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    stage = native(PAPER, pipeline_config=sglang_native.WanPipelineConfig())
    assert "only FLUX.1 of its pipelines is supported, got WanPipelineConfig" in caplog.text
    assert torch.equal(sglang_native.made(stage, sglang_native.request_of()), dense)


def test_stage_says_what_is_accelerated(native: Any, caplog: pytest.LogCaptureFixture) -> None:
    native(PAPER)
    assert "SGLang's FLUX.1 is accelerated" in caplog.text and "densities=(0.32, 0.6, 1.0)" in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"), [("9x", "preset must be one of"), ('{"preset": "7x", "stepz": 3}', "stepz must be a field")]
)
def test_stage_is_not_made_with_settings_that_nothing_can_have(native: Any, settings: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        native(settings)
