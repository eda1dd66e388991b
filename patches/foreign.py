"""Types for untyped objects of other packages: forwards and their arguments, models, pipelines, schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

Forward: TypeAlias = Callable[..., Any]
"""The forward of a foreign model, which defines its own arguments and return value."""

Arguments: TypeAlias = Mapping[str, Any]
"""The arguments of such a forward, by name."""


class Scheduler(Protocol):
    """The part of a diffusers scheduler that is used here: sigmas (steps + 1,), the final 0 included."""

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
    """A pipeline of diffusers. Its other attributes depend on the class and are looked up by name."""

    transformer: nn.Module
    scheduler: Scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def settings_of(model: nn.Module) -> Any:
    """Returns the configuration of a diffusers model, whose settings can be read as attributes or items."""
    return model.config
