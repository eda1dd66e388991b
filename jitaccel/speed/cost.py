"""What a step costs on this machine: seconds by the number of tokens that enter the network, measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ..generation.stats import Cost
from ..generation.stopwatch import wait_for
from ..method.config import JiTConfig
from .control import loop_cost

Seconds = Callable[[int], float]
"""Seconds of one step of one image, one branch, by its number of tokens M."""
StageTokens = Callable[[JiTConfig], Sequence[int]]
"""The numbers of tokens that the stages of a configuration give the network."""

_DENSITIES = (0.32, 0.46, 0.61, 1.0)  # measured; near those of the presets, where the fit has to be right
_ROUNDS = (3, 50)  # at least and at most, each of which times every density once
_ENOUGH_S = 1.0  # past the least number of rounds, no further one is begun after this
_SLOW_S = 20.0  # one round in this or more is all there is: its medians are of steps too long to be disturbed much


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a patch answers: forwards of one image that can be timed, on the model's own device and dtype.

    num_tokens, text_tokens: N and the text beside it. multiple: what numbers of anchors are rounded up to.
    dense: one step's forward of the untouched model. sparse: makes what one accelerated step of M tokens does,
    network and lift. grid: of the tokens, where it is known. num_forced: of the tokens, those that are anchors in every
    step, such as a frame that is given. rows: how many images and branches of guidance a forward holds. release: leaves
    the model where it was, called once.
    """

    num_tokens: int
    text_tokens: int
    device: torch.device
    dense: Callable[[], object]
    sparse: Callable[[int], Callable[[], object]]
    multiple: int = 1
    grid: tuple[int, ...] | None = None
    num_forced: int = 0
    rows: int = 1
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured seconds of a step, and `a + b M + c M^2` between: linear layers and attention, none below 0.

    dense_s: of the untouched model on all N tokens. measured: (tokens, seconds) pairs of accelerated steps.
    terms: a, b, c. multiple, grid, num_forced: as in Probe. defaults: the fields that presets have on this model when
    they are given by name. Called with a number of tokens, returns seconds.
    """

    num_tokens: int
    text_tokens: int
    dense_s: float
    measured: tuple[tuple[int, float], ...]
    terms: tuple[float, float, float]
    multiple: int = 1
    grid: tuple[int, ...] | None = None
    num_forced: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def stage_tokens(self, config: JiTConfig) -> tuple[int, ...]:
        """Returns how many tokens each stage of a configuration gives the network."""
        if self.grid is None:
            return config.token_counts(self.num_tokens, self.num_forced, self.multiple)
        return config.stage_tokens(self.grid, self.num_forced, self.multiple)

    def __call__(self, tokens: int) -> float:
        constant, linear, square = self.terms
        return constant + linear * tokens + square * tokens**2


def measure(
    probe: Probe, clock: Callable[[], float] | None = None, progress: Callable[[int, int], None] | None = None
) -> Costs:
    """Returns the medians of what a probe's forwards take of a row, each warmed up once; rounds over all take turns.

    Three rounds at least, more of what is fast, one of what takes 20 s or more. Waits for the device around each.
    clock: returns seconds; without one, the wall's. progress: called with the number of forwards that have run and the
    number expected, after each.
    """
    counts = measured_counts(probe.num_tokens, probe.multiple, probe.num_forced)
    runs: list[Callable[[], object]] = [probe.dense, *(probe.sparse(count) for count in counts)]
    seen: list[list[float]] = []
    clock = perf_counter if clock is None else clock
    least, most = _ROUNDS
    with torch.no_grad():
        for done, run in enumerate(runs, start=1):  # kernels are chosen and memory is taken here
            _timed(run, probe.device, clock)
            if progress is not None:
                progress(done, len(runs) * (1 + least))
        while len(seen) < least or (len(seen) < most and sum(map(sum, seen)) < _ENOUGH_S):
            # Each round starts with another one: what interrupts regularly must not always hit the same.
            turn = [(k + len(seen)) % len(runs) for k in range(len(runs))]
            times = {k: _timed(runs[k], probe.device, clock) for k in turn}
            seen.append([times[k] for k in range(len(runs))])
            if progress is not None:
                progress(len(runs) * (1 + len(seen)), len(runs) * (1 + max(least, len(seen))))
            if sum(seen[0]) >= _SLOW_S:
                break
    dense, *sparse = (statistics.median(times) / probe.rows for times in zip(*seen, strict=True))
    measured = tuple(zip(counts, sparse, strict=True))
    return Costs(
        num_tokens=probe.num_tokens,
        text_tokens=probe.text_tokens,
        dense_s=dense,
        measured=measured,
        terms=fit(measured),
        multiple=probe.multiple,
        grid=probe.grid,
        num_forced=probe.num_forced,
    )


def measured_counts(num_tokens: int, multiple: int = 1, num_forced: int = 0) -> tuple[int, ...]:
    """Returns the numbers of tokens at which a grid of `num_tokens` is measured, rising, the last all of them.

    num_forced: of the tokens, those that are in all of these numbers.
    """
    counts = (max(1, num_forced + int(density * (num_tokens - num_forced))) for density in _DENSITIES)
    return tuple(sorted({min(-(-count // multiple) * multiple, num_tokens) for count in counts}))


def fit(measured: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Returns a, b, c >= 0 of `a + b M + c M^2`, least squares of the relative errors of (tokens, seconds) pairs."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # lazily, it takes a moment

    tokens, seconds = np.array(measured, dtype=np.float64).T
    largest, seconds = tokens.max(), np.maximum(seconds, 1e-9)  # a clock too coarse reads 0
    design = np.stack([np.ones_like(tokens), tokens / largest, (tokens / largest) ** 2], axis=1)
    terms, _ = nnls(design / seconds[:, None], np.ones_like(seconds))
    return float(terms[0]), float(terms[1] / largest), float(terms[2] / largest**2)


def seconds_of_flops(cost: Cost, text_tokens: int, flops_per_s: float = 1.0) -> Seconds:
    """Returns the cost of a step by its operations alone, for where nothing can be measured.

    cost: (image tokens, text tokens) to operations, as in `flops`. At the default speed a second is an operation.
    """
    return lambda tokens: cost(tokens, text_tokens) / flops_per_s


def loop_seconds(
    config: JiTConfig, num_tokens: int, seconds: Seconds, multiple: int = 1, stage_tokens: StageTokens | None = None
) -> float:
    """Returns what the steps of a configuration with a number of steps take, of one image and one branch.

    stage_tokens: how many tokens its stages have; without it, those of `num_tokens` rounded to `multiple`.
    """
    if isinstance(config.steps, str):
        raise ValueError('loop_seconds: config.steps must be a number, got "caller"; use config.replace(steps=...)')
    counts = config.token_counts(num_tokens, multiple=multiple) if stage_tokens is None else stage_tokens(config)
    return loop_cost(config, counts, seconds, config.steps)


def _timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    wait_for(device)
    start = clock()
    run()
    wait_for(device)
    return clock() - start
