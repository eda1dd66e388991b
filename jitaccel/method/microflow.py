"""The move of newly activated tokens to where they belong on the path from noise to data."""

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

    Every other token keeps its bits (DMF, arXiv:2603.10744). Departs from the released code in that the caller gives
    the noise.

    previous, velocity: state and full velocity (B, N, D) of the step before. tokens: (B, count) int64, those activated.
    plan: of the anchors before activation. levels: of the step before, and of the step about to be taken.
    """
    moved = state.clone(memory_format=torch.contiguous_format)
    both = torch.tensor(levels, dtype=torch.float32, device=state.device)
    lift = (plan.nearest, plan.anchors, plan.grid, plan.weights)
    ops.micro_flow_into(moved, previous, velocity, noise, tokens, *lift, both, weight, stack=True)
    return moved
