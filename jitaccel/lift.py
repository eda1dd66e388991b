"""From the anchors to every token: nearest fill, Gaussian blur, anchors kept."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .anchors import check_anchors, gather_tokens, put_tokens_


@dataclass(frozen=True, eq=False)
class LiftPlan:
    """What `lift` needs to know of a stage, built once a stage by `make_lift_plan`.

    grid: (grid_h, grid_w). anchors: (B, M) int64, sorted. nearest: (B, N) int64, index among the M anchors of
    the one nearest to each token. row_blur: (grid_h, grid_h) and column_blur: (grid_w, grid_w) float32, the
    blur along each axis with its reflection at the border.
    """

    grid: tuple[int, int]
    anchors: Tensor
    nearest: Tensor
    row_blur: Tensor
    column_blur: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether every token is an anchor, so that there is nothing to lift."""
        return self.anchors.shape[1] == self.nearest.shape[1]


def nearest_anchor(anchors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns for each token which anchor is nearest, `(B, N)` int64, as an index into the M anchors.

    Euclidean distance on the grid, exact; ties go to the anchor with the lowest raster index. Separable:
    the nearest anchor within each row, then the best over rows at growing offsets, until no row can be
    nearer. O(N) memory, where the released code builds an N x M matrix at every step.

    anchors: (B, M) int64, sorted. grid: (grid_h, grid_w).
    """
    height, width = grid
    num_tokens = height * width
    check_anchors("nearest_anchor", anchors, num_tokens)
    is_anchor = torch.zeros(anchors.shape[0], num_tokens, dtype=torch.bool, device=anchors.device)
    is_anchor.scatter_(1, anchors, True)
    row_keys = _row_keys(is_anchor.view(-1, height, width))
    keys = row_keys.clone()
    for offset in range(1, height):
        # Equal distance may still win its tie: stop only where every farther row is strictly farther.
        if offset * offset > int(keys.max()) // num_tokens:
            break
        shifted = row_keys + offset * offset * num_tokens
        torch.minimum(keys[:, offset:], shifted[:, :-offset], out=keys[:, offset:])
        torch.minimum(keys[:, :-offset], shifted[:, offset:], out=keys[:, :-offset])
    order = is_anchor.cumsum(dim=1) - 1
    return order.gather(1, keys.flatten(1) % num_tokens)


def _row_keys(is_anchor: Tensor) -> Tensor:
    """Returns `distance^2 * N + raster index` of the nearest anchor in each token's own row, (B, h, w).

    The smallest key is the nearest anchor, and among equals the lowest raster index. A row without an
    anchor gets a distance beyond every one on the grid.
    """
    _, height, width = is_anchor.shape
    columns = torch.arange(width, device=is_anchor.device)
    rows = torch.arange(height, device=is_anchor.device)[:, None]
    beyond = 2 * (height + width)
    left = torch.where(is_anchor, columns, -beyond).cummax(dim=2).values
    right = torch.where(is_anchor, columns, width + beyond).flip(2).cummin(dim=2).values.flip(2)
    column = torch.where(right - columns < columns - left, right, left)
    return (column - columns).square() * (height * width) + rows * width + column.clamp(0, width - 1)


def blur_weights(density: float, blur_scale: float = 0.4) -> Tensor:
    """Returns the Gaussian's weights, `(2 * ceil(3 s) + 1,)` float64, of sum 1.

    s = clip(blur_scale / sqrt(density), 1, 10) tokens, density = M / N (arXiv:2603.10744, SAG-ODE).
    """
    sigma = min(max(blur_scale / math.sqrt(density), 1.0), 10.0)
    radius = math.ceil(3.0 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    return weights / weights.sum()


def _blur_matrix(weights: Tensor, size: int) -> Tensor:
    """Returns the `(size, size)` float32 matrix that blurs an axis, reflected at its ends.

    The reflection repeats where the axis is shorter than the kernel; torch's reflect padding refuses that.
    """
    radius = len(weights) // 2
    period = max(2 * (size - 1), 1)
    folded = (torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)) % period
    sources = torch.minimum(folded, period - folded)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, weights.expand(size, -1)).float()


def make_lift_plan(anchors: Tensor, grid: tuple[int, int], blur_scale: float = 0.4) -> LiftPlan:
    """Returns the plan that lifts from `anchors` (B, M) int64, sorted, to a `(grid_h, grid_w)` grid.

    All tensors live on the anchors' device. Raises ValueError for anchors that are unsorted or off the grid.
    """
    nearest = nearest_anchor(anchors, grid)
    weights = blur_weights(anchors.shape[1] / nearest.shape[1], blur_scale)
    row_blur = _blur_matrix(weights, grid[0]).to(anchors.device)
    column_blur = _blur_matrix(weights, grid[1]).to(anchors.device)
    return LiftPlan(grid=grid, anchors=anchors, nearest=nearest, row_blur=row_blur, column_blur=column_blur)


def lift(values: Tensor, plan: LiftPlan) -> Tensor:
    """Returns `values` at every token, `(B, N, D)` in their dtype; anchors keep theirs bit for bit.

    The interpolation I_k and the prior Phi_k (SAG-ODE, arXiv:2603.10744): each token takes the value of its
    nearest anchor, the grid is blurred, anchors take their own value back. Departs from the released code in
    using each image's own anchors. The blur is two products with banded matrices in float32 (float64 for
    float64 values), outside autocast; it follows `torch.set_float32_matmul_precision`, and a NaN or
    infinity spreads along its row and column. With every token an anchor, `values` itself is returned.

    values: (B, M, D) at `plan.anchors`.
    """
    if values.ndim != 3 or values.shape[:2] != plan.anchors.shape:
        raise ValueError(
            f"lift: values must be (B, M, D) with (B, M) = {tuple(plan.anchors.shape)}, got "
            f"{tuple(values.shape)}; pass the values at the plan's anchors"
        )
    if plan.is_dense:
        return values
    batch, _, channels = values.shape
    height, width = plan.grid
    dtype = torch.promote_types(values.dtype, torch.float32)
    filled = gather_tokens(values, plan.nearest).to(dtype)
    with torch.autocast(values.device.type, enabled=False):
        blurred = plan.row_blur.to(dtype) @ filled.view(batch, height, width * channels)
        blurred = plan.column_blur.to(dtype) @ blurred.view(batch * height, width, channels)
    return put_tokens_(blurred.view(batch, height * width, channels).to(values.dtype), values, plan.anchors)


def lift_velocity(
    values: Tensor,
    state: Tensor,
    level: float,
    plan: LiftPlan,
    lifter: Literal["velocity", "clean"] = "velocity",
) -> Tensor:
    """Returns the velocity at every token, `(B, N, D)` in the dtype of `values`.

    "velocity" lifts the velocity (I_k of the SAG-ODE, arXiv:2603.10744). "clean", a variant of ours, lifts
    the clean estimate `x0 = y - level * v` and takes `v_i = (y_i - x0_i) / level`, so that an inactive token
    keeps its own noise. Anchors keep their velocity bit for bit in both.

    values: (B, M, D) velocity at the anchors. state: (B, N, D) at every token. level: noise level of the
    state; above 0 for "clean".
    """
    if lifter == "velocity" or plan.is_dense:
        return lift(values, plan)
    if lifter != "clean":
        raise ValueError(f'lift_velocity: lifter must be "velocity" or "clean", got {lifter!r}; choose one')
    if not level > 0.0:
        raise ValueError(f"lift_velocity: level must be above 0 to lift the clean estimate, got {level}")
    dtype = torch.promote_types(torch.promote_types(values.dtype, state.dtype), torch.float32)
    clean_at_anchors = gather_tokens(state, plan.anchors).to(dtype) - level * values.to(dtype)
    velocity = (state.to(dtype) - lift(clean_at_anchors, plan)) / level
    return put_tokens_(velocity.to(values.dtype).contiguous(), values, plan.anchors)
