"""Moves newly activated tokens to their place on the path from noise to data."""

import torch
from torch import Tensor

from .. import ops
from .lift import LiftPlan


def micro_flow(
    state: Tensor,
    previous: Tensor,
    velocity: Tensor,
    noise: Tensor,
    tokens: Tensor,
    plan: LiftPlan,
    levels: tuple[float, float],
    weight: float,
) -> Tensor:
    """Returns a new `state` (B, N, D) with `tokens` moved by `weight` towards their target: `ops.micro_flow_into`.

    Every other token keeps its bits (DMF, arXiv:2603.10744). Unlike in the released code, the caller passes the noise.

    Args:
        state: (B, N, D), the current state.
        previous: (B, N, D), the state of the previous step.
        velocity: (B, N, D), the full velocity of the previous step.
        noise: (B, N, D), standard normal.
        tokens: (B, count) int64, the activated tokens.
        plan: The plan of the anchors before activation.
        levels: Noise levels of the previous step and of the step about to be taken.
        weight: In [0, 1].
    """
    moved = state.clone(memory_format=torch.contiguous_format)
    both = torch.tensor(levels, dtype=torch.float32, device=state.device)
    lift = (plan.nearest, plan.anchors, plan.grid, plan.weights)
    ops.micro_flow_into(moved, previous, velocity, noise, tokens, *lift, both, weight, stack=True)
    return moved
