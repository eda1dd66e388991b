"""The move of newly activated tokens: target, blend, and tokens that do not move."""

import pytest
import torch
from torch import Tensor

from jitaccel.method.lift import LiftPlan, make_lift_plan
from jitaccel.method.microflow import micro_flow
from jitaccel.tokens import gather_tokens, scatter_tokens
from tests.support.reference import clean_estimate, target_state

TOKENS = torch.tensor([[1, 5, 11], [0, 2, 3]])
LEVELS = (0.6, 0.25)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _plan() -> LiftPlan:
    return make_lift_plan(torch.tensor([[0, 4, 10], [4, 6, 11]]), (3, 4))


def _fields(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, state before, velocity and noise."""
    fields = [_randn(2, 12, 4, seed=seed).to(dtype) for seed in range(4)]
    return fields[0], fields[1], fields[2], fields[3]


def _target(dtype: torch.dtype = torch.float64, levels: tuple[float, float] = LEVELS) -> Tensor:
    """Returns the target at the tokens, in float64, of the same fields."""
    _, previous, velocity, noise = (field.double() for field in _fields())
    clean = gather_tokens(clean_estimate(previous, velocity, levels[0]), _plan().anchors)
    return gather_tokens(target_state(clean, _plan(), noise, levels[1]), TOKENS).to(dtype)


def _moved(fields: tuple[Tensor, ...], weight: float, levels: tuple[float, float] = LEVELS) -> Tensor:
    return micro_flow(*fields, TOKENS, _plan(), levels, weight)


@pytest.mark.parametrize("levels", [LEVELS, (1.0, 0.999), (0.3, 0.0), (1.0, 1.0)])
def test_move_of_weight_one_takes_tokens_to_their_target(levels: tuple[float, float]) -> None:
    moved = _moved(_fields(), 1.0, levels)
    torch.testing.assert_close(gather_tokens(moved, TOKENS).double(), _target(levels=levels), rtol=1e-6, atol=1e-6)


def test_move_to_level_one_ends_in_noise_and_to_level_zero_in_the_prior() -> None:
    fields = _fields()
    noise = gather_tokens(fields[3], TOKENS)
    torch.testing.assert_close(gather_tokens(_moved(fields, 1.0, (0.6, 1.0)), TOKENS), noise)
    without_noise = (*fields[:3], torch.full_like(fields[3], 1e6))
    assert torch.equal(_moved(fields, 1.0, (0.6, 0.0)), _moved(without_noise, 1.0, (0.6, 0.0)))


def test_move_of_weight_one_forgets_a_state_that_overflowed() -> None:
    state, *others = _fields()
    moved = _moved((torch.full_like(state, torch.inf), *others), 1.0)
    assert torch.equal(gather_tokens(moved, TOKENS), gather_tokens(_moved(_fields(), 1.0), TOKENS))


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_move_leaves_other_tokens_and_its_inputs_alone(weight: float, dtype: torch.dtype) -> None:
    fields = _fields(dtype)
    before = [field.clone() for field in fields]
    moved = _moved(fields, weight)
    others = ~scatter_tokens(torch.ones(2, 3, 4), TOKENS, 12).bool()
    assert moved.dtype == dtype
    assert torch.equal(moved[others], before[0][others])
    assert all(torch.equal(*pair) for pair in zip(fields, before, strict=True))


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 0.9])
def test_move_blends_by_weight(weight: float) -> None:
    fields = _fields()
    expected = (1 - weight) * gather_tokens(fields[0], TOKENS).double() + weight * _target()
    torch.testing.assert_close(gather_tokens(_moved(fields, weight), TOKENS).double(), expected, rtol=1e-6, atol=1e-6)


def test_move_keeps_the_states_dtype_and_rounds_once() -> None:
    state, *others = _fields()
    moved = _moved((state.bfloat16(), *others), 1 / 3)
    exact = gather_tokens(state.bfloat16().double(), TOKENS) * 2 / 3 + _target() / 3
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(gather_tokens(moved, TOKENS).double(), exact, rtol=2.0**-8, atol=1e-6)


def test_move_reads_transposed_fields() -> None:
    fields = _fields()
    transposed = tuple(field.transpose(1, 2).contiguous().transpose(1, 2) for field in fields)
    assert torch.equal(_moved(transposed, 1 / 3), _moved(fields, 1 / 3))


def test_move_of_no_tokens_returns_the_state() -> None:
    fields = _fields()
    assert torch.equal(micro_flow(*fields, TOKENS[:, :0], _plan(), LEVELS, 1.0), fields[0])


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_move_refuses_a_weight_that_is_no_share(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\]"):
        _moved(_fields(), weight)
