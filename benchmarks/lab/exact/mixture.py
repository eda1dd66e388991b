"""Fields with localised detail, on which activation by importance is measured, with the optimal network.

A picture is `smooth + activity * detail`: two Gaussian fields, and one of several equally likely maps of activity.
Given the map, the field is Gaussian. The optimal network therefore averages the conditional means under all maps,
weighted by their posterior. Both have closed forms, on all tokens and on any subset. Runs are the product's own
`Run`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from jitaccel.method.config import JiTConfig
from jitaccel.method.importance import importance
from jitaccel.method.run import Left, Parts, Run, importance_of
from jitaccel.method.schedule import beta_levels
from jitaccel.method.steps import KnownLevels

Scores = Callable[[Run, Left], Tensor]
_QUIET = 0.1  # activity outside the active region of a map


@dataclass(frozen=True)
class Mixture:
    """Pictures of `side` x `side` latents with detail in one of `per_side`^2 discs.

    Attributes:
        side: Number of latents along each axis.
        per_side: Number of maps along each axis.
        exponent: Decay of the total power of both fields, `(1 + k^2)^(-exponent / 2)`.
        split: Frequency in cycles per picture from which power counts as detail.
    """

    side: int = 24
    per_side: int = 3
    exponent: float = 1.4
    split: float = 3.0

    @property
    def grid(self) -> tuple[int, int]:
        """Number of tokens along each axis."""
        return self.side // 2, self.side // 2

    @functools.cached_property
    def activity(self) -> Tensor:
        """Maps (J, h w) float64 in token order, between _QUIET and 1."""
        place = torch.arange(self.side, dtype=torch.float64)
        centres = (torch.arange(self.per_side, dtype=torch.float64) + 0.5) * self.side / self.per_side
        away = (place[None] - centres[:, None]).abs()
        bump = torch.exp(-0.5 * (torch.minimum(away, self.side - away) / (self.side / 8)).square())
        maps = _QUIET + (1.0 - _QUIET) * torch.einsum("ay, bx -> abyx", bump, bump)
        return in_tokens(maps.flatten(0, 1)).flatten(1)

    @functools.cached_property
    def covariances(self) -> Tensor:
        """Covariance of the latents under each map, (J, h w, h w) float64 in token order."""
        frequency = torch.fft.fftfreq(self.side, dtype=torch.float64) * self.side
        square = frequency[:, None].square() + frequency.square()
        power = (1.0 + square) ** (-self.exponent / 2.0)
        is_detail = square >= self.split**2
        smooth, detail = (self._covariance(power * part) for part in (~is_detail, is_detail))
        return smooth + self.activity[:, :, None] * detail * self.activity[:, None, :]

    def _covariance(self, power: Tensor) -> Tensor:
        units = torch.eye(self.side**2, dtype=torch.float64).view(-1, self.side, self.side)
        roots = in_tokens(torch.fft.ifft2(torch.fft.fft2(units) * power.sqrt()).real).flatten(1)
        return roots.T @ roots

    @functools.cached_property
    def spectra(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (J, h w) and eigenvectors (J, h w, h w) of the covariances."""
        values, vectors = torch.linalg.eigh(self.covariances)
        return values.clamp(min=0.0), vectors

    def clean(self, seen: Tensor, level: float, anchors: Tensor | None = None) -> Tensor:
        """Returns the mean of the anchors' clean latents given the noisy ones, (B, M, 4) float64.

        Args:
            seen: (B, M, 4), the noisy latents.
            level: Noise level.
            anchors: (B, M); None for all tokens.
        """
        if anchors is None:
            values, vectors = self.spectra
            inside = torch.einsum("bn, jnk -> jbk", seen.double().flatten(1), vectors)
            variance = (1.0 - level) ** 2 * values + level**2
            means = (inside * ((1.0 - level) * values / variance)[:, None]) @ vectors.mT
            fit = -0.5 * ((inside.square() / variance[:, None]).sum(-1) + variance.log().sum(-1)[:, None])
            return torch.einsum("jb, jbn -> bn", fit.softmax(dim=0), means).view_as(seen)
        pairs = zip(seen, anchors, strict=True)
        return torch.stack([self._clean_of(one, level, rows) for one, rows in pairs])

    def _clean_of(self, seen: Tensor, level: float, anchors: Tensor) -> Tensor:
        place = (4 * anchors[:, None] + torch.arange(4)).flatten()
        known = self.covariances[:, place[:, None], place]
        noisy = seen.double().flatten()
        root = torch.linalg.cholesky((1.0 - level) ** 2 * known + level**2 * torch.eye(len(place), dtype=torch.float64))
        solved = torch.cholesky_solve(noisy[None, :, None].expand(len(root), -1, 1), root)[..., 0]
        means = (1.0 - level) * (known @ solved[..., None])[..., 0]
        fit = -0.5 * solved @ noisy - root.diagonal(dim1=1, dim2=2).log().sum(-1)
        mean: Tensor = fit.softmax(dim=0) @ means
        return mean.view_as(seen)

    def noise(self, count: int, seed: int) -> Tensor:
        """Returns start noise (B, N, 4) float32."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.side**2 // 4, 4, generator=generator)

    def end(self, noise: Tensor, steps: int = 60) -> Tensor:
        """Returns the approximate end of the exact ODE from `noise`, (B, N, 4), with many dense 2M steps."""
        config = JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=steps, solver="dpmpp_2m", alpha=0.6, beta=0.4)
        return self.run(config, noise)

    def run(self, config: JiTConfig, noise: Tensor, scores: Scores = importance_of) -> Tensor:
        """Returns the end of the product's run of a configuration on Beta levels, (B, N, 4).

        `scores` decide which tokens are activated.
        """
        clock = KnownLevels(config, beta_levels(int(config.steps), config.alpha, config.beta))
        state = noise
        run = Run(config, self.grid, clock.step(0), state, parts=Parts(scores=scores))
        for step in map(clock.step, range(clock.num_steps)):
            state = run.enter(step, state)
            seen = run.gather(state)
            clean = self.clean(seen, step.noise_level, None if run.is_dense else run.anchors)
            velocity = ((seen.double() - clean) / step.noise_level).float()
            state = state + (step.next_level - step.noise_level) * run.leave(step, state, velocity)
        return state

    def map_of(self, pictures: Tensor) -> Tensor:
        """Returns the index (B,) of the most likely map of clean pictures (B, N, 4)."""
        values, vectors = self.spectra
        inside = torch.einsum("bn, jnk -> jbk", pictures.double().flatten(1), vectors)
        variance = values + 1e-6  # so that a run that ends slightly outside the field's support is not impossible
        fit = -0.5 * ((inside.square() / variance[:, None]).sum(-1) + variance.log().sum(-1)[:, None])
        return fit.argmax(dim=0)


def in_tokens(pictures: Tensor) -> Tensor:
    """Returns latents (K, h, w) as tokens of 2 x 2, (K, N, 4)."""
    count, height, width = pictures.shape
    return pictures.view(count, height // 2, 2, width // 2, 2).transpose(2, 3).reshape(count, -1, 4)


def by_clean_variance(run: Run, left: Left) -> Tensor:
    """Returns the local variance of the clean estimate, (B, N)."""
    clean = left.state - left.noise_level * left.velocity
    return importance(clean, run.grid, run.config.importance_window)


def by_chance(run: Run, left: Left) -> Tensor:
    """Returns noise, (B, N), from the run's own generators."""
    size = left.velocity.shape[1]
    return torch.stack([torch.rand(size, generator=generator) for generator in run.generators])


def by_truth(mixture: Mixture, ends: Tensor) -> Scores:
    """Returns scores that know where the exact ODE's picture has its detail."""
    known = mixture.activity[mixture.map_of(ends)].unflatten(1, (-1, 4)).mean(dim=-1).float()
    return lambda run, left: known


SCORES: Mapping[str, Scores] = MappingProxyType(
    {
        "random": by_chance,
        "variance of the velocity": importance_of,
        "variance of the clean estimate": by_clean_variance,
    }
)
