"""From the anchors to every token, within each frame: nearest fill, Gaussian blur, anchors kept."""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..ops import reference
from ..tokens import gather_tokens, scatter_tokens
from .grid import num_tokens_of

Level = TypeVar("Level", float, Tensor)


@dataclass(frozen=True, eq=False)
class LiftPlan:
    """What `lift` needs to know of a stage, built once a stage by `make_lift_plan`.

    grid: (h, w) or (t, h, w). anchors: (B, M) int64, sorted. nearest: (B, N) int64, index among the M anchors of
    the one nearest to each token. weights: (K,) float32, the blur's.
    """

    grid: tuple[int, ...]
    anchors: Tensor
    nearest: Tensor
    weights: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether every token is an anchor, so that there is nothing to lift."""
        return self.anchors.shape[1] == self.nearest.shape[1]

    @property
    def positions(self) -> Tensor:
        """Which position ids of the whole picture the network's tokens have, (B, M): the anchors'."""
        return self.anchors

    def show(self, state: Tensor, level: "float | Tensor | None" = None) -> Tensor:
        """Returns the anchors' tokens (B, M, ...) of a state (B, N, ...); itself where every token is an anchor.

        state: may hold several branches, one after the other: (k * B, N, ...). level: not looked at, a subset of a
        state is as noisy as the state.
        """
        if self.is_dense:
            return state
        branches = state.shape[0] // self.anchors.shape[0]
        return gather_tokens(state, self.anchors if branches == 1 else self.anchors.repeat(branches, 1))

    def show_beside(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of what is shown beside the state: as `show`."""
        return self.show(x)

    def show_features(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of features of whole tokens: as `show`."""
        return self.show(x)

    def spread(self, x: Tensor) -> Tensor:
        """Returns features (B, M, C) of the network's tokens in place among zeros, (B, N, C)."""
        return x if self.is_dense else scatter_tokens(x, self.anchors, num_tokens_of(self.grid))

    def show_level(self, level: Level) -> Level:
        """Returns the level at which the network sees a state at `level`: that one."""
        return level

    def lift(
        self,
        values: Tensor,
        state: Tensor,
        level: float | Tensor,
        lifter: Literal["velocity", "clean"] = "velocity",
        shown: Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity at every token (B, N, D) from the one at the anchors (B, M, D): `lift_velocity`.

        shown: not looked at, what `show` gave is part of the state.
        """
        return lift_velocity(values, state, level, self, lifter)


def blur_weights(density: float, blur_scale: float = 0.4) -> Tensor:
    """Returns the Gaussian's weights, `(2 * ceil(3 s) + 1,)` float64, of sum 1.

    s = clip(blur_scale / sqrt(density), 1, 10) tokens, density = M / N (arXiv:2603.10744, SAG-ODE).
    """
    sigma = min(max(blur_scale / math.sqrt(density), 1.0), 10.0)
    radius = math.ceil(3.0 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    return weights / weights.sum()


def make_lift_plan(
    anchors: Tensor, grid: tuple[int, ...], blur_scale: float = 0.4, is_checked: bool = False
) -> LiftPlan:
    """Returns the plan that lifts from `anchors` (B, M) int64, sorted, to a grid of (h, w) or (t, h, w).

    All tensors live on the anchors' device. Raises ValueError for anchors that are unsorted or off the grid, and
    for a frame without one. That is looked up, for which it waits for a GPU, unless `is_checked`: the anchors are known
    to be right, as those that this package makes.
    """
    num_tokens = num_tokens_of(grid)
    ops.schema.check_nearest_anchor("make_lift_plan", anchors, grid, stack=True)
    if not is_checked:
        reference.check_rows("make_lift_plan", anchors, num_tokens)
        reference.check_frames("make_lift_plan", anchors, grid)
    weights = blur_weights(anchors.shape[1] / num_tokens, blur_scale)
    return LiftPlan(
        grid=grid,
        anchors=anchors,
        nearest=ops.nearest_anchor(anchors, grid, stack=True),
        weights=weights.to(anchors.device, torch.float32),
    )


def lift(values: Tensor, plan: LiftPlan) -> Tensor:
    """Returns `values` at every token, `(B, N, D)` in their dtype; anchors keep theirs bit for bit: `ops.lift`.

    With every token an anchor, `values` itself is returned. values: (B, M, D) at `plan.anchors`.
    """
    if plan.is_dense:
        ops.schema.check_values("lift", values, plan.anchors)
        return values
    return ops.lift(values, plan.nearest, plan.anchors, plan.grid, plan.weights, stack=True)


def lift_velocity(
    values: Tensor,
    state: Tensor,
    level: float | Tensor,
    plan: LiftPlan,
    lifter: Literal["velocity", "clean"] = "velocity",
) -> Tensor:
    """Returns the velocity at every token, `(B, N, D)` in the dtype of `values`.

    "velocity" lifts the velocity (I_k of the SAG-ODE, arXiv:2603.10744). "clean", a variant of ours, lifts
    the clean estimate `x0 = y - level * v` and takes `v_i = (y_i - x0_i) / level`, so that an inactive token
    keeps its own noise. Anchors keep their velocity bit for bit in both.

    values: (B, M, D) velocity at the anchors. state: (B, N, D) at every token. level: noise level of the
    state; above 0 for "clean", which is not looked up where it is a tensor (), as in a graph.
    """
    if lifter == "velocity" or plan.is_dense:
        return lift(values, plan)
    if lifter != "clean":
        raise ValueError(f'lift_velocity: lifter must be "velocity" or "clean", got {lifter!r}; choose one')
    if not isinstance(level, Tensor) and not level > 0.0:
        raise ValueError(f"lift_velocity: level must be above 0 to lift the clean estimate, got {level}")
    return ops.lift_clean(values, state, plan.nearest, plan.anchors, plan.grid, plan.weights, level, stack=True)
