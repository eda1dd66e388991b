"""Inputs of the CUDA operators, made on the CPU, and how their outputs are compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jitaccel import ops
from jitaccel.ops import reference

DEVICE = "cuda"


def size_of(grid: tuple[int, ...]) -> int:
    return math.prod(grid)


def counts_of(num_tokens: int) -> list[int]:
    return sorted({1, max(1, num_tokens // 3), max(1, num_tokens - 1), num_tokens})


def rows_of(batch: int, num_tokens: int, count: int, seed: int = 0) -> Tensor:
    """Returns `count` rising tokens for each image."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / max(radius / 3, 1.0)).square())
    return weights / weights.sum()


def plan_of(grid: tuple[int, ...], count: int, batch: int = 2, radius: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Returns nearest, anchors and weights, on the CPU."""
    anchors = rows_of(batch, size_of(grid), count)
    return reference.nearest_anchor(anchors, grid), anchors, weights_of(radius)


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in tensors)


def lift_there(values: Tensor, nearest: Tensor, anchors: Tensor, grid: tuple[int, ...], weights: Tensor) -> Tensor:
    """Returns the lift of CPU tensors, taken on the GPU."""
    values, nearest, anchors, weights = on_device(values, nearest, anchors, weights)
    return ops.lift(values, nearest, anchors, grid, weights)


def assert_as_exact(result: Tensor, exact: Tensor, plain: Tensor) -> None:
    """`exact` in float64, `plain`: plain torch's, of the dtype of `result`."""
    assert result.dtype == plain.dtype
    error, allowed = ((x.cpu().double() - exact).abs().max().item() for x in (result, plain))
    assert error <= 2 * allowed + 1e-6 * max(1.0, exact.abs().max().item())


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def values_at(x: Tensor, tokens: Tensor) -> Tensor:
    """Returns the tokens' values without touching their bits, on the CPU."""
    return torch.stack([image[row] for image, row in zip(x.cpu(), tokens.cpu(), strict=True)])
