"""Pooled stages in every codebase and execution, against the smaller picture made by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import Request
from tests.support import tiny
from tests.support.bfl_wrapped import Flux
from tests.support.models import noise
from tests.support.pipelines import call_of, flux_pipeline, run_pipeline
from tests.support.pooled import POOLED, denoise_pooled, small_velocity, whole_velocity
from tests.support.subjects import SUBJECTS, Subject, flux_subject
from tests.support.tiny import GRID, NUM_TOKENS, TEXT_TOKENS, WIDTH, relative_error

LEVELS = jitaccel.noise_levels(POOLED)
SOLVED = POOLED.replace(solver="dpmpp_2m")


def by_hand(subject: Subject, config: Any = POOLED, seed: int = 0) -> Tensor:
    return denoise_pooled(small_velocity(subject), whole_velocity(subject), config, tiny.start(seed), LEVELS)


@pytest.mark.parametrize("execution", ["indexed", "auto"])
@pytest.mark.parametrize("name", SUBJECTS)
@torch.no_grad()
def test_loop_is_the_smaller_picture_made_by_hand(name: str, execution: Any) -> None:
    subject = SUBJECTS[name]()
    expected = by_hand(subject)
    with jitaccel.apply(subject.model, POOLED, noise_levels=LEVELS, execution=execution) as handle:
        made = subject.loop(tiny.start())
        assert [step.tokens for step in handle.stats().steps] == [NUM_TOKENS // 4] * 2 + [NUM_TOKENS] * 3
    assert relative_error(made, expected) < 1e-5


@torch.no_grad()
def test_solver_of_second_order_goes_on_after_pooled_steps() -> None:
    subject = flux_subject()
    expected = by_hand(subject, SOLVED)
    with jitaccel.apply(subject.model, SOLVED, noise_levels=LEVELS):
        assert relative_error(subject.loop(tiny.start()), expected) < 1e-5


@torch.no_grad()
def test_each_image_of_a_batch_is_the_one_made_alone() -> None:
    subject = flux_subject()
    with jitaccel.apply(subject.model, SOLVED, noise_levels=LEVELS):
        together = subject.loop(torch.cat([tiny.start(1), tiny.start(2)]), batch=2)
    assert relative_error(together, torch.cat([by_hand(subject, SOLVED, seed) for seed in (1, 2)])) < 1e-5


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.1 Kontext", "FLUX.1 Control"])
@torch.no_grad()
def test_compiled_stage_is_the_smaller_picture_made_by_hand(name: str) -> None:
    subject = SUBJECTS[name]()
    expected = by_hand(subject)
    options = {"backend": "eager", "graphs": True}
    with jitaccel.apply(subject.model, POOLED, noise_levels=LEVELS, compile=options, strict=True) as handle:
        for _ in range(2):
            assert relative_error(subject.loop(tiny.start()), expected) < 1e-5
        compiled = handle.stats().compiled
    assert compiled is not None and (compiled.signatures, compiled.eager_calls) == (2, 0)


# Pipelines


def on_pipeline(pipe: Any, scale: float = 1.0) -> tuple[Any, Any]:
    """Returns the small and whole velocities of a pipeline's model, guided as its true CFG does."""
    model = pipe.transformer

    def velocity(tokens: Tensor, grid: tuple[int, int], level: float) -> Tensor:
        def branch(seed: int) -> Tensor:
            given = embeds(seed)
            return model(
                hidden_states=tokens, img_ids=tiny.ids(grid), timestep=torch.tensor([level]),
                encoder_hidden_states=given["prompt_embeds"], pooled_projections=given["pooled_prompt_embeds"],
                guidance=torch.tensor([3.5]), txt_ids=torch.zeros(TEXT_TOKENS, 3), return_dict=False,
            )[0]  # fmt: skip

        unguided = branch(2)
        return unguided + scale * (branch(1) - unguided) if scale != 1.0 else branch(1)

    return velocity, lambda state, level: velocity(state, GRID, level)


def embeds(seed: int) -> dict[str, Tensor]:
    return {"prompt_embeds": noise(seed, 1, TEXT_TOKENS, WIDTH), "pooled_prompt_embeds": noise(seed + 9, 1, WIDTH)}


@pytest.mark.parametrize("execution", ["indexed", "packed"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_pipeline_is_the_smaller_picture_made_by_hand(execution: Any, scale: float) -> None:
    pipe = tiny.pipeline()
    expected = denoise_pooled(*on_pipeline(pipe, scale), SOLVED, tiny.start(), LEVELS)
    call: dict[str, Any] = {"prompt": None, "latents": tiny.start(), **embeds(1)}
    if scale != 1.0:
        call |= {"true_cfg_scale": scale, **{f"negative_{name}": x for name, x in embeds(2).items()}}
    with jitaccel.apply(pipe, SOLVED, execution=execution) as handle:
        made = tiny.generate(pipe, guidance_scale=3.5, **call)
        stats = handle.stats()
    assert relative_error(made, expected) < 1e-5
    assert stats.execution == execution
    assert stats.dense_steps < 4 * (1 if scale == 1.0 else 2)


@pytest.mark.parametrize("grid", [(7, 10), (9, 5)])
@pytest.mark.parametrize("pooling", [(2, 1), (4, 2, 1)])
@torch.no_grad()
def test_odd_sides_run_and_branches_and_executions_agree(grid: tuple[int, int], pooling: tuple[int, ...]) -> None:
    densities = tuple(1 / factor**2 for factor in pooling)
    bounds = tuple((k + 1) / len(pooling) for k in range(len(pooling)))
    config = SOLVED.replace(densities=densities, boundaries=bounds, pooling=pooling)
    made = []
    for execution in ("indexed", "packed"):
        pipe = tiny.pipeline()
        with jitaccel.apply(pipe, config, execution=execution):
            made.append(tiny.generate(pipe, grid=grid))
    assert torch.isfinite(made[0]).all()
    assert relative_error(*made) < 1e-5


@pytest.mark.parametrize(
    "name", ["FluxFillPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline", "FluxKontextPipeline"]
)
@torch.no_grad()
def test_pipelines_with_masks_references_and_residuals_run_alike_packed_and_indexed(name: str) -> None:
    made = []
    for execution in ("indexed", "auto"):
        pipe = flux_pipeline(name)
        with jitaccel.apply(pipe, SOLVED, execution=execution) as handle:
            made.append(run_pipeline(pipe, **call_of(name)))
            assert handle.stats().steps[0].tokens < handle.stats().steps[-1].tokens
    assert relative_error(*made) < 1e-4


@torch.no_grad()
def test_controlnet_on_the_anchors_sees_the_smaller_picture() -> None:
    made = []
    for controlnet in ("dense", "anchors"):
        pipe = flux_pipeline("FluxControlNetPipeline")
        with jitaccel.apply(pipe, POOLED, controlnet=controlnet):
            made.append(run_pipeline(pipe, **call_of("FluxControlNetPipeline")))
    assert torch.isfinite(made[1]).all()
    assert 0 < relative_error(*made) < 1.0


@torch.no_grad()
def test_batch_of_requests_makes_each_picture_as_alone() -> None:
    pipe = tiny.pipeline()
    side = GRID[0] * tiny.PIXELS_PER_TOKEN
    same = {"prompt": "a red circle", "height": side, "max_sequence_length": TEXT_TOKENS}
    requests = [
        Request(seed=seed, preset=preset, width=width, **same)
        for seed, preset, width in ((0, SOLVED, side), (1, POOLED.replace(steps=4), 40), (2, "7x-paper", side))
    ]
    together = jitaccel.generate_batch(pipe, requests, output_type="latent")
    for request, outcome in zip(requests, together, strict=True):
        alone = tiny.pipeline()
        with jitaccel.apply(alone, request.preset):
            grid = (side // tiny.PIXELS_PER_TOKEN, request.width // tiny.PIXELS_PER_TOKEN)
            expected = tiny.generate(alone, seed=request.seed, grid=grid)
        assert relative_error(outcome.image, expected[0]) < 1e-4


@torch.no_grad()
def test_exported_stages_make_the_eager_latents(tmp_path: Path) -> None:
    config = SOLVED.replace(densities=(0.0625, 0.25, 0.6, 1.0), boundaries=(0.2, 0.4, 0.7, 1.0), pooling=(4, 2, 1, 1))
    pipe, side = tiny.pipeline(), GRID[0] * tiny.PIXELS_PER_TOKEN
    with jitaccel.apply(pipe, config, execution="packed"):
        expected = tiny.generate(pipe)
    folder = jitaccel.export(
        pipe, tmp_path / "stages", config, size=(side, side), format="torchscript", text_tokens=TEXT_TOKENS
    )
    exported = jitaccel.load_exported(folder)
    assert [each.name for each in exported.manifest.inputs[0]] == ["state", "text", "pooled", "guidance", "levels"]
    with exported.apply(pipe):
        assert relative_error(tiny.generate(pipe), expected) < 1e-5


# Other codebases


@torch.no_grad()
def test_bfl_loop_is_what_diffusers_gives_on_the_same_weights() -> None:
    model = Flux().eval()
    given = {
        "txt": noise(1, 1, TEXT_TOKENS, WIDTH), "txt_ids": torch.zeros(1, TEXT_TOKENS, 3), "y": noise(2, 1, WIDTH),
        "guidance": torch.full((1,), 3.5),
    }  # fmt: skip
    expected = by_hand(flux_subject(model=model.inner))
    with jitaccel.apply(model, POOLED, noise_levels=LEVELS):
        img = tiny.start()
        for level, after in itertools.pairwise(LEVELS):
            velocity = model(img=img, img_ids=tiny.ids()[None], timesteps=torch.full((1,), level), **given)
            img = img + (after - level) * velocity
    assert relative_error(img, expected) < 1e-5


@torch.no_grad()
def test_levels_that_nobody_tells_are_predicted_for_pooled_stages_too() -> None:
    subject = flux_subject()
    with jitaccel.apply(subject.model, POOLED) as handle:
        made = subject.loop(tiny.start())
        assert "levels are predicted" in handle.stats().notes[0]
    assert relative_error(made, by_hand(subject)) < 1e-5
