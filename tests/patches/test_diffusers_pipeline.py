"""`jitaccel.apply` on a diffusers FluxPipeline: what it computes, and that it leaves no trace."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers import transformer_flux
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig
from jitaccel.patches.flux.flops import flux_flops
from tests.support import reference, tiny
from tests.support.tiny import DENSE, GRID, SHORT, forwards, generate, relative_error

GUIDED: dict[str, Any] = {"negative_prompt": "blue square", "true_cfg_scale": 3.0}


def velocity_of(pipe: Any, prompt: str = "a red circle", scale: float = 1.0, grid: tuple[int, int] = GRID) -> Any:
    """Returns the network as the reference calls it: one image, guided by `GUIDED` where `scale` is above 1."""
    text = [prompt] if scale == 1.0 else [prompt, GUIDED["negative_prompt"]]
    encoded = [pipe.encode_prompt(each, None, max_sequence_length=tiny.TEXT_TOKENS) for each in text]
    positions = tiny.ids(grid)

    def run(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        branches = [
            pipe.transformer(
                hidden_states=tokens,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([level * 1000.0]) / 1000.0,
                img_ids=positions[anchors],
                txt_ids=text_ids,
                guidance=torch.tensor([3.5]),
                return_dict=False,
            )[0]
            for embeds, pooled, text_ids in encoded
        ]
        guided: Tensor = branches[0]
        return guided if scale == 1.0 else branches[1] + scale * (branches[0] - branches[1])

    return run


def expected(pipe: Any, config: JiTConfig, seed: int = 0, grid: tuple[int, int] = GRID, **kwargs: Any) -> Tensor:
    """Returns what an unpatched pipeline's network gives through the reference."""
    edit = kwargs.pop("edit", lambda state: state)
    levels = jitaccel.noise_levels(config)
    with torch.no_grad():
        network = velocity_of(pipe, grid=grid, **kwargs)
        return reference.denoise(network, config, grid, noise_of(pipe, seed, grid), levels, edit=edit).states[-1]


def noise_of(pipe: Any, seed: int, grid: tuple[int, int] = GRID) -> Tensor:
    """Returns the packed noise that the pipeline draws from the seed."""
    height, width = (2 * side for side in grid)
    noise = torch.randn(1, tiny.CHANNELS // 4, height, width, generator=torch.Generator().manual_seed(seed))
    packed: Tensor = FluxPipeline._pack_latents(noise, 1, tiny.CHANNELS // 4, height, width)
    return packed


def attributes(pipe: Any) -> dict[str, Any]:
    """Returns every attribute of the pipeline's parts and of all modules in them, by name."""
    parts: dict[str, Any] = {"pipe": pipe, "scheduler": pipe.scheduler}
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        parts |= {f"{name}.{path}": module for path, module in getattr(pipe, name).named_modules()}
    return {f"{part}:{name}": value for part, owner in parts.items() for name, value in vars(owner).items()}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    missing = object()
    return [k for k in before.keys() | after.keys() if before.get(k, missing) is not after.get(k, missing)]


def signatures(pipe: Any) -> list[inspect.Signature]:
    methods = (pipe.transformer.forward, pipe.scheduler.set_timesteps, pipe.scheduler.step, pipe.__call__)
    return [inspect.signature(method) for method in methods]


@pytest.fixture(autouse=True)
def nothing_global_changes() -> Iterator[None]:
    """No test here may leave a class or module of diffusers, or torch's switches, other than it found them."""
    owners = (
        FluxPipeline,
        FluxTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
        HookRegistry,
        ModelHook,
        diffusers,
        transformer_flux,
    )
    before = [dict(vars(owner)) for owner in owners]
    switches = torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.get_num_threads()
    yield
    for owner, attributes_before in zip(owners, before, strict=True):
        now = {name: value for name, value in vars(owner).items() if name in attributes_before}
        assert not changed(attributes_before, now), owner
    assert switches == (
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


# What it computes


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["7x"],
        PRESETS["4x"],
        PRESETS["7x-paper"],
        PRESETS["4x-paper"],
        SHORT,
        SHORT.replace(micro_flow="none"),
        SHORT.replace(noise="own", lifter="clean"),
        SHORT.replace(micro_flow="none", lifter="clean"),
        SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0)),
    ],
    ids=["7x", "4x", "7x-paper", "4x-paper", "exact", "none", "own-clean", "clean-none", "two-stages"],
)
def test_result_is_the_methods(pipe: Any, config: JiTConfig) -> None:
    target = expected(pipe, config)
    with jitaccel.apply(pipe, config):
        assert relative_error(generate(pipe), target) < 1e-5


def test_result_differs_from_the_dense_one(pipe: Any) -> None:
    dense = generate(pipe, sigmas=None, num_inference_steps=PRESETS["7x"].steps)
    with jitaccel.apply(pipe, "7x"):
        assert relative_error(generate(pipe), dense) > 1e-2


@pytest.mark.parametrize("grid", [(8, 24), (24, 8), (5, 7)])
def test_grid_may_have_any_aspect_ratio(pipe: Any, grid: tuple[int, int]) -> None:
    target = expected(pipe, SHORT, grid=grid)
    with jitaccel.apply(pipe, SHORT) as handle:
        assert relative_error(generate(pipe, grid=grid), target) < 1e-5
    assert handle.stats().grid == grid


def in_bfloat16(pipe: Any) -> Any:
    """Returns a copy, because parts are shared between tests."""
    parts: dict[str, Any] = {k: part for k, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return tiny.pipeline(**copy.deepcopy(parts)).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_density_one_is_the_unpatched_pipeline_bit_for_bit(pipe: Any, dtype: torch.dtype) -> None:
    calls: list[dict[str, Any]] = [
        {},
        GUIDED,
        {"seed": (3, 4), "prompt": ["a red circle", "blue square"]},
        {"seed": (3, 4), "num_images_per_prompt": 2, **GUIDED},
        {"grid": (6, 9)},
    ]
    if dtype == torch.bfloat16:
        pipe = in_bfloat16(pipe)
    plain = [generate(pipe, num_inference_steps=5, **call) for call in calls]
    with jitaccel.apply(pipe, DENSE) as handle:
        for call, image in zip(calls, plain, strict=True):
            assert torch.equal(generate(pipe, num_inference_steps=5, **call), image)
        assert handle.stats().dense_steps == 5


def test_density_one_at_every_stage_is_the_unpatched_pipeline_bit_for_bit(pipe: Any) -> None:
    # Densities rise strictly, and yet all of these give every token: three stages, two boundaries, no sparse step.
    stages = JiTConfig(
        densities=(1.0 - 2e-12, 1.0 - 1e-12, 1.0),
        boundaries=(0.3, 0.6, 1.0),
        steps="caller",
        schedule="native",
        micro_flow="exact",
    )
    plain = generate(pipe, num_inference_steps=6, **GUIDED)
    with jitaccel.apply(pipe, stages) as handle:
        assert torch.equal(generate(pipe, num_inference_steps=6, **GUIDED), plain)
        assert [step.stage for step in handle.stats().steps] == [0, 1, 1, 2, 2, 2]


def test_decoded_picture_and_the_autoencoders_flags_are_the_users(pipe: Any) -> None:
    flags = pipe.vae.use_tiling, pipe.vae.use_slicing
    assert flags == (False, False)
    plain = pipe("a red circle", height=48, width=48, num_inference_steps=2, output_type="pt", return_dict=False)
    with jitaccel.apply(pipe, DENSE):
        assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == flags
        image = generate(pipe, num_inference_steps=2, output_type="pt")
        assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == flags
    assert image.shape == plain[0].shape
    assert torch.equal(image, generate(pipe, num_inference_steps=2, output_type="pt"))


def test_anchors_alone_enter_the_network(pipe: Any) -> None:
    config = SHORT
    counts = config.token_counts(tiny.NUM_TOKENS)
    with jitaccel.apply(pipe, config, execution="indexed"), forwards(pipe.transformer) as seen:
        generate(pipe)
    assert [len(tokens) for tokens in seen] == [counts[0]] * 2 + [counts[1]] + [counts[2]] * 2
    assert all(set(a) <= set(b) for a, b in pairwise(seen))
    assert all(tokens == sorted(tokens) for tokens in seen)


@pytest.mark.parametrize("call", [{}, GUIDED], ids=["plain", "guided"])
def test_image_of_a_batch_is_the_image_alone(pipe: Any, call: dict[str, Any]) -> None:
    prompts, seeds = ["a red circle", "blue square", "green"], (5, 6, 7)
    call = {key: [value] * 3 if key == "negative_prompt" else value for key, value in call.items()}
    branches = 2 if call else 1
    with jitaccel.apply(pipe, SHORT, execution="indexed"), forwards(pipe.transformer) as seen:
        together = generate(pipe, seeds, prompt=prompts, **call)
        batched, seen[:] = list(seen), []
        for image, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            one = {key: value[:1] if key == "negative_prompt" else value for key, value in call.items()}
            alone = generate(pipe, (seed,), prompt=[prompt], **one)
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-5, atol=1e-5)
            sparse = 3 * branches  # the last two steps are dense, and run as one batch
            assert seen[:sparse] == [batched[3 * call_ + image] for call_ in range(sparse)]
            seen.clear()


def test_images_that_start_from_one_noise_are_the_images_alone(pipe: Any) -> None:
    prompts = ["a red circle", "blue square"]
    with jitaccel.apply(pipe, SHORT, execution="indexed"), forwards(pipe.transformer) as seen:
        together = generate(pipe, (5, 5), prompt=prompts)
        assert len(seen) < 2 * 2 + 2 + 2  # one batch as long as anchors are the same
        for image in range(2):
            alone = generate(pipe, (5,), prompt=prompts[image])
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-5, atol=1e-5)


def test_images_of_a_batch_have_anchors_of_their_own(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, execution="indexed"), forwards(pipe.transformer) as seen:
        generate(pipe, (1, 2), prompt=["a red circle"] * 2)
    assert seen[0] != seen[1] and len(seen[0]) == len(seen[1])


def test_several_images_of_a_prompt_are_the_images_alone(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        together = generate(pipe, (5, 6), num_images_per_prompt=2)
        for image, seed in enumerate((5, 6)):
            alone = generate(pipe, (seed,))
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-5, atol=1e-5)


def test_guided_branches_share_anchors_and_are_lifted_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lifted: list[int] = []
    lift = jitaccel.method.lift.lift

    def counting(values: Tensor, plan: Any) -> Tensor:
        lifted.append(values.shape[1])
        return lift(values, plan)

    monkeypatch.setattr("jitaccel.method.lift.lift", counting)
    with jitaccel.apply(pipe, SHORT, execution="indexed") as handle, forwards(pipe.transformer) as seen:
        generate(pipe, **GUIDED)
    counts = SHORT.token_counts(tiny.NUM_TOKENS)
    assert lifted == [counts[0]] * 2 + [counts[1]] + [counts[2]] * 2
    assert seen[0::2] == seen[1::2] and len(seen) == 10
    assert [step.calls for step in handle.stats().steps] == [2] * 5


@pytest.mark.parametrize("config", [SHORT, PRESETS["7x-paper"], PRESETS["7x"]], ids=["exact", "7x-paper", "7x"])
def test_importance_and_target_come_from_the_guided_velocity(pipe: Any, config: JiTConfig) -> None:
    target = expected(pipe, config, scale=GUIDED["true_cfg_scale"])
    with jitaccel.apply(pipe, config):
        assert relative_error(generate(pipe, **GUIDED), target) < 1e-4


def test_same_generator_gives_the_same_image_and_the_global_state_stays(pipe: Any) -> None:
    images = []
    with jitaccel.apply(pipe, "7x"):
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index] # noqa: NPY002
            images.append(generate(pipe))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index] # noqa: NPY002
            assert random.getstate() == before[2]
        assert torch.equal(images[0], images[1])
        assert not torch.equal(generate(pipe, seed=9), images[0])


def test_inference_mode_gives_the_same_image(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        plain = generate(pipe)
        with torch.inference_mode():
            assert torch.equal(generate(pipe), plain)
        assert torch.equal(generate(pipe), plain)


def test_model_without_embedded_guidance_runs() -> None:
    pipe = tiny.pipeline(transformer=tiny.transformer(guidance_embeds=False))
    with jitaccel.apply(pipe, SHORT):
        together = generate(pipe, (1, 2), prompt=["a", "red"])
        torch.testing.assert_close(together[1:], generate(pipe, (2,), prompt=["red"]), rtol=1e-5, atol=1e-5)


def test_bfloat16_runs_throughout(pipe: Any) -> None:
    half = in_bfloat16(pipe)
    with jitaccel.apply(half, SHORT):
        image = generate(half)
        assert image.dtype == torch.bfloat16 and image.isfinite().all()
        assert torch.equal(generate(half), image)


def test_both_kinds_of_return_value_hold_the_same_image(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        call = {"prompt": "a red circle", "height": 48, "width": 48, "max_sequence_length": tiny.TEXT_TOKENS}
        call["output_type"] = "latent"
        output = pipe(**call, generator=torch.Generator().manual_seed(0))
        assert type(output).__name__ == "FluxPipelineOutput"
        assert torch.equal(output.images, generate(pipe))


@pytest.mark.parametrize("return_dict", [True, False])
def test_scheduler_and_transformer_return_what_the_caller_asks_for(pipe: Any, return_dict: bool) -> None:
    target = expected(pipe, SHORT)
    state = noise_of(pipe, 0)
    embeds, pooled, text_ids = pipe.encode_prompt("a red circle", None, max_sequence_length=tiny.TEXT_TOKENS)
    with jitaccel.apply(pipe, SHORT), torch.no_grad():
        pipe.scheduler.set_timesteps(5, mu=0.5)
        for timestep in pipe.scheduler.timesteps:
            output = pipe.transformer(
                state, embeds, pooled, timestep.expand(1) / 1000, tiny.ids(), text_ids, torch.tensor([3.5]),
                return_dict=return_dict,
            )  # fmt: skip
            velocity = output.sample if return_dict else output[0]
            output = pipe.scheduler.step(velocity, timestep, state, return_dict=return_dict)
            state = output.prev_sample if return_dict else output[0]
    assert relative_error(state, target) < 1e-5


def test_callback_that_copies_the_state_changes_nothing(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT):
        plain = generate(pipe)
        copied = generate(pipe, callback_on_step_end=lambda *args: {"latents": args[3]["latents"].clone()})
    assert torch.equal(copied, plain)


@pytest.mark.parametrize("in_place", [False, True])
def test_callback_that_edits_the_state_is_honoured(pipe: Any, in_place: bool) -> None:
    def edit(state: Tensor) -> Tensor:
        return state.add_(0.25) if in_place else state + 0.25

    def callback(_pipe: Any, _step: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        edited = edit(tensors["latents"])
        return {} if in_place else {"latents": edited}

    target = expected(pipe, SHORT, edit=lambda state: state + 0.25)
    with jitaccel.apply(pipe, SHORT):
        assert relative_error(generate(pipe, callback_on_step_end=callback), target) < 1e-5


def test_callers_noise_is_not_written(pipe: Any) -> None:
    latents = tiny.start()
    copy = latents.clone()
    with jitaccel.apply(pipe, SHORT.replace(noise="own")):
        generate(pipe, latents=latents)
    assert torch.equal(latents, copy)


# Steps and levels


@pytest.mark.parametrize(
    ("overrides", "asked", "steps"),
    [({}, 50, 11), ({"steps": 14}, 50, 14), ({"steps": "caller"}, 9, 9), ({"steps": 9, "schedule": "native"}, 28, 9)],
)
def test_number_of_steps_is_the_configurations_or_the_callers(
    pipe: Any, overrides: dict[str, Any], asked: int, steps: int
) -> None:
    config = PRESETS["7x-paper"].replace(**overrides)
    with jitaccel.apply(pipe, config, execution="indexed") as handle, forwards(pipe.transformer) as seen:
        calls: list[int] = []
        generate(pipe, num_inference_steps=asked, callback_on_step_end=lambda _, i, *__: calls.append(i) or {})  # type: ignore[func-returns-value]
        assert calls == list(range(steps)) and len(seen) == steps
        assert pipe.num_timesteps == steps
    notes = handle.stats().notes
    assert bool(notes) == (asked != steps)
    assert all(f"decides on {steps} steps; the pipeline asked for {asked}" in note for note in notes)


def test_native_levels_are_the_schedulers_own_for_that_number_of_steps(pipe: Any) -> None:
    with jitaccel.apply(pipe, "7x", schedule="native", steps=9) as handle:
        generate(pipe, num_inference_steps=28)
        levels = [step.noise_level for step in handle.stats().steps]
    generate(pipe, num_inference_steps=9)
    assert levels == pipe.scheduler.sigmas[:-1].tolist()


def test_explicit_levels_are_used(pipe: Any) -> None:
    levels = (1.0, 0.9, 0.6, 0.25, 0.0)
    seen: list[float] = []
    with jitaccel.apply(pipe, SHORT, schedule=levels, steps=4) as handle:
        generate(pipe, callback_on_step_end=lambda _, __, t, ___: seen.append(float(t) / 1000) or {})  # type: ignore[func-returns-value]
        assert seen == pytest.approx(levels[:-1])
        assert [step.next_level for step in handle.stats().steps] == list(levels[1:])


def test_custom_sigmas_of_the_call_are_kept_with_native_levels(pipe: Any) -> None:
    sigmas = [1.0, 0.8, 0.5, 0.2]
    plain = generate(pipe, num_inference_steps=4, sigmas=sigmas)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, num_inference_steps=4, sigmas=sigmas), plain)


def test_statistics_say_what_ran(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle:
        assert handle.stats().steps == () and handle.stats().generations == 0
        generate(pipe, (1, 2), prompt=["a", "red"], negative_prompt=["", ""], true_cfg_scale=2.0)
        stats = handle.stats()
    counts = SHORT.token_counts(tiny.NUM_TOKENS)
    tokens = [counts[0]] * 2 + [counts[1]] + [counts[2]] * 2
    assert [step.tokens for step in stats.steps] == tokens and stats.token_steps == sum(tokens)
    cost = functools.partial(flux_flops, pipe.transformer.config)
    assert [step.flops for step in stats.steps] == [2 * 2 * cost(n, tiny.TEXT_TOKENS) for n in tokens]
    assert stats.flops == sum(step.flops for step in stats.steps)
    assert stats.dense_step_flops == 2 * cost(tiny.NUM_TOKENS, tiny.TEXT_TOKENS)
    assert stats.dense_steps == pytest.approx(stats.flops / stats.dense_step_flops)
    assert (stats.batch, stats.grid, stats.text_tokens) == (2, GRID, tiny.TEXT_TOKENS)
    assert (stats.generations, stats.codebase, stats.execution) == (1, "diffusers FluxPipeline", "packed")
    assert len(stats.stage_seconds) == 3
    assert sum(stats.stage_seconds) == pytest.approx(stats.network_s + stats.outside_s)
    assert all(step.network_s > 0 and step.outside_s > 0 for step in stats.steps)
    assert "batch 2, grid 12x12, 8 text tokens" in str(stats)


def test_statistics_outlive_the_handle(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle:
        generate(pipe)
    assert handle.stats().generations == 1 and len(handle.stats().steps) == 5


def test_nothing_is_printed(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with jitaccel.apply(pipe, "7x"):
        generate(pipe)
    assert capfd.readouterr() == ("", "")


def test_steps_asked_for_and_not_taken_are_logged(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with jitaccel.apply(pipe, SHORT), caplog.at_level(logging.INFO, "jitaccel"):
        generate(pipe)
        generate(pipe, num_inference_steps=6)
        generate(pipe, num_inference_steps=5)
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert "decides on 5 steps; the pipeline asked for 6" in caplog.text


# What it leaves


@pytest.mark.parametrize("has_run", [False, True])
def test_remove_restores_everything(pipe: Any, has_run: bool) -> None:
    if has_run:
        generate(pipe, num_inference_steps=2)
    fresh = generate(tiny.pipeline(), num_inference_steps=4)
    before, keys, called = attributes(pipe), list(pipe.transformer.state_dict()), signatures(pipe)
    handle = jitaccel.apply(pipe, "7x")
    assert handle.is_active and changed(before, attributes(pipe))
    assert list(pipe.transformer.state_dict()) == keys
    assert signatures(pipe) == called
    for name in ("FluxTransformer2DModel hook 'jitaccel'", "Scheduler.set_timesteps", "Scheduler.step"):
        assert name in repr(handle)
    assert not changed(attributes(pipe), {**attributes(pipe)})
    generate(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    handle.remove()
    ran = {"pipe:_guidance_scale", "pipe:_num_timesteps", "pipe:_current_timestep", "pipe:_interrupt"}
    ran |= {"pipe:_joint_attention_kwargs"}
    assert set(changed(before, attributes(pipe))) <= ran
    assert list(pipe.transformer.state_dict()) == keys
    assert signatures(pipe) == called
    assert not handle.is_active and "removed" in repr(handle)
    assert torch.equal(generate(pipe, num_inference_steps=4), fresh)
    handle.remove()
    assert torch.equal(generate(pipe, num_inference_steps=4), fresh)


def test_remove_without_a_generation_restores_everything(pipe: Any) -> None:
    before = attributes(pipe)
    jitaccel.apply(pipe, "7x").remove()
    assert not changed(before, attributes(pipe))


class Breaks(RuntimeError):
    pass


class BreakingScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Fails at a step, when told to."""

    breaks_at = -1

    def step(self, *args: Any, **kwargs: Any) -> Any:
        if (self.step_index or 0) == self.breaks_at:
            raise Breaks
        return super().step(*args, **kwargs)


def abort(pipe: Any, where: str, step: int) -> None:
    """Runs a generation that fails at a step in one of three places."""
    calls = iter(range(100))

    def fail(*_: Any) -> dict[str, Any]:
        if next(calls) == step:
            raise Breaks
        return {}

    if where == "scheduler":
        pipe.scheduler.breaks_at = step
    hook = None
    if where == "transformer":
        hook = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: fail() or None)
    with pytest.raises(Breaks):
        generate(pipe, seed=3, callback_on_step_end=fail if where == "callback" else None)
    if hook is not None:
        hook.remove()
    if where == "scheduler":
        del pipe.scheduler.breaks_at


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("where", ["callback", "transformer", "scheduler"])
def test_exception_inside_a_generation_leaves_no_trace(where: str, step: int) -> None:
    pipe = tiny.pipeline(scheduler=BreakingScheduler(use_dynamic_shifting=True, shift=3.0))
    plain = generate(pipe, num_inference_steps=4)
    before, called = attributes(pipe), signatures(pipe)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
    with jitaccel.apply(pipe, SHORT):
        abort(pipe, where, step)
        assert torch.equal(generate(pipe), sparse)
        abort(pipe, where, step)
        small = generate(pipe, (1, 2), grid=(6, 8), prompt=["a", "red"])
        assert small.isfinite().all()
        assert torch.equal(generate(pipe), sparse)
        abort(pipe, where, step)
    names = {name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")}
    assert not names
    assert signatures(pipe) == called
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_network_called_by_hand_after_an_aborted_generation_is_dense(pipe: Any) -> None:
    embeds, pooled, text_ids = pipe.encode_prompt("a red circle", None, max_sequence_length=tiny.TEXT_TOKENS)

    def call() -> Tensor:
        with torch.no_grad():
            velocity: Tensor = pipe.transformer(
                tiny.start(), embeds, pooled, torch.ones(1), tiny.ids(), text_ids, torch.ones(1), return_dict=False
            )[0]
        return velocity

    plain = call()
    with jitaccel.apply(pipe, SHORT):
        abort(pipe, "callback", 1)
        assert torch.equal(call(), plain)
        assert generate(pipe).isfinite().all()
        assert torch.equal(call(), plain)
        pipe.scheduler.set_timesteps(5, mu=0.5)  # a loop by hand, which fails
        assert not torch.equal(call(), plain)
        hook = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call()
        hook.remove()
        assert torch.equal(call(), plain)


def test_context_manager_removes_after_an_exception(pipe: Any) -> None:
    before = attributes(pipe)
    with pytest.raises(Breaks), jitaccel.apply(pipe, SHORT):
        raise Breaks
    assert not changed(before, attributes(pipe))


def test_remove_inside_a_generation_leaves_the_rest_dense(pipe: Any) -> None:
    plain = generate(pipe, num_inference_steps=5)
    for config in (DENSE, SHORT):
        handle = jitaccel.apply(pipe, config, execution="indexed")

        def remove(_: Any, step: int, *__: Any, handle: jitaccel.Handle = handle) -> dict[str, Any]:
            if step == 1:
                handle.remove()
            return {}

        with forwards(pipe.transformer) as seen:
            image = generate(pipe, num_inference_steps=5, callback_on_step_end=remove)
        assert image.isfinite().all() and torch.equal(image, plain) == (config is DENSE)
        assert [len(tokens) for tokens in seen[2:]] == [tiny.NUM_TOKENS] * 3
        assert torch.equal(generate(pipe, num_inference_steps=5), plain)


def test_remove_inside_another_pipelines_generation_leaves_it_alone(pipe: Any) -> None:
    other = sharing(pipe, scheduler=True)
    plain = generate(other, num_inference_steps=5)
    handle = jitaccel.apply(pipe, SHORT)
    generate(pipe)
    removed = generate(other, num_inference_steps=5, callback_on_step_end=lambda *_: handle.remove() or {})  # type: ignore[func-returns-value]
    assert torch.equal(removed, plain)
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_pipeline_may_apply_to_itself(pipe: Any) -> None:
    class Fast(FluxPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with jitaccel.apply(self, SHORT):
                return super().__call__(*args, **kwargs)

    fast = Fast(**{**pipe.components, "scheduler": tiny.scheduler()})
    fast.set_progress_bar_config(disable=True)
    before = attributes(fast)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
    assert torch.equal(generate(fast), sparse)
    assert not [name for name in changed(before, attributes(fast)) if name.startswith("scheduler")]


def test_applying_twice_is_applying_once(pipe: Any) -> None:
    before = attributes(pipe)
    other = tiny.pipeline()
    with jitaccel.apply(other, SHORT):
        once = generate(other)
    first = jitaccel.apply(pipe, SHORT)
    second = jitaccel.apply(pipe, SHORT)
    assert not first.is_active and second.is_active
    assert pipe.transformer._diffusers_hook._hook_order == ["jitaccel"]
    assert torch.equal(generate(pipe), once)
    second.remove()
    assert not [name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")]


def test_applying_another_preset_replaces_the_first(pipe: Any) -> None:
    other = tiny.pipeline()
    with jitaccel.apply(other, "4x"):
        once = generate(other)
    before = attributes(pipe)
    first = jitaccel.apply(pipe, "7x")
    generate(pipe)
    second = jitaccel.apply(pipe, "4x")
    first.remove()
    assert second.is_active and second.config == PRESETS["4x"]
    assert torch.equal(generate(pipe), once)
    first.remove()
    second.remove()
    assert not [name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")]


def test_configuration_that_is_refused_leaves_the_first_in_place(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, SHORT)
    once = generate(pipe)
    with pytest.raises(jitaccel.ConfigError):
        jitaccel.apply(pipe, SHORT, densities=(0.5, 0.4, 1.0))
    assert handle.is_active and torch.equal(generate(pipe), once)
    handle.remove()


def test_interrupted_generation_leaves_no_trace(pipe: Any) -> None:
    def interrupt(running: Any, *_: Any) -> dict[str, Any]:
        running._interrupt = True
        return {}

    plain = generate(pipe, num_inference_steps=4)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        assert generate(pipe, callback_on_step_end=interrupt).isfinite().all()
        assert torch.equal(generate(pipe), sparse)
        generate(pipe, callback_on_step_end=interrupt)
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_resolution_and_batch_may_change_between_calls(pipe: Any) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"grid": (8, 20)},
        {"seed": (1, 2, 3), "prompt": ["a", "red", "blue"]},
        GUIDED,
        {"grid": (20, 8), "seed": (1, 2), "prompt": ["a", "red"]},
    ]
    alone = []
    for call in calls:
        fresh = tiny.pipeline()
        with jitaccel.apply(fresh, SHORT):
            alone.append(generate(fresh, **call))
    with jitaccel.apply(pipe, SHORT) as handle:
        for call, image in [*zip(calls, alone, strict=True), (calls[0], alone[0])]:
            assert torch.equal(generate(pipe, **call), image)
        assert handle.stats().generations == len(calls) + 1


# Pipelines that share parts


def sharing(pipe: Any, *, scheduler: bool = False) -> Any:
    """Returns another pipeline of the same parts, with or without a scheduler of its own."""
    return tiny.pipeline(**{**pipe.components, **({} if scheduler else {"scheduler": tiny.scheduler()})})


@pytest.mark.parametrize("scheduler", [False, True], ids=["own-scheduler", "shared-scheduler"])
def test_pipeline_that_shares_parts_stays_as_it_was(pipe: Any, scheduler: bool) -> None:
    other = sharing(pipe, scheduler=scheduler)
    plain = generate(other, num_inference_steps=6, **GUIDED)
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)
        sparse = generate(pipe)
        assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)
        assert torch.equal(generate(pipe), sparse)
        abort(pipe, "callback", 1)
        assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)
        assert torch.equal(generate(pipe), sparse)
    assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)


def test_image_to_image_with_the_same_parts_stays_as_it_was(pipe: Any) -> None:
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer and other.scheduler is pipe.scheduler
    other.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "image": torch.linspace(0, 1, 3 * 48 * 48).view(1, 3, 48, 48),
        "num_inference_steps": 6,
        "strength": 0.6,
    }
    plain = generate(other, **call)
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(other, **call), plain)
        sparse = generate(pipe)
        assert torch.equal(generate(other, **call), plain)
        assert torch.equal(generate(pipe), sparse)


def test_pipelines_that_share_a_transformer_may_run_inside_each_other(pipe: Any) -> None:
    other = sharing(pipe)
    plain = generate(other, num_inference_steps=6, **GUIDED)
    images: list[Tensor] = []

    def run_other(*_: Any) -> dict[str, Any]:
        images.append(generate(other, num_inference_steps=6, **GUIDED))
        return {}

    with jitaccel.apply(pipe, SHORT):
        alone = generate(pipe)
        assert torch.equal(generate(pipe, callback_on_step_end=run_other), alone)
        assert len(images) == 5 and all(torch.equal(image, plain) for image in images)

        def run_patched(*_: Any) -> dict[str, Any]:
            images.append(generate(pipe))
            return {}

        assert torch.equal(generate(other, num_inference_steps=6, callback_on_step_end=run_patched, **GUIDED), plain)
        assert all(torch.equal(image, alone) for image in images[5:])


def test_shared_scheduler_taken_over_inside_a_generation_is_told(pipe: Any) -> None:
    other = sharing(pipe, scheduler=True)
    plain = generate(other, num_inference_steps=2)
    images: list[Tensor] = []

    def run_other(*_: Any) -> dict[str, Any]:
        images.append(generate(other, num_inference_steps=2))
        return {}

    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        with pytest.raises(RuntimeError, match=r"jitaccel: .*scheduler"):
            generate(pipe, callback_on_step_end=run_other)
        assert torch.equal(images[0], plain)
        assert torch.equal(generate(pipe), sparse)


@pytest.mark.parametrize("first", [0, 1])
def test_two_patched_pipelines_share_a_transformer(pipe: Any, first: int) -> None:
    pipes = [pipe, sharing(pipe)]
    configs = [SHORT, SHORT.replace(densities=(0.5, 0.8, 1.0), steps=7)]
    plain = [generate(each, num_inference_steps=4) for each in pipes]
    alone = []
    for each, config in zip(pipes, configs, strict=True):
        with jitaccel.apply(each, config):
            alone.append(generate(each))
    before = [attributes(each) for each in pipes]
    handles = [jitaccel.apply(each, config) for each, config in zip(pipes, configs, strict=True)]
    for _ in range(2):
        assert all(torch.equal(generate(each), image) for each, image in zip(pipes, alone, strict=True))
    handles[first].remove()
    assert torch.equal(generate(pipes[first], num_inference_steps=4), plain[first])
    assert torch.equal(generate(pipes[1 - first]), alone[1 - first])
    handles[1 - first].remove()
    for each, image, attributes_before in zip(pipes, plain, before, strict=True):
        assert torch.equal(generate(each, num_inference_steps=4), image)
        names = changed(attributes_before, attributes(each))
        assert not [name for name in names if name.startswith("transformer")]


def test_two_patched_pipelines_cannot_share_a_scheduler(pipe: Any) -> None:
    other = sharing(pipe, scheduler=True)
    before = attributes(pipe)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        with pytest.raises(jitaccel.ConfigError, match="scheduler of its own"):
            jitaccel.apply(other, SHORT)
        assert torch.equal(generate(pipe), sparse)
    jitaccel.apply(other, SHORT).remove()
    assert not [name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")]


def test_patch_does_not_keep_the_pipeline_alive() -> None:
    pipe = tiny.pipeline()
    transformer, scheduler = pipe.transformer, pipe.scheduler
    handle = jitaccel.apply(pipe, SHORT)
    generate(pipe)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert handle.stats().generations == 1 and "FluxPipeline" in repr(handle)
    handle.remove()
    assert "set_timesteps" not in vars(scheduler) and "forward" not in vars(transformer)


def test_parts_of_a_pipeline_that_is_gone_may_be_used_again() -> None:
    plain = generate(tiny.pipeline(), num_inference_steps=4)
    pipe = tiny.pipeline()
    components = pipe.components
    jitaccel.apply(pipe, SHORT)
    sparse = generate(pipe)
    del pipe
    gc.collect()
    again = tiny.pipeline(**components)
    assert torch.equal(generate(again, num_inference_steps=4), plain)
    with jitaccel.apply(again, SHORT):
        assert torch.equal(generate(again), sparse)
    assert torch.equal(generate(again, num_inference_steps=4), plain)
    assert "set_timesteps" not in vars(again.scheduler) and "forward" not in vars(again.transformer)


def test_apply_again_follows_parts_that_were_replaced(pipe: Any) -> None:
    other = tiny.pipeline(seed=1)
    with jitaccel.apply(other, SHORT):
        target = generate(other)
    old_transformer, old_scheduler = pipe.transformer, pipe.scheduler
    jitaccel.apply(pipe, SHORT)
    pipe.transformer = tiny.transformer(seed=1)
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(pipe), target)
        pipe.scheduler = tiny.scheduler()
        with jitaccel.apply(pipe, SHORT):
            assert torch.equal(generate(pipe), target)
    for part in (old_transformer, pipe.transformer, old_scheduler, pipe.scheduler):
        assert not {"forward", "set_timesteps", "step"} & vars(part).keys()


# Together with other features


class _Passing(ModelHook):  # type: ignore[misc]
    """Another package's hook: counts, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_hooks_on_the_transformer_stay(pipe: Any, order: str) -> None:
    plain = generate(pipe, num_inference_steps=4)
    hook = _Passing()

    def register() -> None:
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(hook, "other")

    if order == "before":
        register()
    handle = jitaccel.apply(pipe, SHORT)
    if order == "after":
        register()
    sparse = generate(pipe)
    assert hook.calls == 5
    handle.remove()
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)
    assert hook.calls == 9
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(pipe), sparse)
    pipe.transformer._diffusers_hook.remove_hook("other")
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_lora_and_its_scale_are_honoured(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    seeds = (1, 2)
    half: dict[str, Any] = {"prompt": ["a", "red"], "joint_attention_kwargs": {"scale": 0.5}}
    plain = generate(pipe, seeds, num_inference_steps=3, **half)
    assert not torch.equal(generate(pipe, seeds, num_inference_steps=3, prompt=half["prompt"]), plain)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, seeds, num_inference_steps=3, **half), plain)
    with jitaccel.apply(pipe, SHORT):
        together = generate(pipe, seeds, **half)
        alone = generate(pipe, seeds[1:], prompt=["red"], joint_attention_kwargs={"scale": 0.5})
        torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)
        assert relative_error(generate(pipe, seeds, prompt=half["prompt"]), together) > 1e-3


def test_compiled_transformer_gives_the_same_image(pipe: Any) -> None:
    config = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
    dense = generate(pipe, num_inference_steps=1, grid=(6, 6))  # makes diffusers' registry on the inner module, too
    with jitaccel.apply(pipe, config):
        sparse = generate(pipe, grid=(6, 6))
    plain = pipe.transformer
    compiled = pipe.transformer = torch.compile(plain, backend="eager", dynamic=False)
    before = dict(vars(compiled)), dict(vars(plain))
    try:
        for _ in range(2):
            handle = jitaccel.apply(pipe, config)
            assert relative_error(generate(pipe, grid=(6, 6)), sparse) < 1e-5
            assert "forward" not in vars(plain)  # the hook is around the graph, not in it
        handle.remove()
        assert not changed(before[0], vars(compiled)) and not changed(before[1], vars(plain))
        assert relative_error(generate(pipe, num_inference_steps=1, grid=(6, 6)), dense) < 1e-5
    finally:
        torch._dynamo.reset()


def _refuses(match: str, **overrides: Any) -> Callable[[Any], None]:
    def check(pipe: Any) -> None:
        with pytest.raises(jitaccel.ConfigError, match=match):
            jitaccel.apply(pipe, **overrides)

    return check


@pytest.mark.parametrize(
    "check",
    [
        _refuses("must be one of 4x, 7x, 10x, 4x-paper, 7x-paper, dense.*got '8x'; take one of these", preset="8x"),
        _refuses('relax_step must be an argument .* field of JiTConfig.*did you mean "relax_steps"', relax_step=2),
        _refuses("densities must rise strictly", densities=(0.6, 0.5, 1.0)),
    ],
)
def test_bad_settings_change_nothing(pipe: Any, check: Callable[[Any], None]) -> None:
    before = attributes(pipe)
    check(pipe)
    assert not changed(before, attributes(pipe))
