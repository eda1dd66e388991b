"""The parameters of a pipeline's call, and the steps and levels it requests from `set_timesteps`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jitaccel.errors import ConfigError
from jitaccel.method.checks import MAX_STEPS
from jitaccel.method.config import JiTConfig

from ..foreign import Arguments, Pipeline

Spacing = Callable[[int], Sequence[float]]
"""Maps a number of steps to the levels before a scheduler shifts them, without the final 0."""


def evenly_spaced(steps: int) -> Sequence[float]:
    """Returns the levels that most pipelines request, from 1 to 1 / steps."""
    levels: Sequence[float] = np.linspace(1.0, 1.0 / steps, steps).tolist()
    return levels


USUAL: tuple[Spacing, ...] = (evenly_spaced,)


def parameters_of(kind: type) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of the calls of a class of pipelines, by name."""
    return inspect.signature(kind.__call__).parameters


def call_parameters(pipeline: Pipeline) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a pipeline's call, by name."""
    return parameters_of(type(pipeline))


def default_steps(pipeline: Pipeline) -> object:
    """Returns the number of steps that a pipeline takes if its call does not set one."""
    parameter = call_parameters(pipeline).get("num_inference_steps")
    return None if parameter is None else parameter.default


def requested_steps(asked: Arguments) -> int:
    """Returns the number of steps that a call of `set_timesteps` requests."""
    for name in ("sigmas", "timesteps"):
        if asked.get(name) is not None:
            return len(asked[name])
    return int(asked["num_inference_steps"])


def refuse_custom_levels(asked: Arguments, requested: int, spacings: Sequence[Spacing]) -> None:
    """Raises ConfigError if the user's call sets custom levels although the configuration sets levels too.

    Args:
        asked: The arguments of `set_timesteps`.
        requested: The number of steps they request.
        spacings: Levels that the pipeline itself requests, which therefore do not come from the user.
    """
    is_custom = asked.get("sigmas") is not None and _spacing_of(asked["sigmas"], requested, spacings) is None
    if asked.get("timesteps") is not None or is_custom:
        raise ConfigError(
            "jitaccel: levels must come from one place, got sigmas in the call and in the configuration; "
            "use schedule='native', steps='caller' to keep the call's"
        )


def with_steps(asked: Arguments, steps: int, spacings: Sequence[Spacing]) -> Arguments:
    """Returns the arguments of `set_timesteps` for another number of steps, with the same spacing of levels."""
    sigmas = asked.get("sigmas")
    if sigmas is None:
        return {**asked, "num_inference_steps": steps}
    spacing = _spacing_of(sigmas, len(sigmas), spacings)
    assert spacing is not None, "other spacings were refused before"
    return {**asked, "sigmas": np.array(spacing(steps))}


def _spacing_of(sigmas: Sequence[float], steps: int, spacings: Sequence[Spacing]) -> Spacing | None:
    return next((spacing for spacing in spacings if np.allclose(sigmas, spacing(steps), atol=1e-6)), None)


def enough_steps(config: JiTConfig, share: float, more_than: int) -> int | None:
    """Returns the smallest number of steps whose last `share`, rounded as in pipelines, gives every stage a step."""
    for steps in range(more_than + 1, min(int(4 * more_than / share) + 2, MAX_STEPS)):
        left = steps - int(max(steps - min(steps * share, steps), 0))
        try:
            config.stage_ends(left)
        except ConfigError:
            continue
        return steps
    return None
