"""Invalid inputs raise errors that name the argument, the rule and the value, before the network runs.

The defects of the released code listed in METHOD.md, section 7, are tested here or next to the correct behaviour:
seeds, batches, guidance, VAE flags, printing and undo in diffusers/test_pipeline_*, the nearest map in test_lift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from tests.support import tiny
from tests.support.refusals import LEVELS, refused
from tests.support.tiny import SHORT, generate


@pytest.fixture(params=["pipeline", "transformer"])
def target(request: pytest.FixtureRequest, pipe: Any) -> Any:
    return pipe if request.param == "pipeline" else pipe.transformer


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("7X", {}, ("preset", "4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, dense", "'7X'", 'did you mean "7x"')),
        (7, {}, ("preset", "4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, dense", "got 7")),
        ("7x", {"strict": torch.zeros(2)}, ("strict must be True or False", "leave it out for False")),
        ("7x", {"density": (0.5, 1.0)}, ("density", "field of JiTConfig", 'did you mean "densities"')),
        ("7x", {"num_inference_steps": 9}, ("num_inference_steps", "field of JiTConfig", "help(jitaccel.apply)")),
        ("7x", {"densities": (0.6, 0.3, 1.0)}, ("densities must rise strictly", "(0.6, 0.3, 1.0)")),
        ("7x", {"densities": (0.3, 0.6, 0.9)}, ("densities must end in 1.0", "(0.3, 0.6, 0.9)")),
        ("7x", {"densities": (0.0, 0.6, 1.0)}, ("densities must lie in (0, 1]", "(0.0, 0.6, 1.0)")),
        (
            "7x-paper", {"densities": (0.6, 1.0)},
            ("boundaries must be as many as densities", "3 boundaries", "2 densities"),
        ),
        (
            "7x-paper", {"steps": 3},
            ("every stage at least one step", "got 3", "(stages end after 1, 1, 3)", "use 4 steps"),
        ),
        ("4x-paper", {"steps": 2}, ("at least one step", "got 2", "use 4 steps")),
        ("7x", {"steps": 0}, ("steps must be a whole number", "got 0")),
        ("7x", {"micro_flow": "hitting"}, ("micro_flow must be one of exact, released", "'hitting'", "choose one")),
        ("7x", {"lifter": "velocty"}, ("lifter must be one of velocity, clean", 'did you mean "velocity"')),
        ("7x", {"schedule": (1.0, 0.5, 0.6, 0.0), "steps": 3}, ("schedule must fall strictly", "0.6")),
    ],
)  # fmt: skip
def test_bad_settings_are_named(target: Any, preset: Any, overrides: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(ConfigError, *words):
        jitaccel.apply(target, preset, **overrides)
    assert "forward" not in vars(getattr(target, "transformer", target))


def test_every_problem_is_told_at_once(pipe: Any) -> None:
    with refused(ConfigError, "densities must rise strictly", "relax_steps must be a whole number", "steps must be"):
        jitaccel.apply(pipe, "7x", densities=(0.6, 0.3, 1.0), relax_steps=0, steps=-1)


def test_stage_without_a_step_is_refused_when_the_caller_sets_the_steps(pipe: Any) -> None:
    with jitaccel.apply(pipe, "7x-paper", steps="caller"):
        before = pipe.scheduler.sigmas, pipe.scheduler.timesteps
        with refused(ConfigError, "steps must give every stage", "got 3", "use 4 steps", model=pipe.transformer):
            generate(pipe, num_inference_steps=3)
        assert (pipe.scheduler.sigmas, pipe.scheduler.timesteps) == before
        assert generate(pipe, num_inference_steps=4).isfinite().all()


def test_sigmas_of_the_call_beside_those_of_the_configuration_are_refused(pipe: Any) -> None:
    settings: list[dict[str, Any]] = [{}, {"schedule": "native"}]
    for overrides in settings:
        with jitaccel.apply(pipe, SHORT, **overrides):
            with refused(
                ConfigError, "sigmas in the call", "schedule='native', steps='caller'", model=pipe.transformer
            ):
                generate(pipe, num_inference_steps=3, sigmas=[1.0, 0.6, 0.3])
            assert generate(pipe).isfinite().all()


def test_noise_levels_are_refused_for_a_pipeline(pipe: Any) -> None:
    with refused(ConfigError, "noise_levels must be left out for a pipeline", "schedule="):
        jitaccel.apply(pipe, "7x", noise_levels=LEVELS)


@pytest.mark.parametrize(
    "levels",
    [(), (0.0,), (1.0, 0.5), (1.0, 0.5, 0.5, 0.0), (0.2, 0.5, 0.0), (1000.0, 500.0, 0.0), (1.0, float("nan"), 0.0)],
)
def test_noise_levels_must_fall_from_one_to_zero(model: Any, levels: tuple[float, ...]) -> None:
    with refused(ConfigError, "noise_levels must fall strictly", str(levels), "not timesteps"):
        jitaccel.apply(model, "7x", noise_levels=levels)


def test_noise_levels_of_too_few_steps_name_the_smallest_that_works(model: Any) -> None:
    with refused(ConfigError, "got 3", "use 4 steps"):
        jitaccel.apply(model, "7x-paper", noise_levels=(1.0, 0.6, 0.3, 0.0))


@pytest.mark.parametrize("overrides", [{"schedule": "native"}, {"steps": "caller"}])
def test_bare_transformer_needs_levels_where_the_configuration_has_none(model: Any, overrides: dict[str, Any]) -> None:
    with refused(ConfigError, "noise_levels must be given for a bare transformer", "got None"):
        jitaccel.apply(model, "7x", **overrides)


@pytest.mark.parametrize("thing", [None, 7, "pipe", object(), {"transformer": None}])
def test_what_is_no_network_is_refused(thing: Any) -> None:
    with refused(ConfigError, "apply: target must be a loaded pipeline or network", repr(thing), "from_pretrained"):
        jitaccel.apply(thing)


def test_other_networks_are_refused() -> None:
    words = ("target must be one of", "FluxPipeline", "FluxTransformer2DModel", "Linear")
    with refused(UnsupportedModelError, *words):
        jitaccel.apply(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("part", ["vae", "scheduler", "text_encoder"])
def test_other_parts_of_a_pipeline_are_refused(pipe: Any, part: str) -> None:
    with refused(UnsupportedModelError, "target must be one of", type(getattr(pipe, part)).__name__):
        jitaccel.apply(getattr(pipe, part))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler"),
        (lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "UniPC"),
        (lambda: diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
        (lambda: tiny.scheduler(stochastic_sampling=True), "stochastic_sampling=False"),
        (lambda: tiny.scheduler(invert_sigmas=True), "invert_sigmas=False"),
    ],
    ids=["heun", "unipc", "euler", "stochastic", "inverted"],
)
def test_scheduler_that_is_not_first_order_euler_is_refused(make: Callable[[], Any], name: str) -> None:
    pipe = tiny.pipeline(scheduler=make())
    before = dict(vars(pipe.transformer)), dict(vars(pipe.scheduler))
    with refused(UnsupportedModelError, "scheduler must", name):
        jitaccel.apply(pipe)
    assert (vars(pipe.transformer), vars(pipe.scheduler)) == before


def test_other_pipelines_are_refused() -> None:
    other = diffusers.DDPMPipeline(unet=torch.nn.Linear(2, 2), scheduler=diffusers.DDPMScheduler())
    with refused(UnsupportedModelError, "pipeline must be one of FluxPipeline", "ChromaPipeline", "DDPMPipeline"):
        jitaccel.apply(other)


def test_pipeline_without_a_transformer_is_refused() -> None:
    with refused(UnsupportedModelError, "transformer must be a FluxTransformer2DModel", "got NoneType"):
        jitaccel.apply(tiny.pipeline(transformer=None))


def test_pipeline_with_another_transformer_is_refused() -> None:
    other = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_hidden_dim=16, approximator_num_channels=8,
    )  # fmt: skip
    with refused(UnsupportedModelError, "must be a FluxTransformer2DModel", "ChromaTransformer2DModel"):
        jitaccel.apply(tiny.pipeline(transformer=other))


def test_cache_enabled_before_is_refused(target: Any) -> None:
    transformer = getattr(target, "transformer", target)
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with refused(UnsupportedModelError, "must have no cache", "disable_cache()"):
        jitaccel.apply(target)
    transformer.disable_cache()
    jitaccel.apply(target).remove()


def test_unknown_argument_of_apply_is_not_swallowed(pipe: Any) -> None:
    with refused(ConfigError, "relaxsteps", 'did you mean "relax_steps"'):
        jitaccel.apply(pipe, "7x", relaxsteps=2)


def test_torch_in_a_folder_with_spaces_is_refused_before_anything_is_compiled(
    pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__file__", "/opt/my apps/torch/__init__.py")
    with refused(ConfigError, "torch must lie in a folder without spaces", "/opt/my apps/torch", "torchscript"):
        jitaccel.export(pipe, tmp_path / "a", SHORT, size=(48, 48))
    assert not [*tmp_path.iterdir()]


def test_speed_for_a_size_that_the_model_was_not_made_for_must_be_asked_for(pipe: Any) -> None:
    with refused(ConfigError, "size must be given", "256 pixels", "made for 32", model=pipe.transformer):
        jitaccel.apply(pipe, jitaccel.Auto(speedup=2))
