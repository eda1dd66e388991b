"""Clean estimate, target state and the move of newly activated tokens."""

import pytest
import torch
from torch import Tensor

from jitaccel.anchors import gather_tokens, scatter_tokens
from jitaccel.lift import LiftPlan, lift, make_lift_plan
from jitaccel.microflow import clean_estimate, move, target_state

TOKENS = torch.tensor([[1, 5, 11], [0, 2, 3]])
TWO_STATES = ((2, 12, 4), (2, 12, 4))


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _plan() -> LiftPlan:
    return make_lift_plan(torch.tensor([[0, 4, 10], [1, 6, 11]]), (3, 4))


@pytest.mark.parametrize("level", [1.0, 0.4, 0.0])
def test_clean_estimate_undoes_the_flow(level: float) -> None:
    clean, noise = _randn(2, 12, 4).double(), _randn(2, 12, 4, seed=1).double()
    state = (1 - level) * clean + level * noise
    torch.testing.assert_close(clean_estimate(state, noise - clean, level), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clean_estimate_of_halves_is_computed_in_float32(dtype: torch.dtype) -> None:
    state, velocity = _randn(2, 12, 4).to(dtype), _randn(2, 12, 4, seed=1).to(dtype)
    result = clean_estimate(state, velocity, 0.3)
    assert result.dtype == torch.float32
    assert torch.equal(result, clean_estimate(state.float(), velocity.float(), 0.3))


def test_target_state_is_the_lifted_clean_estimate_renoised() -> None:
    plan, clean, noise = _plan(), _randn(2, 3, 4), _randn(2, 12, 4, seed=1)
    expected = 0.75 * lift(clean, plan) + 0.25 * noise
    torch.testing.assert_close(target_state(clean, plan, noise, 0.25), expected)


def test_target_state_ends_in_noise_and_in_the_prior() -> None:
    plan, clean, noise = _plan(), _randn(2, 3, 4), _randn(2, 12, 4, seed=1)
    assert torch.equal(target_state(clean, plan, noise, 1.0), noise)
    assert torch.equal(target_state(clean, plan, noise, 0.0), lift(clean, plan))


def test_target_state_of_halves_is_computed_in_float32() -> None:
    plan, clean, noise = _plan(), _randn(2, 3, 4).bfloat16(), _randn(2, 12, 4, seed=1).bfloat16()
    result = target_state(clean, plan, noise, 0.25)
    assert result.dtype == torch.float32
    assert torch.equal(result, target_state(clean.float(), plan, noise.float(), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_move_of_weight_one_assigns_the_target_bit_for_bit(dtype: torch.dtype) -> None:
    state, target = (_randn(*shape, seed=i).to(dtype) for i, shape in enumerate(TWO_STATES))
    moved = move(state, target, TOKENS, 1.0)
    assert moved.dtype == dtype
    assert torch.equal(gather_tokens(moved, TOKENS), gather_tokens(target, TOKENS))


def test_move_of_weight_one_forgets_a_state_that_overflowed() -> None:
    target = _randn(2, 12, 4)
    moved = move(torch.full_like(target, torch.inf), target, TOKENS, 1.0)
    assert torch.equal(gather_tokens(moved, TOKENS), gather_tokens(target, TOKENS))


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 1.0])
def test_move_leaves_other_tokens_and_its_inputs_alone(weight: float) -> None:
    state, target = (_randn(*shape, seed=i) for i, shape in enumerate(TWO_STATES))
    state_before, target_before = state.clone(), target.clone()
    moved = move(state, target, TOKENS, weight)
    others = ~scatter_tokens(torch.ones(2, 3, 4), TOKENS, 12).bool()
    assert torch.equal(moved[others], state_before[others])
    assert moved.data_ptr() != state.data_ptr()
    assert torch.equal(state, state_before)
    assert torch.equal(target, target_before)


def test_move_blends_by_weight() -> None:
    state, target = (_randn(*shape, seed=i) for i, shape in enumerate(TWO_STATES))
    moved = gather_tokens(move(state, target, TOKENS, 1 / 3), TOKENS)
    expected = gather_tokens(state, TOKENS) * 2 / 3 + gather_tokens(target, TOKENS) / 3
    torch.testing.assert_close(moved, expected)


def test_move_of_weight_zero_moves_nothing() -> None:
    state, target = (_randn(*shape, seed=i) for i, shape in enumerate(TWO_STATES))
    assert torch.equal(move(state, target, TOKENS, 0.0), state)


def test_move_keeps_the_states_dtype_and_blends_in_float32() -> None:
    state, target = _randn(2, 12, 4).bfloat16(), _randn(2, 12, 4, seed=1)
    moved = move(state, target, TOKENS, 1 / 3)
    exact = gather_tokens(state.double(), TOKENS) * 2 / 3 + gather_tokens(target.double(), TOKENS) / 3
    assert moved.dtype == torch.bfloat16
    # One rounding to bfloat16, and no more.
    torch.testing.assert_close(gather_tokens(moved, TOKENS).double(), exact, rtol=2.0**-8, atol=1e-6)


def test_move_reads_a_transposed_state() -> None:
    state, target = _randn(2, 4, 12).transpose(1, 2), _randn(2, 12, 4, seed=1)
    assert torch.equal(move(state, target, TOKENS, 1 / 3), move(state.contiguous(), target, TOKENS, 1 / 3))


def test_move_of_no_tokens_returns_the_state() -> None:
    state, target = (_randn(*shape, seed=i) for i, shape in enumerate(TWO_STATES))
    assert torch.equal(move(state, target, TOKENS[:, :0], 1.0), state)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_move_refuses_a_weight_that_is_no_share(weight: float) -> None:
    state = torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\]"):
        move(state, state, torch.tensor([[0]]), weight)
