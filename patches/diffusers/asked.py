"""What a pipeline asks of `set_timesteps`: how many steps, on which levels."""

from __future__ import annotations

import inspect

import numpy as np

from jitaccel.errors import ConfigError
from jitaccel.method.checks import MAX_STEPS
from jitaccel.method.config import JiTConfig

from ..foreign import Arguments, Pipeline


def default_steps(pipeline: Pipeline) -> object:
    """Returns how many steps a pipeline takes where its call names none."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    return None if parameter is None else parameter.default


def requested_steps(asked: Arguments) -> int:
    """Returns how many steps a call of `set_timesteps` asks for."""
    for name in ("sigmas", "timesteps"):
        if asked.get(name) is not None:
            return len(asked[name])
    return int(asked["num_inference_steps"])


def refuse_custom_levels(asked: Arguments, requested: int) -> None:
    """Raises ConfigError for a call that brings its own levels next to those of the configuration."""
    sigmas = asked.get("sigmas")
    usual = np.linspace(1.0, 1.0 / requested, requested)
    if asked.get("timesteps") is not None or (sigmas is not None and not np.allclose(sigmas, usual, atol=1e-6)):
        raise ConfigError(
            "jitaccel: levels must come from one place, got sigmas in the call and in the configuration; "
            "use schedule='native', steps='caller' to keep the call's"
        )


def with_steps(asked: Arguments, steps: int) -> Arguments:
    """Returns a call of `set_timesteps` with another number of steps."""
    if asked.get("sigmas") is not None:
        return {**asked, "sigmas": np.linspace(1.0, 1.0 / steps, steps)}
    return {**asked, "num_inference_steps": steps}


def enough_steps(config: JiTConfig, share: float, more_than: int) -> int | None:
    """Returns the smallest number of steps whose last `share`, counted as pipelines do, gives every stage a step."""
    for steps in range(more_than + 1, min(int(4 * more_than / share) + 2, MAX_STEPS)):
        left = steps - int(max(steps - min(steps * share, steps), 0))
        try:
            config.stage_ends(left)
        except ConfigError:
            continue
        return steps
    return None
