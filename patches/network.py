"""One call of a network, in words that every codebase shares."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.generation.stats import Cost, Recorder
from jitaccel.method.run import Run

if TYPE_CHECKING:
    from jitaccel.execution.compile import CompileStats

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Answer:
    """A network's velocity at the anchors, `values` (B, M, D), and `lifted` (B, N, D) where that came along."""

    values: Tensor
    lifted: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """What a patch tells of one call of its model.

    state: (B, N, D) as the sampler gave it. evaluate: runs the model on a run's anchors of a state.
    grid, noise_level, mask: read from the arguments, and checked; all may wait for the device. mask: the tokens (B, N)
    that are painted anew where only those are, or None. multiple: what numbers of anchors are rounded up to.
    """

    state: Tensor
    text_tokens: int
    cost: Cost
    grid: Callable[[], tuple[int, ...]]
    noise_level: Callable[[], float]
    mask: Callable[[], Tensor | None] = lambda: None
    multiple: int = 1
    evaluate: Callable[[Run, Tensor], Answer]

    def recorder(self, grid: tuple[int, ...]) -> Recorder:
        """Returns an empty record of the generation that this call is the first of."""
        return Recorder(
            cost=self.cost,
            batch=self.state.shape[0],
            grid=grid,
            text_tokens=self.text_tokens,
            device=self.state.device,
        )


class Calls(Protocol):
    """Who runs a codebase's network for a route, and what statistics say of it."""

    @property
    def execution(self) -> str: ...

    @property
    def attention(self) -> str | None: ...

    @property
    def compiled(self) -> CompileStats | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def release(self) -> None: ...


class Answering(Protocol):
    """What a route must say of a call that is refused or fails."""

    def begin_call(self) -> None: ...

    def leave_dense(self, error: UnsupportedModelError) -> bool: ...

    def abandon(self) -> None: ...


def answered(route: Answering, compute: Callable[[], Any], original: Callable[[], Any]) -> Any:
    """Returns what `compute` does; a failure ends the generation whose call it is.

    A call that is refused does what `original` does, where the route leaves it dense.
    """
    route.begin_call()
    try:
        return compute()
    except BaseException as error:
        if isinstance(error, UnsupportedModelError) and route.leave_dense(error):
            return original()
        route.abandon()
        raise


def refuse_controlnet(options: Execution) -> None:
    """Raises ConfigError where a ControlNet on the anchors is asked for beside what is no pipeline with one."""
    if options.controlnet != "dense":
        raise ConfigError(
            f"apply: controlnet must be 'dense' for what is no pipeline with a ControlNet, got {options.controlnet!r}; "
            f"apply to the pipeline"
        )


class IndexedCalls:
    """Statistics of a model that always runs its own forward on the anchors.

    Raises UnsupportedModelError, or notes, that packed or compiled execution was asked for and does not know it.
    """

    execution = "indexed"
    attention = None
    compiled = None

    def __init__(self, model: str, options: Execution) -> None:
        self.notes: tuple[str, ...] = ()
        refuse_controlnet(options)
        if options.execution != "packed" and options.compile is None:
            return
        reason = f"packed execution does not know {model}"
        if options.strict:
            raise UnsupportedModelError(
                f"jitaccel: execution must be covered with strict=True, got {reason}; use strict=False to run indexed"
            )
        _log.warning("jitaccel: indexed execution, since %s", reason)
        self.notes = (f"indexed execution, since {reason}",)

    def release(self) -> None:
        """Nothing is kept."""
