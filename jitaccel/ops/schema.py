"""The operators' names, arguments and shape rules, which C++ duplicates and tracing needs.

A C++ program that loads the compiled library finds the schemas there. Without a library, Python defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

SCHEMAS = {
    "nearest_anchor": "(Tensor anchors, int[] grid, bool stack=False) -> Tensor",
    "lift": ("(Tensor values, Tensor nearest, Tensor anchors, int[] grid, Tensor weights, bool stack=False) -> Tensor"),
    "importance": "(Tensor velocity, int[] grid, int window=3, bool stack=False) -> Tensor",
    "activate": "(Tensor importance, Tensor anchors, int count) -> Tensor",
    "micro_flow_into": (
        "(Tensor(a!) state, Tensor previous, Tensor velocity, Tensor noise, Tensor tokens, Tensor nearest, "
        "Tensor anchors, int[] grid, Tensor weights, Tensor levels, float weight, bool stack=False) -> ()"
    ),
    "pool": "(Tensor x, int[] grid, int patch, int factor, Tensor? level=None) -> Tensor",
    "lift_pooled": (
        "(Tensor values, Tensor pooled, Tensor state, int[] grid, int patch, int factor, Tensor level) -> Tensor"
    ),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of the compiled kernels; the reference also takes float64."""

MOST_POOLED = 8
"""The largest pooling factor, and the largest number of latents along a token's side."""


def num_tokens_of(grid: Sequence[int]) -> int:
    """Returns the number of tokens of a grid."""
    count = 1
    for size in grid:
        count *= size
    return count


def pooled_grid(grid: Sequence[int], factor: int) -> tuple[int, ...]:
    """Returns the grid of a picture that is `factor` times smaller; frames stay, odd sides are rounded up."""
    *frames, rows, columns = grid
    return (*frames, -(-rows // factor), -(-columns // factor))


MAX_WINDOW = 1023
"""Largest side of a window, in tokens: wider than pictures are, and its cube fits in 32 bits."""


def num_stacked(grid: Sequence[int], stack: bool) -> int:
    """Returns how many leading axes of `grid` stack separate pictures: 1 for (t, h, w) with `stack`, else 0."""
    return len(grid) - 2 if stack else 0


def _refuse(operator: str, what: str, rule: str, got: object, advice: str) -> NoReturn:
    raise ValueError(f"{operator}: {what} must {rule}, got {got}; {advice}")


def check_grid(operator: str, grid: Sequence[int]) -> None:
    """Raises ValueError unless `grid` is (h, w) or (t, h, w), each at least 1, of 2^40 tokens at most."""
    if not (len(grid) in (2, 3) and all(size >= 1 for size in grid) and num_tokens_of(grid) <= 2**40):
        _refuse(
            operator, "grid", "be (h, w) or (t, h, w) of sizes above 0, 2^40 tokens at most", tuple(grid),
            "give the token grid",
        )  # fmt: skip


def check_anchors(operator: str, anchors: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless `anchors` is an int64 (B, M) with 1 <= M <= num_tokens. Reads no values."""
    if not (anchors.ndim == 2 and anchors.dtype == torch.int64 and 1 <= anchors.shape[1] <= num_tokens):
        _refuse(
            operator, "anchors", f"be int64 (B, M), M in 1..{num_tokens}", _kind(anchors),
            "give each image its own row",
        )  # fmt: skip


def check_plan(
    operator: str, nearest: Tensor, anchors: Tensor, grid: Sequence[int], weights: Tensor, device: torch.device
) -> None:
    """Raises ValueError unless the arguments describe one lift on `device`. Reads no values."""
    check_grid(operator, grid)
    num_tokens = num_tokens_of(grid)
    check_anchors(operator, anchors, num_tokens)
    if not (nearest.dtype == torch.int64 and tuple(nearest.shape) == (anchors.shape[0], num_tokens)):
        _refuse(
            operator, "nearest", f"be int64 ({anchors.shape[0]}, {num_tokens})", _kind(nearest), "use nearest_anchor",
        )  # fmt: skip
    if not (weights.ndim == 1 and weights.dtype == torch.float32 and weights.shape[0] % 2 == 1):
        _refuse(
            operator, "weights", "be float32 (K,), K odd", _kind(weights), "use blur_weights",
        )  # fmt: skip
    for name, tensor in (("nearest", nearest), ("anchors", anchors), ("weights", weights)):
        check_device(operator, name, tensor, device)


def check_values(operator: str, values: Tensor, anchors: Tensor) -> None:
    """Raises ValueError unless `values` is a floating (B, M, D) at `anchors` (B, M)."""
    if not (values.ndim == 3 and values.is_floating_point() and values.shape[:2] == anchors.shape):
        _refuse(
            operator, "values", f"be (B, M, D) with (B, M) = {tuple(anchors.shape)}, floating", _kind(values),
            "pass the values at the plan's anchors",
        )  # fmt: skip


def check_tokens(operator: str, name: str, x: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raises ValueError unless `x` is floating, of this shape (B, N, D), and on `device`."""
    if not (x.is_floating_point() and tuple(x.shape) == tuple(shape)):
        _refuse(
            operator, name, f"be (B, N, D) = {tuple(shape)}, floating", _kind(x), "pass every token of the grid",
        )  # fmt: skip
    check_device(operator, name, x, device)


def check_velocity(operator: str, velocity: Tensor, grid: Sequence[int]) -> None:
    """Raises ValueError unless `velocity` is a floating (B, N, D) on `grid`."""
    num_tokens = num_tokens_of(grid)
    if not (velocity.ndim == 3 and velocity.is_floating_point() and velocity.shape[1] == num_tokens):
        _refuse(
            operator, "velocity", f"be (B, {num_tokens}, D) on a grid of {tuple(grid)}", _kind(velocity),
            "lift it to every token first",
        )  # fmt: skip


def check_window(operator: str, window: int) -> None:
    """Raises ValueError unless `window` is odd, above 0 and at most MAX_WINDOW."""
    if not (1 <= window <= MAX_WINDOW and window % 2 == 1):
        _refuse(operator, "window", f"be odd and in 1..{MAX_WINDOW}", window, "the paper's is 3")


def check_levels(operator: str, levels: Tensor, device: torch.device) -> None:
    """Raises ValueError unless `levels` is a float32 (2,) on `device`."""
    if not (tuple(levels.shape) == (2,) and levels.dtype == torch.float32):
        _refuse(
            operator, "levels", "be float32 (2,)", _kind(levels), "give two noise levels",
        )  # fmt: skip
    check_device(operator, "levels", levels, device)


def check_out(operator: str, name: str, out: Tensor) -> None:
    """Raises ValueError unless the output tensor `out` is contiguous."""
    if not out.is_contiguous():
        _refuse(operator, name, "be contiguous", f"strides {out.stride()}", "pass a fresh buffer")


def check_device(operator: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        _refuse(operator, name, f"be on {device}", tensor.device, "move it there")


def check_activate(operator: str, importance: Tensor, anchors: Tensor, count: int) -> None:
    """Raises ValueError unless the arguments of `activate` fit: `count` tokens exist outside the (B, M) anchors."""
    if not (importance.ndim == 2 and anchors.ndim == 2 and importance.shape[0] == anchors.shape[0]):
        _refuse(
            operator, "importance and anchors", "be (B, N) and (B, M)",
            f"{tuple(importance.shape)} and {tuple(anchors.shape)}", "give each image its own row",
        )  # fmt: skip
    if importance.dtype != torch.float32:
        _refuse(operator, "importance", "be float32", importance.dtype, "convert it")
    check_anchors(operator, anchors, importance.shape[1])
    check_device(operator, "anchors", anchors, importance.device)
    inactive = importance.shape[1] - anchors.shape[1]
    if not (0 <= count <= inactive):
        _refuse(
            operator, "count", f"be in 0..{inactive}, the inactive tokens", count,
            "take it from JiTConfig.token_counts",
        )  # fmt: skip


def check_nearest_anchor(operator: str, anchors: Tensor, grid: Sequence[int], stack: bool = False) -> None:
    """Raises ValueError unless the arguments of `nearest_anchor` fit. Like all checks below, reads shapes only."""
    check_grid(operator, grid)
    check_anchors(operator, anchors, num_tokens_of(grid))
    if num_stacked(grid, stack) and anchors.shape[1] < grid[0]:
        refuse_empty_frame(operator, f"{anchors.shape[1]} anchors for {grid[0]} frames")


def refuse_empty_frame(operator: str, got: str) -> NoReturn:
    """Raises ValueError for a frame of a stack without an anchor."""
    _refuse(operator, "anchors", "hold at least one token of every frame", got, "take them from first_anchors")


def check_lift(
    operator: str, values: Tensor, nearest: Tensor, anchors: Tensor, grid: Sequence[int], weights: Tensor
) -> None:
    """Raises ValueError unless the arguments of `lift` fit."""
    check_values(operator, values, anchors)
    check_plan(operator, nearest, anchors, grid, weights, values.device)


def check_importance(operator: str, velocity: Tensor, grid: Sequence[int], window: int) -> None:
    """Raises ValueError unless the arguments of `importance` fit."""
    check_grid(operator, grid)
    check_velocity(operator, velocity, grid)
    check_window(operator, window)


def check_micro_flow_into(
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
    """Raises ValueError unless the arguments of `micro_flow_into` fit."""
    operator, device = "micro_flow_into", state.device
    check_plan(operator, nearest, anchors, grid, weights, device)
    shape = (anchors.shape[0], num_tokens_of(grid), state.shape[-1])
    for name, x in (("state", state), ("previous", previous), ("velocity", velocity), ("noise", noise)):
        check_tokens(operator, name, x, shape, device)
    check_out(operator, "state", state)
    if not (tokens.ndim == 2 and tokens.dtype == torch.int64 and tokens.shape[0] == anchors.shape[0]):
        _refuse(
            operator, "tokens", f"be int64 ({anchors.shape[0]}, count)", _kind(tokens), "use activate",
        )  # fmt: skip
    check_device(operator, "tokens", tokens, device)
    check_levels(operator, levels, device)
    if not (0.0 <= weight <= 1.0):
        _refuse(operator, "weight", "be in [0, 1]", weight, "take it from JiTConfig.move_weight")


def check_pooling(
    operator: str, name: str, x: Tensor, grid: Sequence[int], patch: int, factor: int, level: Tensor | None
) -> None:
    """Raises ValueError unless `x` (B, N, D) on `grid` can be pooled, that is, D holds whole patches of latents."""
    check_grid(operator, grid)
    for what, value in (("patch", patch), ("factor", factor)):
        if not 1 <= value <= MOST_POOLED:
            _refuse(
                operator, what, f"be in 1..{MOST_POOLED}", value, "give the latents along a token's side, and 2 or 4",
            )  # fmt: skip
    num_tokens = num_tokens_of(grid)
    if not (x.ndim == 3 and x.is_floating_point() and x.shape[1] == num_tokens and x.shape[2] % patch**2 == 0):
        _refuse(
            operator, name, f"be floating (B, {num_tokens}, D), D a multiple of {patch**2}", _kind(x),
            "pass every token of the grid, its latents channel by channel",
        )  # fmt: skip
    if level is None:
        return
    if not (level.ndim == 0 and level.dtype in (torch.float32, torch.float64)):
        _refuse(operator, "level", "be a float32 or float64 tensor ()", _kind(level), "give the state's noise level")
    check_device(operator, "level", level, x.device)


def check_lift_pooled(
    values: Tensor, pooled: Tensor, state: Tensor, grid: Sequence[int], patch: int, factor: int, level: Tensor
) -> None:
    """Raises ValueError unless the arguments of `lift_pooled` fit."""
    check_pooling("lift_pooled", "state", state, grid, patch, factor, level)
    shape = (state.shape[0], num_tokens_of(pooled_grid(grid, factor)), state.shape[2])
    for name, x in (("values", values), ("pooled", pooled)):
        check_tokens("lift_pooled", name, x, shape, state.device)
    if pooled.dtype != state.dtype:
        _refuse("lift_pooled", "pooled", f"be {state.dtype}, the state's dtype", _kind(pooled), "take it from pool")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
