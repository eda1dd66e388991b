"""The fair comparison for a sparse schedule: the number of dense steps of equal cost, and a control that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..method.config import JiTConfig

if TYPE_CHECKING:  # imports torch, which listing the presets does not need
    from ..generation.stats import Cost

Number = TypeVar("Number", int, float)


def loop_cost(config: JiTConfig, counts: Sequence[int], cost: Callable[[int], Number], steps: int) -> Number:
    """Returns the total cost of `steps` steps for one image, with one call of the network each.

    Args:
        config: Its stages are used.
        counts: Tokens per step, for each stage.
        cost: Cost of one step by its tokens, in operations or seconds.
        steps: Number of steps of the sampler.
    """
    return sum(length * cost(count) for length, count in zip(config.stage_lengths(steps), counts, strict=True))


def schedule_flops(config: JiTConfig, num_tokens: int, text_tokens: int, cost: Cost, steps: int) -> int:
    """Returns the operations of one image over `steps` steps, one call of the network each (no true CFG)."""
    return loop_cost(config, config.token_counts(num_tokens), lambda count: cost(count, text_tokens), steps)


def equivalent_dense_steps(
    config: JiTConfig, num_tokens: int, text_tokens: int, cost: Cost, steps: int | None = None
) -> float:
    """Returns how many dense steps cost as much as `config`: 7.19 for 7x-paper on FLUX.1-dev at 1024x1024.

    Args:
        config: The configuration.
        num_tokens: N.
        text_tokens: Including padding.
        cost: Of the model, such as `functools.partial(flux_flops, transformer.config)`.
        steps: Steps of the sampler; required if the configuration leaves them to the caller.
    """
    if steps is None:
        if isinstance(config.steps, str):
            raise ValueError('equivalent_dense_steps: steps must be given if config.steps is "caller", got None')
        steps = config.steps
    sparse = schedule_flops(config, num_tokens, text_tokens, cost, steps)
    return sparse / cost(num_tokens, text_tokens)


def dense_control(config: JiTConfig, num_tokens: int, text_tokens: int, cost: Cost) -> JiTConfig:
    """Returns the control of a configuration: dense steps of the same cost, rounded, with the same kind of levels.

    Raises ValueError for a configuration with explicit levels, because a control cannot have fewer of them.
    """
    if not isinstance(config.schedule, str):
        raise ValueError(
            'dense_control: config.schedule must be "beta" or "native", got levels; list the control\'s levels yourself'
        )
    steps = max(1, round(equivalent_dense_steps(config, num_tokens, text_tokens, cost)))
    return config.replace(densities=(1.0,), boundaries=(1.0,), steps=steps)
