"""One test for each pitfall of the codebases, in the order of shared/INTEGRATION.md, part 7."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

import jitaccel
from jitaccel.patches.flux.arguments import grid_of_ids
from tests.support import tiny
from tests.support.bfl_wrapped import Flux
from tests.support.pipelines import flux_pipeline, run_pipeline
from tests.support.tiny import (
    CHANNELS,
    DENSE,
    NUM_TOKENS,
    SHORT,
    TEXT_TOKENS,
    WIDTH,
    generate,
    relative_error,
)


def test_1_nothing_is_drawn_from_global_generators() -> None:
    pipe = tiny.pipeline()
    pictures = []
    with jitaccel.apply(pipe, SHORT):
        for seed in (0, 1):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 (the released code draws from it)
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
            pictures.append(generate(pipe))
            after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
            assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(("micro_flow", "share"), [("exact", 1.0), ("released", 1 / 3), ("none", 0.0)])
def test_2_micro_flow_goes_all_the_way_or_blends_once(micro_flow: Any, share: float) -> None:
    """How far the state moves at the start of a stage, as a share of the way to the target."""
    pipe = tiny.pipeline()
    config = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)

    def second_state(kind: Any) -> Tensor:
        seen: list[Tensor] = []

        def keep(_: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen.append(given["latents"].clone())
            return {}

        with jitaccel.apply(pipe, config, micro_flow=kind):
            generate(pipe, callback_on_step_end=keep)
        return seen[0]

    still, target, moved = (second_state(kind) for kind in ("none", "exact", micro_flow))
    assert torch.allclose(moved - still, share * (target - still), atol=1e-5)
    assert (target - still).abs().max() > 0.1


@pytest.mark.parametrize("grid", [(3, 300), (300, 3), (1, 512), (12, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_3_ids_that_half_precision_rounds_still_tell_the_grid(grid: tuple[int, int], dtype: torch.dtype) -> None:
    ids = tiny.ids(grid).to(dtype)
    assert grid_of_ids(ids, grid[0] * grid[1]) == grid
    wrong = ids.clone()
    wrong[-1, 2] += 8
    with pytest.raises(ValueError, match="must be the raster"):
        grid_of_ids(wrong, grid[0] * grid[1])


def test_3_picture_of_more_than_256_tokens_a_side_runs_in_bfloat16() -> None:
    pipe = tiny.pipeline(transformer=tiny.transformer().to(torch.bfloat16))
    text = torch.zeros(1, TEXT_TOKENS, WIDTH, dtype=torch.bfloat16)
    call = {"prompt": None, "prompt_embeds": text, "pooled_prompt_embeds": text[:, 0]}
    with jitaccel.apply(pipe, SHORT) as handle:
        assert generate(pipe, grid=(2, 300), **call).isfinite().all()
        assert handle.stats().grid == (2, 300)


def test_4_state_that_a_pipeline_edits_is_taken_as_it_comes() -> None:
    """Inpainting restores the given picture after each step; a separate copy of the state would drift away."""
    pipe = flux_pipeline("FluxInpaintPipeline")
    seen: list[Tensor] = []
    with jitaccel.apply(pipe, SHORT.replace(steps=8, schedule="native")):
        pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        given: list[Tensor] = []

        def keep(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            given.append(values["latents"].clone())
            return {}

        run_pipeline(pipe, callback_on_step_end=keep)
    last, dense = given[-2], seen[-1].reshape(1, -1, CHANNELS)
    assert torch.equal(dense, last)  # the last stage is dense: it enters the network as the pipeline left it


def test_5_arguments_that_a_pipeline_changes_between_branches_belong_to_their_branch() -> None:
    """One dict of attention arguments, in which each guidance branch replaces the IP-Adapter embeddings."""
    pipe = tiny.pipeline()
    torch.manual_seed(0)
    pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(WIDTH, WIDTH, 2)])
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(
            FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=WIDTH, num_tokens=(2,), scale=[1.0])
        )
    face, other = torch.randn(1, 1, WIDTH), torch.randn(1, 1, WIDTH)
    guided: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 2.0, "ip_adapter_image_embeds": [face]}
    same = {**guided, "negative_ip_adapter_image_embeds": [face]}
    opposite = {**guided, "negative_ip_adapter_image_embeds": [other]}
    expected = generate(pipe, num_inference_steps=3, **opposite)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, num_inference_steps=3, **opposite), expected)
    with jitaccel.apply(pipe, SHORT):
        assert relative_error(generate(pipe, **opposite), generate(pipe, **same)) > 1e-3
        together = generate(pipe, (1, 2), **{**opposite, "prompt": ["a", "red"], "negative_prompt": ["green", "on"]})
        alone = generate(pipe, (2,), **{**opposite, "prompt": ["red"], "negative_prompt": ["on"]})
    assert relative_error(together[1:], alone) < 1e-5


@pytest.mark.parametrize("multiple", [8, 64, 100])
def test_6_numbers_of_anchors_are_multiples_where_a_codebase_pads(multiple: int) -> None:
    counts = SHORT.token_counts(NUM_TOKENS, multiple=multiple)
    assert all(count % multiple == 0 or count == NUM_TOKENS for count in counts)
    assert all(count >= least for count, least in zip(counts, SHORT.token_counts(NUM_TOKENS), strict=True))


def test_7_both_branches_of_guidance_see_the_same_anchors() -> None:
    pipe, guided = tiny.pipeline(), {"negative_prompt": "green", "true_cfg_scale": 2.0}
    with jitaccel.apply(pipe, SHORT, execution="indexed") as handle, tiny.forwards(pipe.transformer) as seen:
        indexed = generate(pipe, **guided)
        anchors = [each[0].tolist() for each in handle.stats().anchors]
        assert seen == [anchors[step.stage] for step in handle.stats().steps for _ in range(2)]
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        assert relative_error(generate(pipe, **guided), indexed) < 1e-5


def test_8_stages_are_placed_on_the_steps_that_run() -> None:
    pipe = flux_pipeline("FluxImg2ImgPipeline")
    with jitaccel.apply(pipe, SHORT.replace(steps=10, schedule="native")) as handle:
        run_pipeline(pipe, strength=0.5, num_inference_steps=10)
        assert [step.tokens for step in handle.stats().steps] == [50, 50, 93, NUM_TOKENS, NUM_TOKENS]


def test_9_transformer_that_was_replaced_is_told_and_one_that_is_gone_is_let_go() -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT):
        old, pipe.transformer = pipe.transformer, tiny.transformer(seed=1)
        with pytest.raises(RuntimeError, match="must be the patched one"):
            generate(pipe)
        pipe.transformer = old
        assert generate(pipe).isfinite().all()


def test_copy_of_what_is_patched_is_refused() -> None:
    """It would run the weights of the original."""
    pipe, flux = tiny.pipeline(), Flux()
    with jitaccel.apply(pipe, SHORT), jitaccel.apply(flux, SHORT):
        for patched in (pipe.transformer, pipe.scheduler, pipe, flux):
            with pytest.raises(TypeError, match=r"remove\(\) the handle, copy, and apply to each"):
                copy.deepcopy(patched)
    for free in (pipe.transformer, pipe.scheduler, flux):
        assert type(copy.deepcopy(free)) is type(free)


@torch.no_grad()
def test_levels_that_rounding_makes_alike_are_told_apart_by_their_order() -> None:
    """In bfloat16 two steps of the preset begin at timestep 1000 (part 1.3): no step is found by its timestep."""
    config = jitaccel.PRESETS["4x-paper"]
    levels = jitaccel.noise_levels(config)
    rounded = [float(torch.tensor(level, dtype=torch.bfloat16)) for level in levels]
    assert rounded[0] == rounded[1]
    model = tiny.transformer().to(torch.bfloat16)
    text = torch.zeros(1, TEXT_TOKENS, WIDTH, dtype=torch.bfloat16)
    state = tiny.start().to(torch.bfloat16)
    with jitaccel.apply(model, config, noise_levels=levels) as handle:
        for level, after in itertools.pairwise(levels):
            velocity = model(
                state, text, text[:, 0], torch.tensor([level], dtype=torch.bfloat16), tiny.ids(),
                torch.zeros(TEXT_TOKENS, 3), torch.tensor([3.5]), return_dict=False,
            )[0]  # fmt: skip
            state = state + (after - level) * velocity
        assert [step.index for step in handle.stats().steps] == [*range(18)] and handle.stats().generations == 1
