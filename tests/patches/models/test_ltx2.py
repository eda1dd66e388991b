"""LTX-2 in its pipeline: sparse video, full audio, guidance with four forwards; also against the method by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from tests.support import reference
from tests.support.every_model import CASES
from tests.support.ltx2 import EVERY_GUIDANCE, UNGUIDED, end, generate, on_tokens, pipeline, prompts, start
from tests.support.pooled import POOLED
from tests.support.tiny import DENSE, SHORT, relative_error
from tests.support.video import GRID

Guidance = dict[str, float]
TABLES = {"interleaved": {}, "split": {"rope_type": "split"}}
NO_RESCALING = {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}


def guided(model: Any, guidance: Guidance, *given: Any, **further: Any) -> list[Tensor]:
    """Returns guided velocities of video and audio. given: up to the level, as `on_tokens` takes them."""
    positive, negative = prompts()
    branches = [
        (on_tokens(model, *given, negative, **further), "guidance_scale", 1.0),
        (on_tokens(model, *given, positive, spatio_temporal_guidance_blocks=[1], **further), "stg_scale", 0.0),
        (on_tokens(model, *given, positive, isolate_modalities=True, **further), "modality_scale", 1.0),
    ]
    made = []
    for index, kind in enumerate(("", "audio_")):
        velocity = on_tokens(model, *given, positive, **further)[index]
        deltas = [(guidance[kind + name] - none) * (velocity - branch[index]) for branch, name, none in branches]
        made.append(velocity + sum(deltas))
    return made


def by_hand(pipe: Any, config: JiTConfig, guidance: Guidance, levels: tuple[float, ...]) -> Tensor:
    """Returns the method's result: a sparse video, and the audio after Euler steps on the same levels."""
    video, audio = start()
    after = dict(itertools.pairwise(levels))

    def velocity(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        nonlocal audio
        made, heard = guided(pipe.transformer, guidance, tokens, audio, anchors, level)
        audio = audio + (after[level] - level) * heard
        return made

    with torch.no_grad():
        state = reference.denoise(velocity, config, GRID, video, levels).states[-1]
    return end(state, audio)


@pytest.mark.parametrize("guidance", [UNGUIDED, EVERY_GUIDANCE], ids=["unguided", "every guidance"])
@pytest.mark.parametrize("config", [PRESETS["few-steps"], SHORT], ids=["few-steps", "short"])
@pytest.mark.parametrize("tables", TABLES)
def test_sparse_generation_is_the_methods(tables: str, config: JiTConfig, guidance: Guidance) -> None:
    pipe = pipeline(**TABLES[tables])
    expected = by_hand(pipe, config, guidance, jitaccel.noise_levels(config))
    with jitaccel.apply(pipe, config) as handle:
        assert relative_error(generate(pipe, **guidance, **NO_RESCALING), expected) < 1e-5
    stats = handle.stats()
    assert stats.grid == GRID and stats.batch == 1
    assert all(step.calls == (1 if guidance is UNGUIDED else 4) for step in stats.steps)


def test_audio_takes_the_levels_of_the_video_whatever_number_the_call_asks_for() -> None:
    pipe, config = pipeline(), SHORT.replace(schedule="native")
    with jitaccel.apply(pipe, config) as handle:
        made = generate(pipe, 30, **UNGUIDED)
        levels = tuple(step.noise_level for step in handle.stats().steps)
        assert len(levels) == 5 and torch.equal(generate(pipe, 5, **UNGUIDED), made)
    assert relative_error(made, by_hand(pipe, config, UNGUIDED, (*levels, 0.0))) < 1e-5


def test_every_guidance_is_the_unpatched_pipelines_at_density_one() -> None:
    pipe = pipeline()
    for further in ({}, NO_RESCALING):
        plain = generate(pipe, 4, **EVERY_GUIDANCE, **further)
        with jitaccel.apply(pipe, DENSE):
            assert torch.equal(generate(pipe, 4, **EVERY_GUIDANCE, **further), plain)


def test_rescaled_guidance_weighs_lifted_branches() -> None:
    pipe = pipeline()
    with jitaccel.apply(pipe, SHORT):
        rescaled = generate(pipe, **EVERY_GUIDANCE)
        assert rescaled.isfinite().all()
        assert relative_error(rescaled, generate(pipe, **EVERY_GUIDANCE, **NO_RESCALING)) > 1e-3


@torch.no_grad()
def test_pooled_stage_is_the_smaller_video_with_the_audio_at_its_own_level() -> None:
    pipe, (video, audio) = pipeline(), start()
    state, (frames, rows, columns) = video.unflatten(1, GRID), GRID
    guidance = {**UNGUIDED, "guidance_scale": 3.0, "audio_guidance_scale": 4.0}
    for i, (level, after) in enumerate(itertools.pairwise(jitaccel.noise_levels(POOLED))):
        if POOLED.stage_of_step(i, 5) == 0:
            blocks = state.unflatten(3, (columns // 2, 2)).unflatten(2, (rows // 2, 2))
            grid, small_level = (frames, rows // 2, columns // 2), (level / 2) / (1 - level / 2)
            small = blocks.mean(dim=(3, 5)) / (1 - level / 2)
            every = torch.arange(torch.Size(grid).numel())
            out, heard = guided(
                pipe.transformer, guidance, small.flatten(1, 3), audio, every, level, grid=grid, shown_level=small_level
            )
            clean = small - small_level * out.unflatten(1, grid)
            large = torch.nn.functional.interpolate(clean[0].permute(0, 3, 1, 2), scale_factor=2, mode="bilinear")
            velocity = (state - large.permute(0, 2, 3, 1)[None]) / level
        else:
            every = torch.arange(144)
            out, heard = guided(pipe.transformer, guidance, state.flatten(1, 3), audio, every, level)
            velocity = out.unflatten(1, GRID)
        state, audio = state + (after - level) * velocity, audio + (after - level) * heard
    with jitaccel.apply(pipe, POOLED):
        assert relative_error(generate(pipe, **NO_RESCALING), end(state.flatten(1, 3), audio)) < 1e-5


@pytest.mark.parametrize("returns_dict", [True, False])
def test_audio_of_a_bare_transformer_is_the_models_own(returns_dict: bool) -> None:
    case = CASES["LTX2VideoTransformer3DModel"]
    model, call = case.make(), case.call(case.grid, 2)
    with torch.no_grad():
        plain = model(**call, return_dict=returns_dict)
        with jitaccel.apply(model, DENSE.replace(schedule="beta", steps=2), noise_levels=(0.7, 0.3, 0.0)):
            out = model(**call, return_dict=returns_dict)
    assert type(out) is type(plain) and len(out) == len(plain) == 2
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1])


def test_scheduler_is_copied_by_its_own_pipeline_alone() -> None:
    pipe = pipeline()
    generate(pipe, 3)
    before = repr(vars(pipe.scheduler))
    with jitaccel.apply(pipe, SHORT):
        generate(pipe)
        with pytest.raises(TypeError, match="must not be patched"):
            copy.deepcopy(pipe.scheduler)
    assert repr(vars(pipe.scheduler)) == before and type(copy.deepcopy(pipe.scheduler)) is type(pipe.scheduler)


def test_masks_between_tokens_are_refused() -> None:
    case = CASES["LTX2VideoTransformer3DModel"]
    model, call = case.make(), case.call(case.grid, 1)
    given = {**call, "video_self_attention_mask": torch.ones(1, 144, 144)}
    with jitaccel.apply(model, SHORT), pytest.raises(UnsupportedModelError, match="mask between its own tokens"):
        model(**given)


def test_call_that_looks_at_its_perturbation_runs_eagerly_and_the_others_compiled() -> None:
    pipe = pipeline()
    with jitaccel.apply(pipe, SHORT):
        eager = generate(pipe, **EVERY_GUIDANCE)
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager"}) as handle:
        assert relative_error(generate(pipe, **EVERY_GUIDANCE), eager) < 1e-6
    compiled = handle.stats().compiled
    # Of three stages the calls of text guidance and of the audio left out; five steps of spatio-temporal guidance.
    assert compiled is not None and (compiled.graphs, compiled.calls, compiled.eager_calls) == (6, 10, 5)
    assert any("Data-dependent" in note for note in handle.stats().notes)
