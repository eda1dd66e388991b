"""Picking tokens out of a grid, and putting them back: one row of raster indices for each image."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, anchors: Tensor) -> Tensor:
    """Returns the tokens of `x` (B, N, ...) at `anchors` (B, M), as `(B, M, ...)`; indices may repeat."""
    flat = x.flatten(0, 1)
    return flat.index_select(0, _flat_index(anchors, x.shape[1])).view(*anchors.shape, *x.shape[2:])


def scatter_tokens(values: Tensor, anchors: Tensor, num_tokens: int) -> Tensor:
    """Returns `(B, num_tokens, ...)` with `values` (B, M, ...) at `anchors` (B, M) and zeros elsewhere."""
    return put_tokens_(values.new_zeros(values.shape[0], num_tokens, *values.shape[2:]), values, anchors)


def put_tokens_(x: Tensor, values: Tensor, anchors: Tensor) -> Tensor:
    """Returns the contiguous `x` (B, N, ...) after writing `values` (B, M, ...) at `anchors` (B, M)."""
    x.flatten(0, 1).index_copy_(0, _flat_index(anchors, x.shape[1]), values.flatten(0, 1))
    return x


def _flat_index(anchors: Tensor, num_tokens: int) -> Tensor:
    # One index over the flattened batch: index_select copies whole rows, gather reads element by element.
    starts = torch.arange(anchors.shape[0], device=anchors.device) * num_tokens
    return (anchors + starts[:, None]).flatten()
