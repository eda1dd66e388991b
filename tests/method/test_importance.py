"""Local variance of the velocity."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jitaccel.method.importance import importance


def _field(grid: tuple[int, int], batch: int = 2, channels: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], channels, generator=generator)


def _two_pass(velocity: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Returns the variance of the window's values, zeros beyond the border among them, in float64."""
    batch, _, channels = velocity.shape
    image = velocity.double().transpose(1, 2).reshape(batch, channels, *grid)
    patches = F.unfold(image, window, padding=window // 2).view(batch, channels, window**2, -1)
    return patches.var(dim=2, unbiased=False).mean(dim=1)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    window=st.sampled_from([1, 3, 5, 7]),
    seed=st.integers(0, 99),
)
def test_importance_is_the_variance_of_the_zero_padded_window(
    height: int, width: int, window: int, seed: int
) -> None:
    velocity = _field((height, width), seed=seed)
    result = importance(velocity, (height, width), window)
    assert result.dtype == torch.float32
    assert result.shape == (2, height * width)
    expected = _two_pass(velocity, (height, width), window)
    rounding = 16 * torch.finfo(torch.float32).eps  # for a sum of up to 49 squares in any order
    torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=1e-12)


def test_importance_does_not_cancel_under_a_large_mean() -> None:
    grid = (12, 12)
    velocity = 100.0 + 0.01 * _field(grid)
    result = importance(velocity, grid).double()
    torch.testing.assert_close(result, _two_pass(velocity, grid, 3), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("value", [0.1, -3.0])
def test_importance_of_a_constant_field_is_the_padding_at_the_border(value: float) -> None:
    result = importance(torch.full((1, 30, 4), value), (5, 6))[0].view(5, 6)
    edge, corner = value**2 * 6 / 9 * 3 / 9, value**2 * 4 / 9 * 5 / 9
    assert result[1:-1, 1:-1].abs().max() < 1e-12
    assert result[0, 1:-1].tolist() == pytest.approx([edge] * 4)
    assert result[1:-1, -1].tolist() == pytest.approx([edge] * 3)
    assert [float(result[y, x]) for y in (0, -1) for x in (0, -1)] == pytest.approx([corner] * 4)


def test_importance_is_never_negative() -> None:
    # In float64 the two moments of this constant round to a difference below zero.
    assert importance(torch.full((1, 400, 8), 0.1, dtype=torch.float64), (20, 20)).min() >= 0.0


def test_importance_of_a_batch_equals_importance_of_each_image() -> None:
    velocity = _field((6, 7), batch=3)
    alone = [importance(velocity[i : i + 1], (6, 7)) for i in range(3)]
    assert torch.equal(importance(velocity, (6, 7)), torch.cat(alone))


def test_importance_reads_a_transposed_half_precision_tensor() -> None:
    velocity = _field((6, 7)).bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    assert not velocity.is_contiguous()
    expected = _two_pass(velocity, (6, 7), 3)
    torch.testing.assert_close(importance(velocity, (6, 7)).double(), expected, rtol=1e-6, atol=0.0)


def test_importance_passes_on_what_is_not_finite() -> None:
    velocity = _field((6, 7))
    velocity[0, 8, 1] = float("nan")
    assert bool(importance(velocity, (6, 7))[0].isnan().any())


def test_importance_does_not_write_its_input() -> None:
    velocity = _field((6, 7))
    before = velocity.clone()
    importance(velocity.double(), (6, 7))
    importance(velocity, (6, 7))
    assert torch.equal(velocity, before)


def test_importance_refuses_a_wrong_grid_or_window() -> None:
    with pytest.raises(ValueError, match=r"velocity must be \(B, 30, D\)"):
        importance(_field((6, 6)), (5, 6))
    with pytest.raises(ValueError, match="window must be odd"):
        importance(_field((6, 6)), (6, 6), window=2)
