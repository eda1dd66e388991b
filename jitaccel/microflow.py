"""Where newly activated tokens belong on the path from noise to data, and the move that takes them there."""

import torch
from torch import Tensor

from .anchors import gather_tokens, put_tokens_
from .lift import LiftPlan, lift


def _math_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def clean_estimate(state: Tensor, velocity: Tensor, level: float) -> Tensor:
    """Returns the clean estimate `x0 = y - level * v`, in float32 or wider, of the shape of `state`.

    Tweedie's formula (DMF, arXiv:2603.10744) on diffusers' clock, where level 1 is noise and v = e - x.

    state, velocity: (B, N, D), of one and the same step. level: that step's noise level.
    """
    dtype = _math_dtype(state, velocity)
    return state.to(dtype) - level * velocity.to(dtype)


def target_state(clean_at_anchors: Tensor, plan: LiftPlan, noise: Tensor, level: float) -> Tensor:
    """Returns where every token belongs at `level`, `(B, N, D)` in float32 or wider.

    `(1 - level) * Phi(x0) + level * e` (DMF, arXiv:2603.10744), Phi the lift from the anchors before
    activation. Departs from the released code in that the caller gives the noise.

    clean_at_anchors: (B, M, D) at `plan.anchors`. noise: (B, N, D), standard normal. level: noise level of
    the step about to be taken.
    """
    dtype = _math_dtype(clean_at_anchors, noise)
    return (1.0 - level) * lift(clean_at_anchors.to(dtype), plan) + level * noise.to(dtype)


def move(state: Tensor, target: Tensor, tokens: Tensor, weight: float) -> Tensor:
    """Returns a new `state` with `tokens` moved towards `target`: `(1 - weight) * y + weight * target`.

    Weight 1 is the endpoint of the paper's hitting ODE (DMF, arXiv:2603.10744), an assignment bit for bit;
    the released code blends once with weight 1 / relax_steps instead. All other tokens keep their value
    bit for bit, and `state` itself is not written.

    state, target: (B, N, D). tokens: (B, count) int64. weight: in [0, 1].
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"move: weight must be in [0, 1], got {weight}; take it from JiTConfig.move_weight")
    moved = state.clone(memory_format=torch.contiguous_format)
    if weight == 0.0:
        return moved
    values = gather_tokens(target, tokens)
    if weight != 1.0:
        dtype = _math_dtype(state, target)
        values = (1.0 - weight) * gather_tokens(state, tokens).to(dtype) + weight * values.to(dtype)
    return put_tokens_(moved, values.to(state.dtype), tokens)
