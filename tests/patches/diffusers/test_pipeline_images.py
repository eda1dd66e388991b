"""`jitaccel.apply` on a diffusers FluxPipeline: the images."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig
from tests.support import tiny
from tests.support.flux_pipelines import GUIDED, expected, in_bfloat16, noise_of
from tests.support.tiny import DENSE, SHORT, forwards, generate, relative_error

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


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
