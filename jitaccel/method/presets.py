"""The presets: what people choose by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, suggestion
from .config import JiTConfig


def sparse_start(steps: int, boundary: float | None = None) -> JiTConfig:
    """Returns what the quality lab found to pay (docs/quality.md): one step at a third of the tokens, then dense ones.

    The paper's own settings, as its authors released them, are the presets that end in "-paper". steps: 2 or more.
    boundary: share of the steps that are sparse; given where other numbers of steps are to be allowed as well.
    """
    return JiTConfig(
        densities=(0.32, 1.0),
        boundaries=(1.0 / steps if boundary is None else boundary, 1.0),
        steps=steps,
        lifter="clean",
        micro_flow="none",
        solver="dpmpp_2m",
    )


PRESETS: Mapping[str, JiTConfig] = MappingProxyType(
    {
        "4x": sparse_start(13, 0.15),
        "7x": sparse_start(7, 0.25),
        "10x": sparse_start(5, 0.25),
        "4x-paper": JiTConfig(densities=(0.35, 0.62, 1.0), boundaries=(0.4, 0.65, 1.0), steps=18),
        "7x-paper": JiTConfig(densities=(0.32, 0.60, 1.0), boundaries=(0.4, 0.65, 1.0), steps=11),
        "dense": JiTConfig(densities=(1.0,), boundaries=(1.0,), steps=50, schedule="native"),
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
