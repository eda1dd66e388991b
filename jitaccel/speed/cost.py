"""Measures what a step costs on this machine: seconds by the number of tokens that enter the network."""

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
"""Seconds of one step of one image and one branch, by its number of tokens M."""
StageTokens = Callable[[JiTConfig], Sequence[int]]
"""The numbers of tokens that enter the network in the stages of a configuration."""

_DENSITIES = (0.32, 0.46, 0.61, 1.0)  # measured; close to those of the presets, where the fit matters most
_ROUNDS = (3, 50)  # smallest and largest number; each round times every density once
_ENOUGH_S = 1.0  # after the smallest number of rounds, none is started after this many seconds
_SLOW_S = 20.0  # if one round takes this long, no more are run: long steps are hardly affected by disturbances


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Forwards of one image that a patch provides for timing, on the model's own device and dtype.

    Attributes:
        num_tokens: N.
        text_tokens: Text tokens in addition.
        multiple: Numbers of anchors are rounded up to a multiple of this.
        dense: Runs one step's forward of the untouched model.
        sparse: Returns a function that runs one accelerated step of M tokens, network and lift.
        grid: The token grid, if known.
        num_forced: Number of tokens that are anchors in every step, such as those of a given frame.
        rows: Images times guidance branches in a forward.
        release: Restores the model; called once.
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
    """Measured seconds of a step, with `a + b M + c M^2` in between (linear layers and attention; no term negative).

    Calling it with a number of tokens returns seconds.

    Attributes:
        dense_s: Seconds of the untouched model on all N tokens.
        measured: (tokens, seconds) pairs of accelerated steps.
        terms: a, b, c.
        multiple: As in Probe.
        grid: As in Probe.
        num_forced: As in Probe.
        defaults: The fields that presets given by name have on this model.
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
        """Returns how many tokens enter the network in each stage of a configuration."""
        if self.grid is None:
            return config.token_counts(self.num_tokens, self.num_forced, self.multiple)
        return config.stage_tokens(self.grid, self.num_forced, self.multiple)

    def __call__(self, tokens: int) -> float:
        constant, linear, square = self.terms
        return constant + linear * tokens + square * tokens**2


def measure(
    probe: Probe, clock: Callable[[], float] | None = None, progress: Callable[[int, int], None] | None = None
) -> Costs:
    """Returns median seconds per row of a probe's forwards, after warming each up once.

    The forwards take turns in rounds: at least three, more for fast ones, and only one if it takes 20 s or more. Waits
    for the device around each forward.

    Args:
        probe: The forwards.
        clock: Returns seconds; by default the wall clock.
        progress: Called after each forward with the number of forwards done and the expected total.
    """
    counts = measured_counts(probe.num_tokens, probe.multiple, probe.num_forced)
    runs: list[Callable[[], object]] = [probe.dense, *(probe.sparse(count) for count in counts)]
    seen: list[list[float]] = []
    clock = perf_counter if clock is None else clock
    least, most = _ROUNDS
    with torch.no_grad():
        for done, run in enumerate(runs, start=1):  # chooses kernels and allocates memory
            _timed(run, probe.device, clock)
            if progress is not None:
                progress(done, len(runs) * (1 + least))
        while len(seen) < least or (len(seen) < most and sum(map(sum, seen)) < _ENOUGH_S):
            # Each round starts with a different forward, so that a periodic disturbance does not always hit the same
            # one.
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
    """Returns the numbers of tokens at which a grid of `num_tokens` is measured, rising; the last is all tokens.

    num_forced: the number of tokens included in every one of them.
    """
    counts = (max(1, num_forced + int(density * (num_tokens - num_forced))) for density in _DENSITIES)
    return tuple(sorted({min(-(-count // multiple) * multiple, num_tokens) for count in counts}))


def fit(measured: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Returns a, b, c >= 0 of `a + b M + c M^2`, least squares of the relative errors of (tokens, seconds) pairs."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # lazily, because it is slow to import

    tokens, seconds = np.array(measured, dtype=np.float64).T
    largest, seconds = tokens.max(), np.maximum(seconds, 1e-9)  # a coarse clock may read 0
    design = np.stack([np.ones_like(tokens), tokens / largest, (tokens / largest) ** 2], axis=1)
    terms, _ = nnls(design / seconds[:, None], np.ones_like(seconds))
    return float(terms[0]), float(terms[1] / largest), float(terms[2] / largest**2)


def seconds_of_flops(cost: Cost, text_tokens: int, flops_per_s: float = 1.0) -> Seconds:
    """Returns the cost of a step by its operations alone, for machines on which nothing can be measured.

    cost: (image tokens, text tokens) to operations, as in `flops`. By default, one second stands for one operation.
    """
    return lambda tokens: cost(tokens, text_tokens) / flops_per_s


def loop_seconds(
    config: JiTConfig, num_tokens: int, seconds: Seconds, multiple: int = 1, stage_tokens: StageTokens | None = None
) -> float:
    """Returns the seconds of all steps of a configuration, for one image and one branch.

    stage_tokens: Returns the token counts of its stages; by default those of `num_tokens` rounded up to `multiple`.
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
