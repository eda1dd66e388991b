"""What other packages leave untyped, named once: forwards and their arguments, models, pipelines, schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

Forward: TypeAlias = Callable[..., Any]
"""A forward of somebody's model: what it takes and returns is that model's own."""

Arguments: TypeAlias = Mapping[str, Any]
"""What such a forward is called with, by name."""


class Scheduler(Protocol):
    """A scheduler of diffusers, as far as it is followed: sigmas (steps + 1,), the final 0 included."""

    config: Any
    sigmas: Tensor
    timesteps: Tensor
    num_inference_steps: int

    @property
    def step_index(self) -> int | None: ...

    @property
    def begin_index(self) -> int | None: ...

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None: ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any: ...


class Pipeline(Protocol):
    """A pipeline of diffusers; what else it has depends on its class, and is asked for by name."""

    transformer: nn.Module
    scheduler: Scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def settings_of(model: nn.Module) -> Any:
    """Returns the configuration of a model of diffusers, whose settings are attributes and items."""
    return model.config
