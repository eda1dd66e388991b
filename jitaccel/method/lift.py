"""Interpolates from the anchors to every token, within each frame: nearest fill, Gaussian blur, anchors kept."""

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
    """The data that `lift` needs for a stage; `make_lift_plan` builds it once per stage.

    Attributes:
        grid: (h, w) or (t, h, w).
        anchors: (B, M) int64, sorted.
        nearest: (B, N) int64; for each token, the index among the M anchors of the nearest one.
        weights: (K,) float32, of the blur.
    """

    grid: tuple[int, ...]
    anchors: Tensor
    nearest: Tensor
    weights: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether every token is an anchor, so there is nothing to lift."""
        return self.anchors.shape[1] == self.nearest.shape[1]

    @property
    def positions(self) -> Tensor:
        """Indices, (B, M), of the position ids that the network's tokens have: the anchors."""
        return self.anchors

    def show(self, state: Tensor, level: "float | Tensor | None" = None) -> Tensor:
        """Returns the anchors' tokens (B, M, ...) of a state (B, N, ...); the state if every token is an anchor.

        Args:
            state: May hold several branches, one after the other: (k * B, N, ...).
            level: Ignored; a subset of a state has the noise level of the state.
        """
        if self.is_dense:
            return state
        branches = state.shape[0] // self.anchors.shape[0]
        return gather_tokens(state, self.anchors if branches == 1 else self.anchors.repeat(branches, 1))

    def show_beside(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of other latents next to the state, such as a mask: as `show`."""
        return self.show(x)

    def show_features(self, x: Tensor) -> Tensor:
        """Returns the anchors' tokens of features of whole tokens: as `show`."""
        return self.show(x)

    def spread(self, x: Tensor) -> Tensor:
        """Returns features (B, M, C) of the network's tokens scattered into zeros, (B, N, C)."""
        return x if self.is_dense else scatter_tokens(x, self.anchors, num_tokens_of(self.grid))

    def show_level(self, level: Level) -> Level:
        """Returns the level at which the network sees a state at `level`: the same level."""
        return level

    def lift(
        self,
        values: Tensor,
        state: Tensor,
        level: float | Tensor,
        lifter: Literal["velocity", "clean"] = "velocity",
        shown: Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity at every token (B, N, D) from that at the anchors (B, M, D), by `lift_velocity`.

        Args:
            values: (B, M, D), the velocity at the anchors.
            state: (B, N, D).
            level: Noise level of the state.
            lifter: As in `lift_velocity`.
            shown: Ignored; the output of `show` is part of the state.
        """
        return lift_velocity(values, state, level, self, lifter)


def blur_weights(density: float, blur_scale: float = 0.4) -> Tensor:
    """Returns the weights of the Gaussian, `(2 * ceil(3 s) + 1,)` float64, which sum to 1.

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

    All tensors are on the anchors' device.

    Args:
        anchors: (B, M) int64, sorted.
        grid: (h, w) or (t, h, w).
        blur_scale: As in JiTConfig.
        is_checked: The anchors are known to be valid, as those this package makes are. Otherwise they are checked,
            which waits for a GPU.

    Raises:
        ValueError: For anchors that are unsorted or off the grid, and for a frame without an anchor.
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
    """Returns `values` (B, M, D) lifted to every token, `(B, N, D)` in their dtype: `ops.lift`.

    Anchors keep their values bit for bit. If every token is an anchor, `values` itself is returned.
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

    "velocity" lifts the velocity (I_k of the SAG-ODE, arXiv:2603.10744). "clean", a variant of ours, lifts the clean
    estimate `x0 = y - level * v` and sets `v_i = (y_i - x0_i) / level`, so that an inactive token keeps its own noise.
    Anchors keep their velocity bit for bit in both.

    Args:
        values: (B, M, D), the velocity at the anchors.
        state: (B, N, D), every token.
        level: Noise level of the state. Must be above 0 for "clean"; this is not checked for a tensor (), as in a
            graph.
        plan: The stage's plan.
        lifter: "velocity" or "clean".
    """
    if lifter == "velocity" or plan.is_dense:
        return lift(values, plan)
    if lifter != "clean":
        raise ValueError(f'lift_velocity: lifter must be "velocity" or "clean", got {lifter!r}; choose one')
    if not isinstance(level, Tensor) and not level > 0.0:
        raise ValueError(f"lift_velocity: level must be above 0 to lift the clean estimate, got {level}")
    return ops.lift_clean(values, state, plan.nearest, plan.anchors, plan.grid, plan.weights, level, stack=True)
