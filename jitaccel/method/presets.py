"""The named presets."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from ..errors import ConfigError, suggestion
from .config import JiTConfig

DENSE_STEPS = 50
"""The baseline of a speed-up, also in the names of the presets."""


def pooled_start(pooled: int, dense: int, alpha: float, beta: float) -> JiTConfig:
    """Returns steps on a picture of half the size followed by dense ones, all with the second-order solver.

    Args:
        pooled: Number of pooled steps (`jitaccel.method.pool`), at least 1.
        dense: Number of dense steps, at least 1.
        alpha: First parameter of the Beta distribution of all levels together.
        beta: Second parameter. The exact laboratory optimises both (docs/exact-lab.md).
    """
    steps = pooled + dense
    return JiTConfig(
        densities=(0.25, 1.0),
        boundaries=(pooled / steps, 1.0),
        steps=steps,
        alpha=alpha,
        beta=beta,
        lifter="clean",
        micro_flow="none",
        solver="dpmpp_2m",
        pooling=(2, 1),
    )


def few_steps(steps: int, boundary: float | None = None) -> JiTConfig:
    """Returns one step on a third of the tokens, then dense second-order steps: few steps rather than sparse ones.

    Args:
        steps: At least 2.
        boundary: Share of the steps that are sparse. Set it if the preset must allow other step counts too.
    """
    return JiTConfig(
        densities=(0.32, 1.0),
        boundaries=(1.0 / steps if boundary is None else boundary, 1.0),
        steps=steps,
        lifter="clean",
        micro_flow="none",
        solver="dpmpp_2m",
    )


# Levels with the least error in the exact laboratory at 64x64 tokens, for spectra 2.0 and 2.6 together, if the network
# at half the size may assume a spectrum that is off by 0.15 (docs/exact-lab.md). Levels closer than 2^-9 are left out:
# bfloat16 timesteps cannot distinguish them, and a pooled step between them would have no effect. At least half of the
# steps are pooled. Most expensive first.
_PLANS = (
    (9, 9, 0.985, 0.457),
    (8, 8, 0.917, 0.431),
    (7, 7, 0.878, 0.405),
    (6, 6, 0.809, 0.373),
    (6, 5, 0.860, 0.363),
    (6, 4, 0.874, 0.348),
    (6, 3, 0.941, 0.336),
    (6, 2, 1.17, 0.346),
    (4, 2, 1.17, 0.325),
)
POOLED_PLANS: Mapping[tuple[int, int], JiTConfig] = MappingProxyType(
    {(pooled, dense): pooled_start(pooled, dense, alpha, beta) for pooled, dense, alpha, beta in _PLANS}
)
"""Configurations by their numbers of pooled and dense steps, most expensive first."""

PresetName = Literal["4x", "7x", "10x", "few-steps", "4x-paper", "7x-paper", "dense"]
"""The names of PRESETS, for type checkers and editors."""

PRESETS: Mapping[str, JiTConfig] = MappingProxyType(
    {
        "4x": POOLED_PLANS[9, 9],
        "7x": POOLED_PLANS[6, 5],
        "10x": POOLED_PLANS[6, 3],
        "few-steps": few_steps(7, 0.25),
        "4x-paper": JiTConfig(densities=(0.35, 0.62, 1.0), boundaries=(0.4, 0.65, 1.0), steps=18),
        "7x-paper": JiTConfig(densities=(0.32, 0.60, 1.0), boundaries=(0.4, 0.65, 1.0), steps=11),
        "dense": JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=DENSE_STEPS, schedule="native"),
    }
)


def resolve(preset_or_config: str | JiTConfig, **overrides: Any) -> JiTConfig:
    """Returns the preset of that name, or the configuration itself, with the named fields changed."""
    if isinstance(preset_or_config, JiTConfig):
        config = preset_or_config
    elif isinstance(preset_or_config, str) and preset_or_config in PRESETS:
        config = PRESETS[preset_or_config]
    else:
        raise ConfigError(
            f"resolve: preset must be one of {', '.join(PRESETS)} or a JiTConfig, got {preset_or_config!r}; "
            f"{suggestion(preset_or_config, PRESETS)}"
        )
    return config.replace(**overrides) if overrides else config
