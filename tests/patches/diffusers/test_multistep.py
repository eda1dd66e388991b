"""Multistep schedulers that keep their own solver (`solver="caller"`), and the effect of moves of the state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.patches.diffusers.multistep import begun_again
from tests.support import video
from tests.support.tiny import SHORT, relative_error

OWN = SHORT.replace(solver="caller", schedule="native")
STEPS, AT = 11, 4


def field(state: Tensor, level: Tensor) -> Tensor:
    """Returns a velocity that is not linear in the state; tokens do not mix."""
    return state - torch.tanh(2.0 * state + 3.0 * level)


def run(make: Callable[[], Any], start: Tensor, first: int = 0, moved: Tensor | None = None) -> Tensor:
    """Returns the end of a scheduler's steps from the step `first` on; at AT `moved` tokens are moved and begun again.

    moved: bool, of the state's shape.
    """
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    if first:
        scheduler.set_begin_index(first)
    state = start
    for index in range(first, STEPS):
        is_here = moved is not None and index == AT
        if moved is not None and is_here:
            state = torch.where(moved, state + 1.0, state)
        with begun_again(scheduler, moved) if moved is not None and is_here else nullcontext():
            velocity = field(state, scheduler.sigmas[index])
            state = scheduler.step(velocity, scheduler.timesteps[index], state, return_dict=False)[0]
    return state


@pytest.mark.parametrize("settings", [{}, {"solver_order": 1}])
@pytest.mark.parametrize("make", [video.unipc, video.dpm])
def test_moved_tokens_are_those_of_a_scheduler_that_begins_there(
    make: Callable[..., Any], settings: dict[str, Any]
) -> None:
    start = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = torch.zeros_like(start, dtype=torch.bool)
    moved[..., ::2] = True
    got = run(lambda: make(**settings), start, moved=moved)
    others = run(lambda: make(**settings), start)
    assert torch.equal(got[~moved], others[~moved])
    # The state at AT, of a scheduler that stops there.
    scheduler = make(**settings)
    scheduler.set_timesteps(STEPS)
    state = start
    for index in range(AT):
        velocity = field(state, scheduler.sigmas[index])
        state = scheduler.step(velocity, scheduler.timesteps[index], state, return_dict=False)[0]
    expected = run(lambda: make(**settings), state + 1.0, first=AT)
    # UniPC that begins there corrects the step after with the weights of the first order, not of the second.
    has_corrector = make is video.unipc and not settings
    assert relative_error(got[moved], expected[moved]) < (1e-3 if has_corrector else 1e-5)
    assert relative_error(others[moved], expected[moved]) > 1e-2


def first_order(make: Callable[..., Any]) -> Any:
    """Returns a scheduler that makes Euler steps."""
    further = {"disable_corrector": list(range(100))} if make is video.unipc else {}
    return make(solver_order=1, **further)


@pytest.mark.parametrize("config", [OWN, OWN.replace(schedule="beta")], ids=["native", "beta"])
@pytest.mark.parametrize("make", [video.unipc, video.dpm])
def test_first_order_of_the_schedulers_own_solver_is_our_step(make: Callable[..., Any], config: Any) -> None:
    pipe = video.wan_pipeline(first_order(make))
    with jitaccel.apply(pipe, config.replace(solver="euler")):
        expected = video.generate(pipe)
    with jitaccel.apply(pipe, config):
        # The scheduler's first level is 1 - 1e-6.
        assert relative_error(video.generate(pipe), expected) < 2e-5


@pytest.mark.parametrize("make", [video.unipc, video.dpm])
def test_schedulers_own_solver_runs_sparse(make: Callable[..., Any]) -> None:
    pipe = video.wan_pipeline(make())
    with jitaccel.apply(pipe, OWN.replace(solver="euler")):
        euler = video.generate(pipe)
    before = dict(vars(pipe.scheduler))
    with jitaccel.apply(pipe, OWN) as handle:
        got = video.generate(pipe)
        assert torch.equal(video.generate(pipe), got)
        assert handle.stats().dense_steps > 0
    assert got.isfinite().all() and relative_error(got, euler) > 1e-3
    assert "convert_model_output" not in vars(pipe.scheduler) and before.keys() == vars(pipe.scheduler).keys()


@pytest.mark.parametrize("make", [video.unipc, video.dpm])
def test_move_survives_the_schedulers_own_solver(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The state from which the step after a move starts is the moved one at activated tokens, and its own elsewhere."""
    from jitaccel.patches.diffusers import latents

    pipe = video.wan_pipeline(make())
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # sample, state of the predictor, activated

    def noted(scheduler: Any, tokens: Tensor) -> Any:
        update = "multistep_uni_p_bh_update" if make is video.unipc else "multistep_dpm_solver_second_order_update"
        original = getattr(scheduler, update)
        convert = scheduler.convert_model_output
        given: list[Tensor] = []

        def predict(*args: Any, **kwargs: Any) -> Tensor:
            kept.append((given[-1], kwargs["sample"].clone(), tokens))
            vars(scheduler).pop(update)
            out: Tensor = original(*args, **kwargs)
            return out

        def converted(*args: Any, sample: Tensor, **kwargs: Any) -> Tensor:
            given.append(sample.clone())
            clean: Tensor = convert(*args, sample=sample, **kwargs)
            return clean

        setattr(scheduler, update, predict)
        scheduler.convert_model_output = converted
        return begun_again(scheduler, tokens)

    monkeypatch.setattr(latents, "begun_again", noted)
    with jitaccel.apply(pipe, OWN):
        video.generate(pipe)
    assert len(kept) == 2
    for sample, predicted_from, tokens in kept:
        assert tokens.any() and not tokens.all()
        assert relative_error(predicted_from[tokens], sample[tokens]) < 2e-6


def test_refused_where_it_cannot_be() -> None:
    with pytest.raises(UnsupportedModelError, match="predict_x0=True, got False"):
        jitaccel.apply(video.wan_pipeline(video.unipc(predict_x0=False)), OWN)
    with pytest.raises(UnsupportedModelError, match="solver_order=1 or 2, got 3"):
        jitaccel.apply(video.wan_pipeline(video.dpm(solver_order=3)), OWN)
    with pytest.raises(ConfigError, match="solver must be 'euler' or 'dpmpp_2m' for a bare network"):
        jitaccel.apply(video.wan_transformer(), SHORT.replace(solver="caller"))
