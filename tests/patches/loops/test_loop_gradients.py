"""Gradients through a patched network in a custom loop are those of its pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig, noise_levels
from jitaccel.method import run
from tests.support import tiny
from tests.support.tiny import SHORT, relative_error
from tests.support.transformer_loop import CLEAN, Loop

_STEP = 1e-3  # of finite differences


@pytest.fixture
def same_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random choices follow from the bits of the start; a derivative is of one and the same choice."""
    monkeypatch.setattr(run, "state_seeds", lambda state: [7] * state.shape[0])


def _score(loop: Loop, config: JiTConfig, start: Tensor, order: str) -> Tensor:
    final = loop.run(noise_levels(config), start, order)[-1]
    weights = torch.randn(final.shape, generator=torch.Generator().manual_seed(5))
    return (final * weights).sum()


@pytest.mark.parametrize("order", ["none", "positive first", "batch"])
@pytest.mark.parametrize(
    "config",
    [SHORT, CLEAN, SHORT.replace(noise="own"), SHORT.replace(solver="dpmpp_2m")],
    ids=["exact", "clean", "own", "dpmpp_2m"],
)
@pytest.mark.parametrize("execution", ["packed", "indexed"])
def test_gradient_of_the_start_is_that_of_finite_differences(
    same_choices: None, execution: Any, config: JiTConfig, order: str
) -> None:
    loop, start = Loop(), tiny.start()
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(3))
    with jitaccel.apply(loop.model, config, execution=execution) as handle:
        around = []
        for sign in (-1, 1):
            around.append(_score(loop, config, start + sign * _STEP * direction, order).double())
            handle.reset()
        expected = (around[1] - around[0]) / (2 * _STEP)
        loop.has_gradients = True
        start.requires_grad_()
        _score(loop, config, start, order).backward()
    assert start.grad is not None
    assert abs((start.grad * direction).sum() - expected) < 2e-2 * start.grad.norm()


def test_branch_given_as_another_tensor_has_a_gradient_of_its_own() -> None:
    loop, level = Loop(), torch.ones(1)
    loop.has_gradients = True
    first, second = tiny.start().requires_grad_(), tiny.start().requires_grad_()
    with jitaccel.apply(loop.model, SHORT):
        loop.velocity(first, float(level), 0)
        loop.velocity(second, float(level), 1).sum().backward()
    assert first.grad is None or not first.grad.any()
    assert second.grad is not None and second.grad.any()


def test_gradient_of_weights_reaches_the_first_step(same_choices: None) -> None:
    """Every later step depends on the first one's velocity."""
    loop, start = Loop(), tiny.start()
    loop.has_gradients = True
    bias = loop.model.proj_out.bias
    with jitaccel.apply(loop.model, SHORT) as handle:
        around = []
        for sign in (-1, 1):
            with torch.no_grad():
                bias.add_(sign * _STEP)
                around.append(_score(loop, SHORT, start, "none").double())
                bias.sub_(sign * _STEP)
            handle.reset()
        _score(loop, SHORT, start, "none").backward()
    expected = (around[1] - around[0]) / (2 * _STEP)
    assert abs(bias.grad.sum() - expected) < 2e-2 * abs(expected)


def test_picture_is_the_same_with_and_without_gradients() -> None:
    loop, levels = Loop(), noise_levels(SHORT)
    with jitaccel.apply(loop.model, SHORT):
        expected = loop.run(levels, tiny.start())[-1]
        loop.has_gradients = True
        found = loop.run(levels, tiny.start().requires_grad_())[-1]
    assert relative_error(found.detach(), expected) < 1e-5
