"""The method's operators: compiled where possible, plain torch everywhere else, with the same results.

Compilers, exported programs and C++ call `torch.ops.jitaccel.*`; Python calls the functions here. These check shapes
first. They call the plain-torch reference directly where nothing is compiled for the tensor's device or dtype, so that
torch.compile can fuse it, and where gradients are needed, because the compiled kernels have none.

Grids are (h, w), or (t, h, w) for video or layers; N is their product. Distances, blur and windows run along all axes.
With `stack` they stay within each frame of (t, h, w): every frame is then a separate picture and must hold an anchor;
on (h, w), `stack` changes nothing. The method always stacks (`jitaccel.method.grid`). Indices are sorted int64 raster
indices, one row per image. Values are float32, float16 or bfloat16 (the reference also takes float64); sums are in
float32. No operator waits for a CUDA device, allocates on the host or draws random numbers; each gives the same bits
every time.

The functions raise ValueError for shapes, dtypes and devices that do not fit, and, on the CPU, for indices out of range
or out of order; messages name operator, argument, rule and value. On CUDA, indices are checked only if
JITACCEL_CHECK_INDICES=1 is set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, schema
from .library import compiled, missing
from .schema import DTYPES, SCHEMAS

__all__ = [
    "DTYPES",
    "SCHEMAS",
    "activate",
    "compiled",
    "importance",
    "lift",
    "lift_clean",
    "lift_pooled",
    "micro_flow_into",
    "missing",
    "nearest_anchor",
    "pool",
]

_ops = torch.ops.jitaccel
_COMPILED = frozenset(compiled())


def _runs_compiled(*tensors: Tensor) -> bool:
    """Whether a compiled kernel supports these floating-point tensors."""
    if tensors[0].device.type not in _COMPILED or any(x.dtype not in DTYPES for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def nearest_anchor(anchors: Tensor, grid: Sequence[int], stack: bool = False) -> Tensor:
    """Returns for each token its nearest anchor, `(B, N)` int64, as an index into the M anchors.

    Exact Euclidean distance on the grid; ties go to the anchor with the lowest raster index. O(N) memory, where the
    released code builds an N x M matrix at every step (arXiv:2603.10744, SAG-ODE).

    Args:
        anchors: (B, M) int64, rising.
        grid: (h, w) or (t, h, w).
        stack: Take the nearest anchor of the same frame.
    """
    schema.check_nearest_anchor("nearest_anchor", anchors, grid, stack)
    return _ops.nearest_anchor(anchors, grid, stack)


def lift(
    values: Tensor, nearest: Tensor, anchors: Tensor, grid: Sequence[int], weights: Tensor, stack: bool = False
) -> Tensor:
    """Returns `values` at every token, `(B, N, D)` in their dtype; anchors keep theirs bit for bit.

    The interpolation I_k and the prior Phi_k (SAG-ODE, arXiv:2603.10744): each token takes the value of its nearest
    anchor, the grid is blurred along each axis, reflected at its ends, and the anchors get their own values back.
    Departs from the released code in using each image's own anchors.

    Args:
        values: (B, M, D), values at the anchors.
        nearest: (B, N) int64, from `nearest_anchor`.
        anchors: (B, M) int64.
        grid: (h, w) or (t, h, w).
        weights: (K,) float32, K odd, from `blur_weights`.
        stack: Blur within each frame.
    """
    schema.check_lift("lift", values, nearest, anchors, grid, weights)
    run = _ops.lift if _runs_compiled(values) else reference.lift
    return run(values, nearest, anchors, grid, weights, stack)


def lift_clean(
    values: Tensor,
    state: Tensor,
    nearest: Tensor,
    anchors: Tensor,
    grid: Sequence[int],
    weights: Tensor,
    level: float | Tensor,
    stack: bool = False,
) -> Tensor:
    """Returns the velocity `(B, N, D)`, in the dtype of `values`, whose clean estimate is lifted from the anchors.

    Lifts `x0 = y - level * v` instead of v, and sets `v_i = (y_i - x0_i) / level`, so an inactive token keeps its own
    noise. A variant of ours, composed of `lift`, not a separate operator.

    Args:
        values: (B, M, D), the velocity at the anchors.
        state: (B, N, D).
        nearest: As in `lift`.
        anchors: As in `lift`.
        grid: As in `lift`.
        weights: As in `lift`.
        level: Above 0. Pass a tensor () to keep the value out of compiled code.
        stack: As in `lift`.
    """
    schema.check_lift("lift_clean", values, nearest, anchors, grid, weights)
    schema.check_tokens("lift_clean", "state", state, (*nearest.shape, values.shape[2]), values.device)
    return reference.lift_clean(values, state, nearest, anchors, grid, weights, level, stack, lift=lift)


def importance(velocity: Tensor, grid: Sequence[int], window: int = 3, stack: bool = False) -> Tensor:
    """Returns the local variance of the velocity, mean over channels, `(B, N)` float32.

    `I = mean_c(E_W[v * v] - E_W[v]^2)` (ITA, arXiv:2603.10744), where W is a window of `window` tokens along each axis,
    with stride 1 and zero padding. The padding counts: a window at the border divides by the full window size, as in
    the released code, so even a constant field is important at its border. Unlike that code, small variances are not
    lost next to large means: the reference sums in float64, the kernels sum differences from the middle token.

    Args:
        velocity: (B, N, D).
        grid: (h, w) or (t, h, w).
        window: Odd.
        stack: Keep windows within each frame.
    """
    schema.check_importance("importance", velocity, grid, window)
    run = _ops.importance if _runs_compiled(velocity) else reference.importance
    return run(velocity, grid, window, stack)


def activate(importance: Tensor, anchors: Tensor, count: int) -> Tensor:
    """Returns the `count` most important tokens that are not anchors, `(B, count)` int64, rising.

    Importance-guided token activation (ITA, arXiv:2603.10744). Ties go to the lowest raster index, so the result
    depends on neither device nor batch. Departs from the released code, which ranks image 0 only.

    Args:
        importance: (B, N) float32, finite; the rank of a NaN is undefined.
        anchors: (B, M) int64.
        count: From 0 to N - M.
    """
    schema.check_activate("activate", importance, anchors, count)
    return _ops.activate(importance, anchors, count)


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
    """Moves newly activated tokens of `state` towards their target, in place; all others keep their bits.

    `target = (1 - level) * Phi(x0) + level * e` with `x0 = y_p - level_p * v_p` at the anchors before activation (DMF,
    arXiv:2603.10744); `y <- (1 - weight) * y + weight * target`. Weight 1 is the endpoint of the paper's hitting ODE;
    the released code blends once with weight 1 / relax_steps.

    Args:
        state: (B, N, D), contiguous.
        previous: (B, N, D), the state of the previous step.
        velocity: (B, N, D), the full velocity of the previous step.
        noise: (B, N, D), standard normal.
        tokens: (B, count) int64, the activated tokens.
        nearest: Of the lift before activation.
        anchors: Of the lift before activation.
        grid: (h, w) or (t, h, w).
        weights: Of the lift before activation.
        levels: (2,) float32, level_p and the level of the step about to be taken.
        weight: In [0, 1].
        stack: Lift within each frame.
    """
    arguments = (state, previous, velocity, noise, tokens, nearest, anchors, grid, weights, levels, weight, stack)
    schema.check_micro_flow_into(*arguments)
    run = _ops.micro_flow_into if _runs_compiled(state, previous, velocity, noise) else reference.micro_flow_into
    run(*arguments)


def pool(x: Tensor, grid: Sequence[int], patch: int, factor: int, level: float | Tensor | None = None) -> Tensor:
    """Returns the tokens `(B, M, D)` of a picture that is `factor` times smaller, in the dtype of `x`.

    A token holds patch x patch latents, grouped by channel: D = channels * patch * patch. Every output latent is the
    mean of factor x factor latents of its frame. If a level is given, `x` is a noisy state. The mean of its noise is
    weaker, and dividing by `1 - level + level / factor` makes it a state of the smaller picture, at the level of
    `jitaccel.method.pool.pooled_level` (a variant of ours, not the paper's).

    If a side is not divisible, its last latent row or column is repeated; `pooled_grid` is the output's grid.

    Args:
        x: (B, N, D).
        grid: (h, w) or (t, h, w).
        patch: Latents along a token's side.
        factor: 1 to 8.
        level: A number, or a tensor () of float32 (float64 for float64 `x`).
    """
    level = None if level is None else _level_tensor(level, x)
    schema.check_pooling("pool", "x", x, grid, patch, factor, level)
    run = _ops.pool if _runs_compiled(x) else reference.pool
    return run(x, grid, patch, factor, level)


def lift_pooled(
    values: Tensor,
    pooled: Tensor,
    state: Tensor,
    grid: Sequence[int],
    patch: int,
    factor: int,
    level: float | Tensor,
) -> Tensor:
    """Returns the velocity at every token, `(B, N, D)` in the dtype of `values`, from that of the smaller picture.

    The smaller picture's clean estimate, `pooled - pooled_level * values`, is upsampled bilinearly (half-pixel centres,
    edges held) to x0, and `v = (state - x0) / level`, so every token keeps its own noise.

    Args:
        values: (B, M, D), the network's velocity.
        pooled: (B, M, D), the network's input: `pool` of the state.
        state: (B, N, D).
        grid: (h, w) or (t, h, w).
        patch: Latents along a token's side.
        factor: As in `pool`.
        level: Of the state, above 0; a number, or a tensor ().
    """
    level = _level_tensor(level, state)
    schema.check_lift_pooled(values, pooled, state, grid, patch, factor, level)
    run = _ops.lift_pooled if _runs_compiled(values, pooled, state) else reference.lift_pooled
    return run(values, pooled, state, grid, patch, factor, level)


def _level_tensor(level: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(level, Tensor):
        return level
    return like.new_full((), level, dtype=torch.promote_types(like.dtype, torch.float32))
