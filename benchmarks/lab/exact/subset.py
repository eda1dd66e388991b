"""Exact runs with stages on a subset of the tokens, computed from every unit of noise.

The optimal network on anchors returns the mean of their clean latents given the noisy ones, from the normal equations
of the field's covariance. If the anchors do not depend on the picture, the run is linear in its noise, so its ends for
single units of noise determine it completely. Anchors are drawn with a seed: the lattice of `first_anchors`, then at
random. Above 32x32 tokens there are too many units, so noise is sampled, and conjugate gradients solve the normal
equations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from jitaccel.method.anchors import activate, first_anchors, merge_anchors
from jitaccel.method.lift import lift, make_lift_plan
from jitaccel.method.solver import extrapolation_weight

from .field import Array, Field
from .gradients import posterior_mean
from .linear import Distances, Solver, posterior_gain
from .plan import Plan, Stage
from .study import Study

_MOST_LATENTS = 4096  # up to this many anchor latents, the normal equations are solved directly


@dataclass(frozen=True)
class Variant:
    """How a subset stage treats the tokens that are not anchors, as in `JiTConfig`.

    Attributes:
        lifter: The quantity that is interpolated from the anchors.
        move: How far newly activated tokens move to their target, from 0 to 1.
        noise: Noise of the target.
        seed: Seed of the anchors.
    """

    lifter: Literal["velocity", "clean"] = "clean"
    move: float = 0.0
    noise: Literal["fresh", "own"] = "own"
    seed: int = 0

    @property
    def is_fresh(self) -> bool:
        """Whether tokens are moved to targets with fresh noise."""
        return self.move > 0.0 and self.noise == "fresh"


@dataclass(frozen=True)
class SubsetStudy(Study):
    """A study whose plans may have subset stages, for up to 32 x 32 tokens, one frame and optimal networks.

    Attributes:
        variant: Variant of the subset stages.
    """

    variant: Variant = Variant()

    def errors(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[float, ...]:
        """Returns the relative mean squared error of a plan for each spectrum (`Distances`)."""
        return tuple(relative_mse(end, field) for end, field in self._ends(plan, levels, solver))

    def distances(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[Distances, ...]:
        """Returns the distances of a plan for each spectrum."""
        ends = self._ends(plan, levels, solver)
        return tuple(Distances(relative_mse(end, field), wasserstein_2(end, field)) for end, field in ends)

    def _ends(self, plan: Plan, levels: Sequence[float], solver: Solver) -> list[tuple[Array, Field]]:
        fields = [Field(shape=self.shape, exponent=exponent) for exponent in self.exponents]
        return [(end_of(plan, levels, field, solver, self.variant), field) for field in fields]


def relative_mse(end: Array, field: Field) -> float:
    """Returns the relative mean squared error of the ends (K, h, w) for units of noise; see `Distances`."""
    exact = _exact_end(field)
    own, fresh = end[: len(exact)], end[len(exact) :]
    return float(((own - exact) ** 2).sum() + (fresh**2).sum()) / len(exact)


def wasserstein_2(end: Array, field: Field) -> float:
    """Returns the Wasserstein-2 distance as defined in `Distances`; see `Laboratory.wasserstein_2`."""
    exact = _exact_end(field)
    size = len(exact)
    shared = float(np.linalg.svd(end.reshape(len(end), size) @ exact.reshape(size, size), compute_uv=False).sum())
    return float(np.sqrt(max(float((end**2).sum()) + size - 2.0 * shared, 0.0) / size))


@dataclass(frozen=True)
class SampledSubsetStudy(Study):
    """A study on sampled noise, for any number of tokens in one frame. Its errors have a standard error.

    Attributes:
        variant: Variant of the subset stages.
        count: Number of pictures. Each has its own noise, which is the same for every plan.
        seed: Seed of the noise.
    """

    variant: Variant = Variant()
    count: int = 16
    seed: int = 0

    def errors(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[float, ...]:
        """Returns the relative mean squared error of a plan for each spectrum (`Distances`)."""
        return tuple(float(each.mean()) for each in self.of_pictures(plan, levels, solver))

    def distances(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[Distances, ...]:
        """Returns the distances of a plan for each spectrum, without the one between distributions."""
        return tuple(Distances(error, None) for error in self.errors(plan, levels, solver))

    def of_pictures(self, plan: Plan, levels: Sequence[float], solver: Solver) -> tuple[Array, ...]:
        """Returns the relative squared error of each picture, (count,), for each spectrum."""
        draw = np.random.default_rng(self.seed)
        own, fresh = (draw.standard_normal((self.count, *self.shape)) for _ in range(2))
        noise = fresh if self.variant.is_fresh else own
        found = []
        for field in (Field(shape=self.shape, exponent=exponent) for exponent in self.exponents):
            exact = np.fft.ifft2(np.fft.fft2(own) * np.sqrt(_averaged_power(field, 1))).real
            end = run_from(own, noise, plan, levels, field, solver, self.variant)
            found.append(((end - exact) ** 2).mean(axis=(1, 2)))  # a field of unit variance
        return tuple(found)


def end_of(plan: Plan, levels: Sequence[float], field: Field, solver: Solver, variant: Variant) -> Array:
    """Returns the ends (K, h, w) of a run for every unit of its noise (`run_from`).

    The first h w belong to the start noise. If moved tokens get fresh noise, as many follow for that noise.
    """
    height, width = field.shape
    own = np.eye(height * width).reshape(-1, height, width)
    state = np.concatenate([own, np.zeros_like(own)]) if variant.is_fresh else own
    noise = np.concatenate([np.zeros_like(own), own]) if variant.is_fresh else own
    return run_from(state, noise, plan, levels, field, solver, variant)


def run_from(
    state: Array, noise: Array, plan: Plan, levels: Sequence[float], field: Field, solver: Solver, variant: Variant
) -> Array:
    """Returns the ends (K, h, w) of a run from some start noise.

    Args:
        state: Start noise, (K, h, w).
        noise: Noise for the targets of moved tokens, (K, h, w).
        plan: The stages; the share of tokens rises from one subset stage to the next.
        levels: Noise levels, one more than steps.
        field: The field of one frame.
        solver: The solver. As in the product's `Multistep`, anchors are also extrapolated at the end of a subset stage.
        variant: Variant of the subset stages.
    """
    height, width = field.shape
    grid = (height // 2, width // 2)
    stages = [stage for stage in plan.stages for _ in range(stage.steps)]
    before: _Before | None = None
    for stage, (level, following) in zip(stages, pairwise(levels), strict=True):
        changes = before is not None and before.stage is not stage
        anchors = _anchors_of(plan, stage, grid, variant.seed)
        if changes and before is not None and before.anchors is not None and variant.move > 0.0:
            state = _moved(state, before, anchors, level, noise, variant.move, grid)
        clean = _clean(state, level, stage, anchors, field, variant)
        aim = clean
        if before is not None and solver != "euler":
            weight = extrapolation_weight(before.level, level, following) * _carries(before, changes, solver, grid)
            aim = clean + weight * (clean - before.clean)
        before = _Before(stage, level, clean, anchors)
        state = following / level * state + (1.0 - following / level) * aim
    return state


@dataclass(frozen=True, eq=False)
class _Before:
    """The previous step: its stage, level, clean estimate (K, h, w) and anchors (M,), or None without anchors."""

    stage: Stage
    level: float
    clean: Array
    anchors: tuple[int, ...] | None


def _carries(before: _Before, changes: bool, solver: Solver, grid: tuple[int, int]) -> Array | float:
    """Returns the weight with which the next step extrapolates from this one: 1, 0, or a picture (h, w) of both."""
    if not changes or solver == "dpmpp_2m_across":
        return 1.0
    if before.anchors is None:
        return 0.0 if before.stage.factor > 1 else 1.0
    chosen = np.zeros((1, grid[0] * grid[1], 4))
    chosen[:, before.anchors] = 1.0
    where: Array = _picture(chosen, grid)[0]
    return where


def _clean(
    state: Array, level: float, stage: Stage, anchors: tuple[int, ...] | None, field: Field, variant: Variant
) -> Array:
    """Returns the clean estimate (K, h, w) of every latent."""
    if anchors is None:
        averages = _averaged(state, stage.factor)
        gain = posterior_gain(_averaged_power(field, stage.factor), level)
        return _brought_up(np.fft.ifft2(np.fft.fft2(averages) * gain).real, stage.factor)
    grid = (state.shape[1] // 2, state.shape[2] // 2)
    seen = _tokens(state)[:, anchors]
    mean = _mean_at(anchors, seen.reshape(len(seen), -1), level, field).reshape(seen.shape)
    weights = _lifter(anchors, grid)
    if variant.lifter == "clean":
        return _picture(weights @ mean, grid)
    return state - _picture(weights @ (seen - mean), grid)


def _mean_at(anchors: tuple[int, ...], seen: Array, level: float, field: Field) -> Array:
    """Returns the optimal network's clean latents of the anchors, (K, 4 M), from their noisy ones."""
    if seen.shape[1] > _MOST_LATENTS:
        return posterior_mean(seen, _places(field, anchors), _averaged_power(field, 1), level)
    variances, basis = _covariance_of(field, anchors)
    return np.asarray(((seen @ basis) * posterior_gain(variances, level)) @ basis.T)


def _moved(
    state: Array,
    before: _Before,
    anchors: tuple[int, ...] | None,
    level: float,
    noise: Array,
    move: float,
    grid: tuple[int, int],
) -> Array:
    """Returns the state with newly activated tokens moved towards their target (micro-flow, arXiv:2603.10744)."""
    assert before.anchors is not None
    num_tokens = grid[0] * grid[1]
    new = sorted(set(range(num_tokens) if anchors is None else anchors) - set(before.anchors))
    lifted = _lifter(before.anchors, grid) @ _tokens(before.clean)[:, before.anchors]
    target = (1.0 - level) * lifted + level * _tokens(noise)
    tokens = _tokens(state).copy()
    tokens[:, new] += move * (target[:, new] - tokens[:, new])
    return _picture(tokens, grid)


@functools.lru_cache(maxsize=64)
def _anchors_of(plan: Plan, stage: Stage, grid: tuple[int, int], seed: int) -> tuple[int, ...] | None:
    """Returns the anchors of a stage, including those of earlier subset stages; None if it shows all tokens."""
    if stage.density == 1.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    num_tokens = grid[0] * grid[1]
    counts = [int(each.density * num_tokens + 1e-9) for each in plan.stages if each.density < 1.0]
    which = [each for each in plan.stages if each.density < 1.0].index(stage)
    anchors = first_anchors(grid, counts[0], generator)[None]
    for count in counts[1 : which + 1]:
        scores = torch.rand((1, num_tokens), generator=generator)
        anchors = merge_anchors(anchors, activate(scores, anchors, count - anchors.shape[1]))
    return tuple(anchors[0].tolist())


@functools.lru_cache(maxsize=64)
def _lifter(anchors: tuple[int, ...], grid: tuple[int, int]) -> Array:
    """Returns the product's lift as a matrix (N, M)."""
    plan = make_lift_plan(torch.tensor([anchors]), grid)
    weights: Array = lift(torch.eye(len(anchors))[None], plan)[0].double().numpy()
    return weights


@functools.lru_cache(maxsize=64)
def _covariance_of(field: Field, anchors: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns eigenvalues (4 M,) and eigenvectors (4 M, 4 M) of the covariance of the anchors' latents."""
    height, width = field.shape
    covariance = np.fft.ifft2(_averaged_power(field, 1)).real
    row, column = np.divmod(_places(field, anchors), width)
    between = covariance[(row[:, None] - row) % height, (column[:, None] - column) % width]
    variances, basis = np.linalg.eigh(between)
    return np.maximum(variances, 0.0), basis


@functools.lru_cache(maxsize=64)
def _places(field: Field, anchors: tuple[int, ...]) -> NDArray[np.int64]:
    """Returns the raster indices (4 M,) of the anchors' latents."""
    height, width = field.shape
    return _tokens(np.arange(height * width).reshape(1, height, width))[0, anchors].ravel()


@functools.lru_cache(maxsize=16)
def _averaged_power(field: Field, factor: int) -> Array:
    """Returns the power of the field averaged over f x f latents, in units in which noise has variance level^2."""
    rows, columns = np.meshgrid(*(np.arange(side, dtype=np.float64) for side in field.shape), indexing="ij")
    power = field.power(rows, columns)
    box = np.zeros(field.shape)
    box[:factor, :factor] = 1.0 / factor
    covariance = np.fft.ifft2(power * np.abs(np.fft.fft2(box)) ** 2).real
    return np.asarray(np.fft.fft2(covariance[::factor, ::factor]).real)


@functools.lru_cache(maxsize=8)
def _exact_end(field: Field) -> Array:
    """Returns the end of the exact ODE for each unit of noise, (h w, h, w)."""
    height, width = field.shape
    every = np.eye(height * width).reshape(-1, height, width)
    return np.asarray(np.fft.ifft2(np.fft.fft2(every) * np.sqrt(_averaged_power(field, 1))).real)


def _averaged(state: Array, factor: int) -> Array:
    count, height, width = state.shape
    return np.asarray(state.reshape(count, height // factor, factor, width // factor, factor).mean(axis=(2, 4)))


def _brought_up(averages: Array, factor: int) -> Array:
    """Returns averages (K, h / f, w / f) interpolated bilinearly on a torus, (K, h, w)."""
    for axis in (1, 2):
        shape = [side * factor if each == axis else side for each, side in enumerate(averages.shape)]
        shares = [(offset + 0.5) / factor - 0.5 for offset in range(factor)]
        before, after = np.roll(averages, 1, axis=axis), np.roll(averages, -1, axis=axis)
        parts = [(1.0 - abs(share)) * averages + abs(share) * (after if share > 0.0 else before) for share in shares]
        averages = np.stack(parts, axis=axis + 1).reshape(shape)
    return averages


def _tokens(pictures: Array) -> Array:
    """Returns latents (K, h, w) as tokens of 2 x 2, (K, N, 4)."""
    count, height, width = pictures.shape
    return pictures.reshape(count, height // 2, 2, width // 2, 2).swapaxes(2, 3).reshape(count, -1, 4)


def _picture(tokens: Array, grid: tuple[int, int]) -> Array:
    """Returns tokens (K, N, 4) as latents (K, h, w)."""
    height, width = grid
    return tokens.reshape(-1, height, width, 2, 2).swapaxes(2, 3).reshape(-1, 2 * height, 2 * width)
