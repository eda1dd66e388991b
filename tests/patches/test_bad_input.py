"""What cannot run as asked says so: which argument, the rule, the value, and before the network has run.

The defects of the released code that METHOD.md, section 7, lists are tested here, or where the right behaviour is:
seeds, batches, guidance, VAE flags, printing and undo in diffusers/test_pipeline_*, the nearest map in test_lift.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, ConfigError, JiTConfig, NonFiniteVelocityError, UnsupportedModelError
from tests.support import tiny
from tests.support.pipelines import flux_pipeline, run_pipeline
from tests.support.tiny import SHORT, forwards, generate

LEVELS = jitaccel.noise_levels(PRESETS["7x-paper"])


@contextmanager
def refused(kind: type[Exception], *words: str, model: Any = None) -> Iterator[None]:
    """The block must raise `kind`, its message hold all the words, and `model` not run."""
    with forwards(model) if model is not None else _nothing() as seen, pytest.raises(kind) as raised:
        yield
    message = str(raised.value)
    assert not [word for word in words if word not in message], message
    assert not seen


@contextmanager
def _nothing() -> Iterator[list[list[int]]]:
    yield []


@pytest.fixture
def model() -> Any:
    return tiny.transformer()


@pytest.fixture(params=["pipeline", "transformer"])
def target(request: pytest.FixtureRequest, pipe: Any) -> Any:
    return pipe if request.param == "pipeline" else pipe.transformer


def call(model: Any, state: Tensor | None = None, level: float = 1.0, **arguments: Any) -> Tensor:
    """Calls a bare transformer as a plain sampler does."""
    state = tiny.start() if state is None else state
    settings = {
        "hidden_states": state,
        "encoder_hidden_states": torch.zeros(state.shape[0], tiny.TEXT_TOKENS, tiny.WIDTH),
        "pooled_projections": torch.zeros(state.shape[0], tiny.WIDTH),
        "timestep": torch.full([state.shape[0]], level),
        "img_ids": tiny.ids(),
        "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 3),
        "guidance": torch.full([state.shape[0]], 3.5),
    }
    with torch.no_grad():
        velocity: Tensor = model(**{**settings, **arguments}, return_dict=False)[0]
    return velocity


# Settings


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("7X", {}, ("preset", "4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, dense", "'7X'", 'did you mean "7x"')),
        (7, {}, ("preset", "4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, dense", "got 7")),
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
        ("7x", {"micro_flow": "hitting"}, ("micro_flow must be one of exact, released", "'hitting'", "take one")),
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


# Models, schedulers and pipelines


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


def test_cache_enabled_afterwards_is_refused_at_the_call(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        with refused(
            UnsupportedModelError, "a cache enabled on the transformer", "remove() the handle", model=pipe.transformer
        ):
            generate(pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(generate(pipe), sparse)


# Calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"joint_attention_kwargs": {"attention_mask": torch.ones(1)}}, ("'attention_mask'",)),
    ],
)
def test_arguments_that_are_not_accelerated_are_refused(
    model: Any, arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    with jitaccel.apply(model, "7x"):
        with refused(UnsupportedModelError, *words, "remove() the handle", model=model):
            call(model, **arguments)
        assert call(model).isfinite().all()


def test_unknown_argument_of_a_call_is_not_swallowed(model: Any) -> None:
    with jitaccel.apply(model, "7x"), refused(TypeError, "no_such_argument", model=model):
        call(model, no_such_argument=1)


def test_unknown_argument_of_apply_is_not_swallowed(pipe: Any) -> None:
    with refused(ConfigError, "relaxsteps", 'did you mean "relax_steps"'):
        jitaccel.apply(pipe, "7x", relaxsteps=2)


def test_references_before_generated_tokens_are_refused(model: Any) -> None:
    reference = tiny.ids()
    reference[:, 0] = 1
    state, ids = torch.cat([tiny.start(1), tiny.start(2)], dim=1), torch.cat([reference, tiny.ids()])
    with (
        jitaccel.apply(model, "7x"),
        refused(UnsupportedModelError, "img_ids must list generated tokens", "before references", model=model),
    ):
        call(model, state, img_ids=ids)


@pytest.mark.parametrize(
    "ids",
    [
        tiny.ids((11, 12)),
        tiny.ids((12, 13)),
        tiny.ids((9, 16))[:-1],
        tiny.ids().flip(0),
        tiny.ids() * 2,
        tiny.ids()[[0] * tiny.NUM_TOKENS],
        tiny.ids() + torch.tensor([0.0, 1.0, 0.0]),
    ],
    ids=["rows", "columns", "count", "order", "spread", "equal", "offset"],
)
def test_ids_that_are_not_the_grid_of_the_tokens_are_refused(model: Any, ids: Tensor) -> None:
    words = ("img_ids must be the raster", f"{tiny.NUM_TOKENS} tokens")
    with jitaccel.apply(model, "7x"), refused(ValueError, *words, model=model):
        call(model, img_ids=ids)


def test_ids_of_each_image_must_agree(model: Any) -> None:
    state = torch.cat([tiny.start(1), tiny.start(2)])
    batched = tiny.ids().expand(2, -1, -1).clone()
    with jitaccel.apply(model, "7x"):
        assert call(model, state, img_ids=batched).shape == state.shape
    batched[1] = batched[1].flip(0)
    with jitaccel.apply(model, "7x"), refused(ValueError, "img_ids must be the same for every image", model=model):
        call(model, state, img_ids=batched)


@pytest.mark.parametrize("level", [1000.0, 0.0, -0.1])
def test_timestep_that_is_no_noise_level_is_refused(model: Any, level: float) -> None:
    with (
        jitaccel.apply(model, "7x"),
        refused(ValueError, "timestep must be a noise level in (0, 1]", f"{level:g}", model=model),
    ):
        call(model, level=level)


def test_timesteps_that_differ_between_images_are_refused(model: Any) -> None:
    state = torch.cat([tiny.start(1), tiny.start(2)])
    words = ("timestep must be one noise level", "1.0, 0.5")
    with jitaccel.apply(model, "7x"), refused(UnsupportedModelError, *words, model=model):
        call(model, state, timestep=torch.tensor([1.0, 0.5]))


def test_own_noise_below_level_one_is_refused(model: Any) -> None:
    config = SHORT.replace(noise="own")
    with jitaccel.apply(model, config), refused(ConfigError, 'noise must be "fresh"', "level 0.8", model=model):
        call(model, level=0.8)


def test_grid_too_small_for_the_density_is_refused(model: Any) -> None:
    config = JiTConfig(densities=(0.001, 1.0), boundaries=(0.5, 1.0), steps=4)
    with (
        jitaccel.apply(model, config),
        refused(ConfigError, "num_tokens", "144 tokens", "use 1000 tokens", model=model),
    ):
        call(model)


def breaks_after(model: Any, step: int) -> Any:
    """Makes the network return infinity from that call on; returns the hook."""
    calls = iter(range(1000))

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor | None:
        return output * torch.inf if next(calls) == step else None

    return model.proj_out.register_forward_hook(spoil)


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_velocity_that_is_not_finite_names_the_step(pipe: Any, step: int) -> None:
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        hook = breaks_after(pipe.transformer, step)
        with refused(NonFiniteVelocityError, "velocity must be finite", f"at step {step}", "bfloat16"):
            generate(pipe)
        hook.remove()
        assert torch.equal(generate(pipe), sparse)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("step", [0, 3, 10])
def test_velocity_that_is_not_finite_names_the_step_in_a_loop(model: Any, step: int, given: bool) -> None:
    with jitaccel.apply(model, "7x-paper", noise_levels=LEVELS if given else None):
        hook = breaks_after(model, step)
        with refused(NonFiniteVelocityError, "velocity must be finite", f"at step {step}", "bfloat16"):
            euler(model, LEVELS)
        hook.remove()
        assert euler(model, LEVELS).isfinite().all()


def euler(model: Any, levels: tuple[float, ...]) -> Tensor:
    state = tiny.start()
    for level, next_level in pairwise(levels):
        state = state + (next_level - level) * call(model, state, level)
    return state


# Parts changed behind the patch


def test_scheduler_replaced_after_apply_is_told(pipe: Any) -> None:
    words = ("pipeline.scheduler must be the patched one", "apply again")
    with jitaccel.apply(pipe, SHORT):
        pipe.scheduler = tiny.scheduler()
        with refused(RuntimeError, *words, model=pipe.transformer):
            generate(pipe)


def test_scheduler_replaced_after_an_aborted_generation_is_told(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        with pytest.raises(ZeroDivisionError):
            generate(pipe, callback_on_step_end=lambda *_: 1 / 0)
        pipe.scheduler = tiny.scheduler()
        with refused(RuntimeError, "pipeline.scheduler must be the patched one", model=pipe.transformer):
            generate(pipe)


def test_transformer_replaced_after_apply_is_told(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        pipe.transformer = tiny.transformer(seed=1)
        with refused(
            RuntimeError, "pipeline.transformer must be the patched one", "apply again", model=pipe.transformer
        ):
            generate(pipe)


def test_forward_restored_behind_the_patch_is_told(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        del pipe.transformer.forward
        with refused(RuntimeError, "the patched transformer must run before scheduler.step", "apply again"):
            generate(pipe)


def test_start_that_leaves_a_stage_without_a_step_is_refused(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT), torch.no_grad():
        pipe.scheduler.set_timesteps(5, mu=0.5)
        pipe.scheduler.set_begin_index(3)
        with refused(ConfigError, "every stage at least one step, got 2", "use 3 steps", model=pipe.transformer):
            call(pipe.transformer, level=0.9)


def test_step_without_a_call_of_the_transformer_is_refused(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT), torch.no_grad():
        pipe.scheduler.set_timesteps(5, mu=0.5)
        with refused(RuntimeError, "the patched transformer must run before scheduler.step, got no call at step 0"):
            pipe.scheduler.step(tiny.start(), pipe.scheduler.timesteps[0], tiny.start())


def test_step_taken_by_somebody_else_is_told(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT), torch.no_grad():
        pipe.scheduler.set_timesteps(5, mu=0.5)
        for timestep in pipe.scheduler.timesteps[:2]:
            call(pipe.transformer, level=float(timestep) / 1000)
            type(pipe.scheduler).step(pipe.scheduler, tiny.start(), timestep, tiny.start())
        with refused(
            RuntimeError, "a call of the transformer must be of the scheduler's next step", model=pipe.transformer
        ):
            call(pipe.transformer, level=0.5)


def test_batch_that_changes_within_a_generation_is_refused(pipe: Any) -> None:
    def halve(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"][:1]}

    with jitaccel.apply(pipe, SHORT), refused(RuntimeError, "2 images of 144 tokens", "1 of 144"):
        generate(pipe, (1, 2), prompt=["a", "red"], callback_on_step_end=halve)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guidance_that_is_not_finite_is_named(pipe: Any, value: float) -> None:
    with jitaccel.apply(pipe, SHORT):
        with refused(ConfigError, "guidance must be finite", f"{value:g}", "guidance_scale", model=pipe.transformer):
            generate(pipe, guidance_scale=value)
        assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("steps", [{}, {"steps": "caller"}], ids=["own", "caller's"])
@pytest.mark.parametrize("strength", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("preset", ["7x", "4x-paper"])
def test_late_start_that_leaves_a_stage_no_step_names_the_steps_that_do(
    preset: str, strength: float, steps: dict[str, Any]
) -> None:
    pipe = flux_pipeline("FluxImg2ImgPipeline")
    with jitaccel.apply(pipe, preset, **steps):
        try:
            run_pipeline(pipe, strength=strength)
            return
        except ConfigError as error:
            message = str(error)
    assert f"at strength {strength:g}" in message and "a higher strength" in message
    found = re.search(r"steps=(\d+)\)" if not steps else r"num_inference_steps=(\d+)", message)
    assert found is not None, message
    enough = int(found[1])
    with jitaccel.apply(pipe, preset, **(steps or {"steps": enough})):
        assert run_pipeline(pipe, strength=strength, num_inference_steps=enough).isfinite().all()


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
