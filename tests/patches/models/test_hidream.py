"""HiDream-I1: its experts, and pictures that are not square, which the model fills up with tokens of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.method.run import Run
from jitaccel.method.steps import Step
from jitaccel.patches.models.calls import CutCalls
from jitaccel.patches.models.hidream import HIDREAM
from tests.support.models import noise
from tests.support.more_models import hidream_call, hidream_transformer
from tests.support.picture_pipelines import SUBJECTS, generate
from tests.support.pooled import POOLED
from tests.support.tiny import DENSE, SHORT, relative_error

GRID, FILL = (10, 14), 256 - 140


def given_to(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    return {"timesteps" if name == "timestep" else name: value for name, value in call.items()}


def by_hand(model: Any, call: dict[str, Any], at: Tensor, fill: int, whole: int) -> Tensor:
    """Returns the model's output (B, M, 16) at some tokens (B, M) with some fill tokens, by its own packed calls.

    whole: how many tokens the picture of the call has.
    """
    tokens, masks, _, ids = model.patchify(call["hidden_states"])
    index = torch.cat([at, whole + torch.arange(fill).expand(len(at), -1)], dim=1)
    packed = {
        "hidden_states": tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2])),
        "img_ids": ids.gather(1, index[..., None].expand(-1, -1, 3)),
        "hidden_states_masks": masks.gather(1, index),
        "img_sizes": [(at.shape[1], 1)] * len(at),
    }
    output: Tensor = model(**{**given_to(model, call), **packed}, return_dict=False)[0]
    return output.unflatten(2, (-1, 2)).permute(0, 2, 1, 3, 4).flatten(2)


def answer_of(config: JiTConfig, model: Any, call: dict[str, Any]) -> tuple[Run, Tensor, int]:
    """Returns a run, the velocity of its first step, and how many operations that took."""
    calls = CutCalls(HIDREAM, [model], Execution())
    given = calls.given(model, call)
    step = Step(index=0, stage=0, noise_level=0.7, next_level=0.6, may_end_stage=False)
    run = Run(config, GRID, step, given.tokens, patch=2)
    made = calls.call(model, model.forward, given)
    return run, made.evaluate(run, given.tokens).values, made.cost(run.num_active, 9)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_stage_shows_its_share_of_the_fill(batch: int) -> None:
    model, call = hidream_transformer().eval(), hidream_call(GRID, batch)
    run, found, _ = answer_of(SHORT, model, call)
    share = round(FILL * run.num_active / 140)
    assert 0 < share < FILL
    expected = -by_hand(model, call, run.anchors, share, 140)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(-by_hand(model, call, run.anchors, FILL, 140), expected) > 1e-3  # the fill is weighed


@torch.no_grad()
def test_smaller_picture_has_its_share_of_the_fill() -> None:
    model, call = hidream_transformer().eval(), hidream_call(GRID, 2)
    _, found, _ = answer_of(POOLED, model, call)
    small_level = 0.35 / 0.65
    shown = torch.nn.functional.avg_pool2d(call["hidden_states"], 2) / 0.65
    small = {**call, "hidden_states": shown, "timestep": torch.full((2,), 1000 * small_level)}
    expected = -by_hand(model, small, torch.arange(35).expand(2, -1), round(FILL / 4), 35)
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_fill_tokens_are_copies_of_each_other_throughout() -> None:
    model, call = hidream_transformer().eval(), hidream_call(GRID, 1)
    seen: list[Tensor] = []
    hook = model.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**given_to(model, call))
    hook.remove()
    (tokens,) = seen
    assert tokens.shape[1] == 256
    torch.testing.assert_close(tokens[:, 140:], tokens[:, 140:141].expand(-1, FILL, -1))
    assert relative_error(tokens[:, :1], tokens[:, 140:141]) > 1e-2


def test_operations_count_the_fill() -> None:
    model = hidream_transformer()
    call = hidream_call(GRID, 1)
    run, _, cost = answer_of(SHORT, model, call)
    shown = run.num_active + round(FILL * run.num_active / 140)
    assert HIDREAM.cost is not None
    assert cost == HIDREAM.cost(model.config, shown, 9) > HIDREAM.cost(model.config, run.num_active, 9)


@torch.no_grad()
def test_dense_stages_are_the_models_bits() -> None:
    model, call = hidream_transformer().eval(), given_to(None, hidream_call(GRID, 2))
    expected = model(**call, return_dict=False)[0]
    with jitaccel.apply(model, DENSE, noise_levels=[0.7, 0.0], schedule="native"):
        assert torch.equal(model(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("config", [SHORT, POOLED], ids=["subset", "pooled"])
def test_pipeline_makes_pictures_that_are_not_square(config: JiTConfig) -> None:
    subject = SUBJECTS["HiDreamImagePipeline"]
    pipe = subject.make()
    with jitaccel.apply(pipe, config) as handle:
        latents = generate(subject, pipe, height=64, width=144)
    assert latents.isfinite().all() and latents.shape[-2] != latents.shape[-1]
    steps = handle.stats().steps
    assert steps[0].tokens < steps[-1].tokens == latents.shape[-2] * latents.shape[-1] // 4
    assert steps[0].flops < steps[-1].flops


def test_packed_latents_are_refused() -> None:
    model, call = hidream_transformer(), given_to(None, hidream_call(GRID, 1))
    with torch.no_grad(), jitaccel.apply(model, SHORT), pytest.raises(UnsupportedModelError, match="packed latents"):
        model(**call, hidden_states_masks=torch.ones(1, 140))


def test_experts_do_not_look_at_other_tokens() -> None:
    experts = hidream_transformer().double_stream_blocks[0].block.ff_i
    tokens, some = noise(1, 1, 40, 16), torch.arange(3, 40, 5)
    with torch.no_grad():
        assert relative_error(experts(tokens[:, some]), experts(tokens)[:, some]) < 1e-6


def test_model_without_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="transformer must have experts"):
        jitaccel.apply(hidream_transformer(num_routed_experts=0), SHORT)
