"""Tests whether the first frame of a causal video decoder deserves more tokens, with exact subset stages on frames.

The first latent frame of such a decoder holds one picture. Each later frame holds the mean of four here, and so less
detail. Frames have a joint covariance, and a run is linear in its noise as in `subset`. Plans that keep the first frame
dense take its tokens from the other frames, so the network sees the same number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from jitaccel.method.anchors import activate, first_anchors, merge_anchors
from jitaccel.method.lift import lift, make_lift_plan
from jitaccel.method.solver import extrapolation_weight

from ...registry import Measurement
from .field import Array
from .levels import BETA
from .linear import Distances, Solver, posterior_gain
from .plan import Plan, Stage
from .questions import by_spectrum, row
from .study import Study
from .subset import Variant

PICTURES = 4  # in each latent frame after the first
_LONGEST = 64  # number of pictures in the periodic field of which a video is a part
_LEVELS = (1.4, 0.425)


@dataclass(frozen=True)
class FirstFrameStudy(Study):
    """A study of videos, with plans of dense stages and stages on a subset of each frame's tokens.

    The field has power `(1 + |k|^2 + (change k_t)^2)^(-exponent / 2)` in cycles per picture and per 16 pictures.

    Attributes:
        change: Speed of change; the larger, the less a frame says about the next.
        is_first_dense: Whether every token of the first frame is an anchor.
        variant: Variant of the subset stages; nothing is moved.
    """

    change: float = 1.0
    is_first_dense: bool = False
    variant: Variant = field(default_factory=Variant)

    def errors(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[float, ...]:
        """Returns the relative mean squared error of a plan for each spectrum (`Distances`)."""
        return tuple(each.relative_mse for each in self.distances(plan, levels, solver))

    def distances(self, plan: Plan, levels: Sequence[float], solver: Solver = "dpmpp_2m") -> tuple[Distances, ...]:
        """Returns the distances of a plan for each spectrum, without the one between distributions."""
        shares = (self.errors_of_frames(plan, levels, solver, exponent) for exponent in self.exponents)
        return tuple(Distances(float(np.mean(each)), None) for each in shares)

    def errors_of_frames(self, plan: Plan, levels: Sequence[float], solver: Solver, exponent: float) -> Array:
        """Returns the squared error of each frame, (t,), relative to the mean square of the video."""
        video = _video(self.shape, exponent, self.change)
        end = self._end(plan, levels, solver, video)
        square: Array = ((end - video.root) ** 2).sum(axis=0).reshape(self.shape[0], -1).mean(axis=1)
        return square

    def _end(self, plan: Plan, levels: Sequence[float], solver: Solver, video: _Video) -> Array:
        """Returns the end of a run for each unit of noise, (n, n) for n latents."""
        state, before = np.eye(len(video.root)), None
        stages = [stage for stage in plan.stages for _ in range(stage.steps)]
        for stage, (level, following) in zip(stages, pairwise(levels), strict=True):
            seen = video.latents_of(_anchors_of(plan, stage, self.grid, self.is_first_dense, self.variant.seed))
            clean = self._clean(state, level, seen, video)
            aim = clean
            if before is not None and solver != "euler":
                carries = _carries(before[3], len(clean), before[0] is not stage and solver == "dpmpp_2m")
                aim = clean + extrapolation_weight(before[1], level, following) * carries * (clean - before[2])
            before = (stage, level, clean, seen)
            state = following / level * state + (1.0 - following / level) * aim
        return state

    def _clean(self, state: Array, level: float, seen: tuple[int, ...], video: _Video) -> Array:
        """Returns the clean estimate of every latent, (n, n)."""
        variances, basis = video.covariance_of(seen)
        shown = state[:, seen]
        mean = ((shown @ basis) * posterior_gain(variances, level)) @ basis.T
        if len(seen) == len(state):
            return np.asarray(mean)
        weights = _lifter(seen, self.grid)
        if self.variant.lifter == "clean":
            return np.asarray(mean @ weights.T)
        return np.asarray(state - (shown - mean) @ weights.T)


@dataclass(frozen=True, eq=False)
class _Video:
    """The covariance (n, n) of a video's latents, ordered by token, and its symmetric root."""

    covariance: Array
    root: Array

    def latents_of(self, anchors: tuple[int, ...] | None) -> tuple[int, ...]:
        """Returns the indices of the latents of the anchors, or of all tokens for None."""
        if anchors is None:
            return tuple(range(len(self.covariance)))
        return tuple(4 * token + latent for token in anchors for latent in range(4))

    def covariance_of(self, seen: tuple[int, ...]) -> tuple[Array, Array]:
        """Returns eigenvalues and eigenvectors of the covariance of some latents."""
        return _spectrum(self, seen)


@functools.lru_cache(maxsize=64)
def _spectrum(video: _Video, seen: tuple[int, ...]) -> tuple[Array, Array]:
    variances, basis = np.linalg.eigh(video.covariance[np.ix_(seen, seen)])
    return np.maximum(variances, 0.0), basis


@functools.lru_cache(maxsize=8)
def _video(shape: tuple[int, ...], exponent: float, change: float) -> _Video:
    """Returns the covariance of a causal encoder's latents, with mean variance 1, and its root."""
    frames, height, width = shape
    axes = np.meshgrid(*(np.fft.fftfreq(side) * side for side in (_LONGEST, height, width)), indexing="ij", sparse=True)
    time, row_, column = axes
    power = (1.0 + row_**2 + column**2 + (change * 16 / _LONGEST * time) ** 2) ** (-exponent / 2.0)
    pictures = np.fft.ifftn(power).real
    between = np.zeros((frames, frames, height, width))
    for first in range(frames):
        for second in range(frames):
            pairs = [(a - b) % _LONGEST for a in _pictures_of(first) for b in _pictures_of(second)]
            between[first, second] = pictures[pairs].mean(axis=0)
    frame, y, x = (each.ravel() for each in _places(shape))
    covariance = between[frame[:, None], frame, (y[:, None] - y) % height, (x[:, None] - x) % width]
    covariance /= np.trace(covariance) / len(covariance)
    variances, basis = np.linalg.eigh(covariance)
    return _Video(covariance, (basis * np.sqrt(np.maximum(variances, 0.0))) @ basis.T)


def _pictures_of(frame: int) -> range:
    """Returns the pictures whose mean is a latent frame."""
    return range(1) if frame == 0 else range(1 + PICTURES * (frame - 1), 1 + PICTURES * frame)


def _places(shape: tuple[int, ...]) -> Array:
    """Returns frame, row and column of each latent, (3, n), ordered by token."""
    frames, height, width = shape
    split = np.indices(shape).reshape(3, frames, height // 2, 2, width // 2, 2)
    return np.asarray(split.swapaxes(3, 4).reshape(3, -1))


def _carries(seen: tuple[int, ...], count: int, is_at_anchors: bool) -> Array | float:
    """Returns the weight with which the next step extrapolates from this one: 1, or (n,) for each latent."""
    if not is_at_anchors:
        return 1.0
    where = np.zeros(count)
    where[[*seen]] = 1.0
    return where


@functools.lru_cache(maxsize=64)
def _anchors_of(
    plan: Plan, stage: Stage, grid: tuple[int, ...], is_first_dense: bool, seed: int
) -> tuple[int, ...] | None:
    """Returns the anchors of a stage, including those of earlier subset stages; None if it shows all tokens."""
    if stage.density == 1.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(np.prod(grid))
    forced = torch.arange(num_tokens) < num_tokens // grid[0] if is_first_dense else None
    sparse = [each for each in plan.stages if each.density < 1.0]
    counts = [int(each.density * num_tokens + 1e-9) for each in sparse]
    anchors = first_anchors(grid, counts[0], generator, forced)[None]
    for count in counts[1 : sparse.index(stage) + 1]:
        scores = torch.rand((1, num_tokens), generator=generator)
        anchors = merge_anchors(anchors, activate(scores, anchors, count - anchors.shape[1]))
    return tuple(anchors[0].tolist())


@functools.lru_cache(maxsize=64)
def _lifter(seen: tuple[int, ...], grid: tuple[int, ...]) -> Array:
    """Returns the product's lift of latents as a matrix (n, m)."""
    anchors = [latent // 4 for latent in seen[::4]]
    plan = make_lift_plan(torch.tensor([anchors]), grid)
    weights = lift(torch.eye(len(anchors))[None], plan)[0].double().numpy()
    return np.kron(weights, np.eye(4))


_PLANS: Mapping[str, tuple[Plan, Variant, Solver]] = MappingProxyType(
    {
        "the paper's stages": (
            Plan((Stage(steps=4, density=0.35), Stage(steps=3, density=0.62), Stage(steps=4))),
            Variant("velocity"),
            "euler",
        ),
        "its stages, clean estimate lifted": (
            Plan((Stage(steps=4, density=0.35), Stage(steps=3, density=0.62), Stage(steps=4))),
            Variant("clean"),
            "dpmpp_2m",
        ),
        "half of the tokens, then dense": (
            Plan((Stage(steps=4, density=0.5), Stage(steps=5))),
            Variant("clean"),
            "dpmpp_2m",
        ),
    }
)


def first_frame(study: FirstFrameStudy = FirstFrameStudy((5, 12, 16), (3.0, 3.6))) -> Iterator[Measurement]:
    """Yields subset plans with equal frames, and with the first frame dense and fewer tokens in the others.

    `error_of_first_frame` and `error_of_last_frame` are relative to the mean square of the whole video.
    """
    for change in (1.0, 3.0):
        for name, (plan, variant, solver) in _PLANS.items():
            levels = BETA.levels(plan.steps, *_LEVELS)
            for is_first_dense in (False, True):
                its = replace(study, change=change, is_first_dense=is_first_dense, variant=variant)
                frames = [its.errors_of_frames(plan, levels, solver, exponent) for exponent in its.exponents]
                words = "first frame dense" if is_first_dense else "frames alike"
                extra: dict[str, Any] = {
                    "variant": f"{name}, {words}, change {change:g}",
                    "error_of_first_frame": by_spectrum(its, [float(each[0]) for each in frames]),
                    "error_of_last_frame": by_spectrum(its, [float(each[-1]) for each in frames]),
                }
                yield row(its, plan, levels, BETA.name, solver, extra, _LEVELS, f"{extra['variant']}: ")
