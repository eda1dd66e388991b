"""Reference implementations in plain torch. They run where nothing is compiled, and tests compare against them.

Grids are (h, w) or (t, h, w); with `stack`, operators stay within each frame of the latter. Callers check shapes
(`jitaccel.ops`, or tracing); values are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import gather_tokens, put_tokens_
from .schema import num_stacked, num_tokens_of, pooled_grid, refuse_empty_frame


def nearest_anchor(anchors: Tensor, grid: Sequence[int], stack: bool = False) -> Tensor:
    """Separable: finds the nearest anchor within each row, then the best along each further axis at growing offsets,
    until no farther one can be nearer. O(N) memory; the released code builds an N x M matrix at every step."""
    num_tokens = num_tokens_of(grid)
    check_rows("nearest_anchor", anchors, num_tokens)
    if stack:
        check_frames("nearest_anchor", anchors, grid)
    is_anchor = torch.zeros(anchors.shape[0], num_tokens, dtype=torch.bool, device=anchors.device)
    is_anchor.scatter_(1, anchors, True)
    keys = _row_keys(is_anchor.view(anchors.shape[0], *grid))
    for axis in range(len(grid) - 1, num_stacked(grid, stack), -1):
        keys = _nearest_along(keys, axis, num_tokens)
    order = is_anchor.cumsum(dim=1) - 1
    return order.gather(1, keys.flatten(1) % num_tokens)


def check_rows(operator: str, tokens: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless the rows of `tokens` (B, M) rise within 0..N - 1. Waits for the device."""
    if tokens.numel() == 0:
        return
    is_sorted = bool((tokens[:, 1:] > tokens[:, :-1]).all())
    if not is_sorted or int(tokens[:, 0].min()) < 0 or int(tokens[:, -1].max()) >= num_tokens:
        raise ValueError(
            f"{operator}: anchors must rise strictly within 0..{num_tokens - 1}, got a row that does not; "
            f"sort them and check the grid"
        )


def check_frames(operator: str, anchors: Tensor, grid: Sequence[int]) -> None:
    """Raises ValueError unless the anchors (B, M) include a token of every frame of (t, h, w). Waits for the device."""
    if len(grid) == 2 or anchors.numel() == 0:
        return
    frames = torch.zeros(anchors.shape[0], grid[0], dtype=torch.bool, device=anchors.device)
    empty = (~frames.scatter_(1, anchors // num_tokens_of(grid[1:]), True)).nonzero()
    if len(empty):
        image, frame = empty[0].tolist()
        refuse_empty_frame(operator, f"none in frame {frame} of image {image}")


def _row_keys(is_anchor: Tensor) -> Tensor:
    """Returns `distance^2 * N + raster index` of the nearest anchor in each token's own row, of shape (B, *grid).

    The smallest key is the nearest anchor, with ties going to the lowest raster index. A row without an anchor gets a
    distance larger than any on the grid.
    """
    grid = is_anchor.shape[1:]
    num_tokens, width = num_tokens_of(grid), grid[-1]
    columns = torch.arange(width, device=is_anchor.device)
    row_starts = torch.arange(0, num_tokens, width, device=is_anchor.device).view(*grid[:-1], 1)
    beyond = 2 * sum(grid)
    left = torch.where(is_anchor, columns, -beyond).cummax(dim=-1).values
    right = torch.where(is_anchor, columns, width + beyond).flip(-1).cummin(dim=-1).values.flip(-1)
    column = torch.where(right - columns < columns - left, right, left)
    return (column - columns).square() * num_tokens + row_starts + column.clamp(0, width - 1)


def _nearest_along(keys: Tensor, axis: int, num_tokens: int) -> Tensor:
    size, best = keys.shape[axis], keys.clone()
    for offset in range(1, size):
        # A farther row may have equal distance and win the tie: stop only where every farther row is strictly farther.
        if best.numel() == 0 or offset * offset > int(best.max()) // num_tokens:
            break
        shifted = keys + offset * offset * num_tokens
        for there, here in ((0, offset), (offset, 0)):
            part = best.narrow(axis, there, size - offset)
            torch.minimum(part, shifted.narrow(axis, here, size - offset), out=part)
    return best


def blur_matrix(weights: Tensor, size: int) -> Tensor:
    """Returns the `(size, size)` matrix, in the weights' dtype, that blurs an axis, reflected at its ends.

    The reflection repeats if the axis is shorter than the kernel, which torch's reflect padding does not support.
    """
    radius = weights.shape[0] // 2
    period = max(2 * (size - 1), 1)
    tokens = torch.arange(size, device=weights.device)
    folded = (tokens[:, None] + torch.arange(-radius, radius + 1, device=weights.device)) % period
    sources = torch.minimum(folded, period - folded)
    return weights.new_zeros(size, size).scatter_add(1, sources, weights.expand(size, -1))


def lift(
    values: Tensor, nearest: Tensor, anchors: Tensor, grid: Sequence[int], weights: Tensor, stack: bool = False
) -> Tensor:
    """Blurs by one product with a banded matrix along each axis, outside autocast, in float32 (float64 for float64).

    Follows `torch.set_float32_matmul_precision`. A NaN or infinity spreads along the axes.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    blurred = gather_tokens(values, nearest).to(dtype)
    shape = blurred.shape
    if blurred.numel() == 0:
        return blurred.to(values.dtype)
    first = num_stacked(grid, stack)
    lines, rest = shape[0] * num_tokens_of(grid[:first]), num_tokens_of(grid[first:]) * shape[2]
    with torch.autocast(values.device.type, enabled=False):
        for size in grid[first:]:
            rest //= size
            blurred = blur_matrix(weights.to(dtype), size) @ blurred.reshape(lines, size, rest)
            lines *= size
    return put_tokens_(blurred.reshape(shape).to(values.dtype), values, anchors)


def lift_clean(
    values: Tensor,
    state: Tensor,
    nearest: Tensor,
    anchors: Tensor,
    grid: Sequence[int],
    weights: Tensor,
    level: Tensor | float,
    stack: bool = False,
    lift: Callable[[Tensor, Tensor, Tensor, Sequence[int], Tensor, bool], Tensor] = lift,
) -> Tensor:
    """Returns the velocity (B, N, D), in the dtype of `values`, whose clean estimate is lifted from the anchors."""
    dtype = torch.promote_types(torch.promote_types(values.dtype, state.dtype), torch.float32)
    at_anchors = gather_tokens(state, anchors).to(dtype) - level * values.to(dtype)
    # In place: on a CPU each new tensor of this size costs as much as an operation.
    velocity = lift(at_anchors, nearest, anchors, grid, weights, stack).neg_().add_(state).div_(level)
    return put_tokens_(velocity.to(values.dtype).contiguous(), values, anchors)


def importance(velocity: Tensor, grid: Sequence[int], window: int = 3, stack: bool = False) -> Tensor:
    """Takes the two moments in float64, where the square of a float32 is exact: their difference keeps float32 accuracy
    down to a standard deviation of about 1e-4 of the mean."""
    # MPS has no float64, and this runs only once per stage, so use the CPU.
    device = torch.device("cpu") if velocity.device.type == "mps" else velocity.device
    first = num_stacked(grid, stack)
    frames = velocity.shape[0] * num_tokens_of(grid[:first])
    field = velocity.to(device).double().reshape(frames, *grid[first:], velocity.shape[2])
    size = window ** len(grid[first:])
    mean = _window_sum(field, window) / size
    # The mean over channels and the window sum commute, so the second moment needs only one channel.
    mean_square = _window_sum(field.square().mean(dim=-1, keepdim=True), window) / size
    variance = mean_square.squeeze(-1) - mean.square().mean(dim=-1)
    return variance.clamp_min(0.0).reshape(velocity.shape[:2]).to(velocity.device, torch.float32)


def _window_sum(field: Tensor, window: int) -> Tensor:
    """Returns the sums of `field` (B, *grid, D) over windows, with zeros beyond the border."""
    reach = window // 2
    for axis in range(1, field.ndim - 1):
        size = field.shape[axis]
        padded = F.pad(field, (0, 0) * (field.ndim - 1 - axis) + (reach, reach))
        field = padded.narrow(axis, 0, size).clone()
        for offset in range(1, window):
            field += padded.narrow(axis, offset, size)
    return field


def activate(importance: Tensor, anchors: Tensor, count: int) -> Tensor:
    check_rows("activate", anchors, importance.shape[1])
    inactive_importance = importance.scatter(1, anchors, -torch.inf)
    ranking = inactive_importance.argsort(dim=1, descending=True, stable=True)
    return ranking[:, :count].sort(dim=1).values


def micro_flow_into(
    state: Tensor,
    previous: Tensor,
    velocity: Tensor,
    noise: Tensor,
    tokens: Tensor,
    nearest: Tensor,
    anchors: Tensor,
    grid: Sequence[int],
    weights: Tensor,
    levels: Tensor,
    weight: float,
    stack: bool = False,
) -> None:
    dtype = torch.promote_types(torch.promote_types(state.dtype, previous.dtype), torch.float32)
    level, next_level = levels[0], levels[1]
    x, v = (gather_tokens(part, anchors).to(dtype) for part in (previous, velocity))
    prior = lift(x - level * v, nearest, anchors, grid, weights, stack)
    target = (1.0 - next_level) * gather_tokens(prior, tokens) + next_level * gather_tokens(noise, tokens).to(dtype)
    if weight != 1.0:
        target = (1.0 - weight) * gather_tokens(state, tokens).to(dtype) + weight * target
    put_tokens_(state, target.to(state.dtype), tokens)


def pool(x: Tensor, grid: Sequence[int], patch: int, factor: int, level: Tensor | None = None) -> Tensor:
    """Averages in float32 (float64 for float64), divided once by `1 - level + level / factor`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_empty(x.shape[0], num_tokens_of(pooled_grid(grid, factor)), x.shape[2])
    latents = _latents(x.to(dtype), grid, patch)
    means = F.avg_pool2d(_repeated(latents, factor), factor)
    if level is not None:
        means = means / (1.0 - level + level / factor)
    return _tokens(_repeated(means, patch), x.shape[0], pooled_grid(grid, factor), patch).to(x.dtype)


def lift_pooled(
    values: Tensor, pooled: Tensor, state: Tensor, grid: Sequence[int], patch: int, factor: int, level: Tensor
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(values.dtype, state.dtype), torch.float32)
    if state.numel() == 0:
        return values.new_empty(state.shape)
    clean = pooled.to(dtype) - level / factor / (1.0 - level + level / factor) * values.to(dtype)
    small, sides = _latents(clean, pooled_grid(grid, factor), patch), [size * patch for size in grid[-2:]]
    rows, columns = (-(-side // factor) for side in sides)
    size = (rows * factor, columns * factor)
    large = F.interpolate(small[..., :rows, :columns], size=size, mode="bilinear", align_corners=False)
    lifted = _tokens(large[..., : sides[0], : sides[1]], state.shape[0], grid, patch)
    return ((state.to(dtype) - lifted) / level).to(values.dtype)


def _latents(x: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """Returns the latents (B * frames, channels, rows, columns) of tokens (B, N, channels * patch * patch)."""
    rows, columns = grid[-2:]
    parts = x.reshape(x.shape[0] * num_tokens_of(grid[:-2]), rows, columns, -1, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _tokens(latents: Tensor, batch: int, grid: Sequence[int], patch: int) -> Tensor:
    """Returns the tokens (B, N, channels * patch * patch) of latents (B * frames, channels, rows, columns)."""
    rows, columns = grid[-2:]
    parts = latents.reshape(*latents.shape[:2], rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(batch, num_tokens_of(grid), latents.shape[1] * patch**2)


def _repeated(latents: Tensor, multiple: int) -> Tensor:
    """Returns latents padded to a multiple of a side by repeating the last row and column."""
    missing = [-side % multiple for side in latents.shape[-2:]]
    return F.pad(latents, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else latents
