"""Calls that cannot run as requested raise an error, before the network runs or at the step that fails."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, JiTConfig, NonFiniteVelocityError, UnsupportedModelError
from tests.support import tiny
from tests.support.pipelines import flux_pipeline, run_pipeline
from tests.support.refusals import LEVELS, call, euler, refused
from tests.support.tiny import SHORT, generate


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
            RuntimeError, "the transformer must be called for the scheduler's next step", model=pipe.transformer
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
