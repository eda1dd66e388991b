"""Steps at full and at half size in any order, and ways to make both sizes agree on one picture.

`JiTConfig` has pooled steps before dense ones, with the position ids of the smaller picture. Here each step has its own
size, at given levels, always with DPM-Solver++(2M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jitaccel.method.pool import PooledPlan, make_pooled_plan
from jitaccel.method.solver import make_solver
from jitaccel.method.steps import Step

from .network import SparseNetwork, Texts
from .sampler import BATCH, GRID, PATCH, TEXT_TOKENS, Bench, Sampled, decode

Places = Literal["own", "strided", "centred"]
Correction = Literal["none", "mean", "coarse"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which steps are pooled, and how.

    Attributes:
        levels: Noise levels, one more than steps.
        factors: Pooling factor per side of each step; 1 is dense.
        places: Position ids of pooled steps: those of a picture of that size, those of the first token of each area, or
            those of the middle of each area.
        guidance: Additional guidance w of pooled steps. Their velocity is extrapolated by w times the effect of the
            text, which takes a second forward pass. The embedded model has a scale of 2.5 built in.
        correction: Correction that pooled steps add to their clean estimate: the difference between the first step's
            estimate (that step must be dense) and a pooled estimate there. "mean" uses each channel's mean over the
            picture, "coarse" the value at each token. Takes one more pooled forward pass.
    """

    levels: tuple[float, ...]
    factors: tuple[int, ...]
    places: Places = "own"
    guidance: float = 0.0
    correction: Correction = "none"

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.factors) + 1:
            raise ValueError(
                f"Sizes: levels must be one more than factors, got {len(self.levels)} and {len(self.factors)}"
            )
        if self.correction != "none" and self.factors[0] != 1:
            raise ValueError(f"Sizes: the first step must be dense for a correction, got factor {self.factors[0]}")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.factors)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns all settings, ready for JSON."""
        return {"sizes": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}}


def sample_sizes(bench: Bench, sizes: Sizes, *, mixed: bool = True) -> Sampled:
    """Returns the pictures for every prompt. With `mixed`, matrix products run in bfloat16 (autocast)."""
    pictures, latents, cost = [], [], []
    nothing = _nothing(bench) if sizes.guidance else None
    for first in range(0, len(bench.prompts), BATCH):
        chosen = slice(first, first + BATCH)
        with torch.no_grad():
            network = _Network(bench, chosen, sizes, nothing, mixed)
            state = _denoise(network, sizes, bench.noise[chosen])
        pictures.append(decode(bench.pipe, state))
        latents.append(state.numpy())
        cost += [network.flops / len(state) / 1e9] * len(state)
    shape = (len(cost), *GRID)
    return Sampled(np.concatenate(pictures), np.array(cost), np.zeros(shape, np.int64), np.concatenate(latents))


def _nothing(bench: Bench) -> Texts:
    """Returns the encoded empty prompt for each image."""
    with torch.no_grad():
        words, pooled = bench.pipe.encode_prompt("", None, max_sequence_length=TEXT_TOKENS)[:2]
    count = len(bench.prompts)
    return Texts(words=words.expand(count, -1, -1), pooled=pooled.expand(count, -1))


class _Network:
    """Calls the transformer at full or half size for some prompts of a bench; `flops` counts what was run."""

    def __init__(self, bench: Bench, chosen: slice, sizes: Sizes, nothing: Texts | None, mixed: bool) -> None:
        def of(texts: Texts) -> SparseNetwork:
            return SparseNetwork(bench.pipe.transformer, texts.part(chosen), GRID, mixed)

        self._networks = [of(bench.texts), *([] if nothing is None else [of(nothing)])]
        self._sizes, self._plans = sizes, dict[int, PooledPlan]()

    @property
    def flops(self) -> float:
        return sum(network.flops for network in self._networks)

    def plan(self, factor: int, like: Tensor) -> PooledPlan:
        """Returns the plan of a factor."""
        if factor not in self._plans:
            self._plans[factor] = make_pooled_plan(len(like), GRID, factor, PATCH, like.device)
        return self._plans[factor]

    def dense(self, state: Tensor, level: float) -> Tensor:
        """Returns the velocity (B, N, D) of all tokens."""
        every = torch.arange(state.shape[1]).expand(len(state), -1)
        return self._networks[0](state, every, level)

    def pooled(self, plan: PooledPlan, state: Tensor, level: float) -> Tensor:
        """Returns the clean estimate (B, M, D) of the smaller picture."""
        seen, shown_level = plan.show(state, level), float(plan.show_level(level))
        ids = self._ids(plan)
        velocity, *plain = (network.at(seen, ids, shown_level) for network in self._networks)
        if plain:
            velocity = velocity + self._sizes.guidance * (velocity - plain[0])
        return seen - shown_level * velocity

    def _ids(self, plan: PooledPlan) -> Tensor:
        every = self._networks[0].ids
        if self._sizes.places == "own":
            return every[plan.positions[0]]
        middle = 0.0 if self._sizes.places == "strided" else (plan.factor - 1) / 2
        return every[plan.anchors[0]] + torch.tensor([0.0, middle, middle])


def _denoise(network: _Network, sizes: Sizes, state: Tensor) -> Tensor:
    solver = make_solver("dpmpp_2m")
    added: Tensor | float = 0.0
    for index, (factor, (level, following)) in enumerate(zip(sizes.factors, pairwise(sizes.levels), strict=True)):
        if factor == 1:
            velocity = network.dense(state, level)
            if index == 0 and sizes.correction != "none":
                added = _difference(network, sizes, state, velocity, level)
        else:
            plan = network.plan(factor, state)
            clean, shown_level = network.pooled(plan, state, level) + added, float(plan.show_level(level))
            velocity = plan.lift((plan.show(state, level) - clean) / shown_level, state, level)
        step = Step(index=index, stage=0, noise_level=level, next_level=following, may_end_stage=False)
        state = state + (following - level) * solver.correct(step, state, velocity, None)
    return state


def _difference(network: _Network, sizes: Sizes, state: Tensor, velocity: Tensor, level: float) -> Tensor:
    """Returns the correction to the clean estimate of pooled steps, (B, M, D) or (B, 1, D)."""
    plan = network.plan(max(sizes.factors), state)
    missing = plan.show_beside(state - level * velocity) - network.pooled(plan, state, level)
    if sizes.correction == "coarse":
        return missing
    channels = missing.unflatten(2, (-1, PATCH**2)).mean(dim=(1, 3))
    return channels.repeat_interleave(PATCH**2, dim=1)[:, None]


def on_levels(levels: Sequence[float], factors: Sequence[int], **others: Any) -> Sizes:
    """Returns steps that pool by `factors`, followed by dense steps to the end of the levels."""
    rest = len(levels) - 1 - len(factors)
    return Sizes(levels=tuple(levels), factors=(*factors, *(1,) * rest), **others)
