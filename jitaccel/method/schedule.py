"""Noise levels and stages as plain floats: 1 is pure noise, 0 is data."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from ..errors import ConfigError
from .checks import check_steps
from .config import JiTConfig

# bfloat16 is off by up to 2**-8 of a value, and diffusers' pipelines round twice: first the timestep, 1000 times the
# level, then its quotient by 1000.
LEVEL_TOLERANCE = 2.0**-7


@lru_cache(maxsize=64)
def beta_levels(num_steps: int, alpha: float = 1.4, beta: float = 0.425) -> tuple[float, ...]:
    """Returns `num_steps + 1` noise levels, from 1 down to `1 / num_steps`, then 0.

    `level_i = s + (1 - s) * BetaPPF(1 - i / (n - 1); alpha, beta)`, s = 1 / n (arXiv:2603.10744; beta = 0.425 is the
    released code's, the paper's text says 0.42). Computed in double precision; the released code rounds to float32. A
    single step starts at level 1.

    Raises:
        ConfigError: If the levels of `alpha` and `beta` do not fall strictly.
    """
    from scipy.special import betaincinv  # type: ignore[import-untyped]  # lazily: no other part of the package needs scipy

    if num_steps < 1:
        raise ConfigError(f"beta_levels: num_steps must be at least 1, got {num_steps}; ask for a step")
    lowest = 1.0 / num_steps
    quantiles = [1.0 - i / (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [1.0]
    levels = (*(lowest + (1.0 - lowest) * float(betaincinv(alpha, beta, q)) for q in quantiles), 0.0)
    if not all(after < before for before, after in pairwise(levels)):
        raise ConfigError(
            f"beta_levels: alpha and beta must make levels that fall strictly, got {alpha} and {beta} at "
            f"{num_steps} steps; use values nearer to 1.4 and 0.425"
        )
    return levels


def log_snr_levels(num_steps: int, first: float, last: float) -> tuple[float, ...]:
    """Returns `num_steps + 1` noise levels: 1, then even steps of log((1 - level) / level) from `first` to `last`, 0.

    Second-order solvers extrapolate in that logarithm. A variant of ours. With two steps, the level between 1 and 0 is
    at the middle of `first` and `last`; a single step has none.
    """
    if num_steps < 1:
        raise ConfigError(f"log_snr_levels: num_steps must be at least 1, got {num_steps}; ask for a step")
    inner = num_steps - 1
    ratios = [first + (last - first) * (k / (inner - 1) if inner > 1 else 0.5) for k in range(inner)]
    return (1.0, *(1.0 / (1.0 + math.exp(ratio)) for ratio in ratios), 0.0)


def noise_levels(config: JiTConfig, steps: int | None = None) -> tuple[float, ...]:
    """Returns the noise levels of a configuration, one more than it has steps, the last 0.

    Args:
        config: The configuration; its schedule, alpha, beta and log_snr are used.
        steps: Number of steps. Required if `config.steps` is "caller"; otherwise it takes precedence.

    Raises:
        ConfigError: For the "native" schedule, whose levels only the sampler knows; for a missing step count; and for a
            step count that differs from that of an explicit schedule.
    """
    if not isinstance(config, JiTConfig):
        raise ConfigError(
            f"noise_levels: config must be a JiTConfig, got {config!r}; pass one, for example jitaccel.PRESETS['7x']"
        )
    if config.schedule == "native":
        raise ConfigError(
            'noise_levels: schedule must be "beta", "log_snr" or explicit levels, got "native"; '
            "read the levels from the sampler, or pass them as schedule=(...)"
        )
    if not isinstance(config.schedule, str):
        if steps is not None and steps != len(config.schedule) - 1:
            raise ConfigError(
                f"noise_levels: steps must match the explicit schedule, got {steps}; "
                f"use {len(config.schedule) - 1}"
            )
        return config.schedule
    count = config.steps if steps is None else steps
    if count == "caller":
        raise ConfigError(
            'noise_levels: steps must be given if config.steps is "caller", got None; '
            "pass the sampler's number of steps"
        )
    check_steps("noise_levels", count)
    if config.schedule == "log_snr":
        return log_snr_levels(count, *config.log_snr)
    return beta_levels(count, config.alpha, config.beta)


def stage_starts_by_level(config: JiTConfig, steps: int | None = None) -> tuple[float, ...]:
    """Returns the noise level at which each stage starts on the configuration's own levels.

    Used for a bare model, whose loop is unknown: a stage is due once the level has fallen to its start. Raises
    ConfigError as `noise_levels` does.
    """
    levels = noise_levels(config, steps)
    starts = (0, *config.stage_ends(len(levels) - 1)[:-1])
    return tuple(levels[start] for start in starts)


def stage_of_level(level: float, starts: Sequence[float]) -> int:
    """Returns the last stage whose starting level is at least `level`, up to bfloat16 rounding.

    A level above every later start is stage 0. Where levels are closer than the rounding, a stage may start one step
    early.

    Args:
        level: Noise level of the step.
        starts: As `stage_starts_by_level` returns them.
    """
    return sum(level <= start * (1.0 + LEVEL_TOLERANCE) for start in starts[1:])


def match_level(level: float, levels: Sequence[float], after: int = -1) -> int | None:
    """Returns the index, beyond `after`, of the entry of `levels` nearest to `level`, or None if none is near.

    Near means within bfloat16 rounding. Ties go to the earlier entry. The final entry never matches, because no step
    starts there. bfloat16 rounds the first two levels of 4x-paper to 1.0; `after`, the index matched at the previous
    step, distinguishes them.
    """
    candidates = range(after + 1, len(levels) - 1)
    nearest = min(candidates, key=lambda i: abs(levels[i] - level), default=None)
    if nearest is None or abs(levels[nearest] - level) > LEVEL_TOLERANCE * level:
        return None
    return nearest


def predict_next_level(
    level: float, levels: Sequence[float], previous: float | None = None, after: int = -1
) -> float:
    """Returns the level to which the step that starts at `level` probably goes, in [0, level).

    If a known level matches (`match_level`), the answer is the next known level. Otherwise the last step is assumed to
    repeat; without a last step, the answer is the nearest known level below, or 0.

    Args:
        level: In (0, 1].
        levels: The expected levels, falling; may be empty.
        previous: The level of the previous step.
        after: The index of `levels` matched by the previous step.
    """
    if not (math.isfinite(level) and level > 0.0):
        raise ValueError(f"predict_next_level: level must be above 0, got {level}; no step starts at 0")
    index = match_level(level, levels, after)
    # The matched entry may be below its rounded level and the next one above it; the level must still fall.
    if index is not None and levels[index + 1] < level:
        return levels[index + 1]
    if index is None and previous is not None and previous > level:
        return max(0.0, level - (previous - level))
    return max((known for known in levels if 0.0 <= known < level), default=0.0)
