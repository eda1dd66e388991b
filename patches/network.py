"""One call of a network, in words that every codebase shares."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.execution.private import uncompiled
from jitaccel.generation.ranks import ALONE, Ranks
from jitaccel.generation.route import Generation, Network
from jitaccel.generation.stats import Cost
from jitaccel.method.config import JiTConfig
from jitaccel.method.steps import Step

from .diffusers_private import caches_in

_log = logging.getLogger(__name__)


Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """What a patch tells of one call of its model.

    Attributes:
        state: (B, N, D), as the sampler gave it.
        text_tokens: Number of text tokens.
        cost: Operations of one forward by numbers of tokens.
        grid: Reads the token grid from the arguments and checks it; may wait for the device.
        noise_level: The same for the noise level.
        mask: The same for the tokens (B, N) to inpaint; returns None if there is no mask.
        multiple: Numbers of anchors are rounded up to a multiple of it.
        branches: Number of guidance branches in the batch; `evaluate` returns all of them, (branches * B, M, D).
        mixes: Whether the pipeline's guidance weighs whole pictures, so that each branch is lifted before it.
        ranks: Who divides the tokens of each forward.
        patch: Latents along a token's side.
        evaluate: Runs the model on the anchors of a state.
    """

    state: Tensor
    text_tokens: int
    cost: Cost
    grid: Callable[[], tuple[int, ...]]
    noise_level: Callable[[], float]
    mask: Callable[[], Tensor | None] = lambda: None
    multiple: int = 1
    branches: int = 1
    mixes: bool = False
    ranks: Ranks = ALONE
    patch: int
    evaluate: Network

    def begin(self, config: JiTConfig, step: Step) -> Generation:
        """Returns the generation that this call is the first of, at its first step."""
        return Generation(
            config,
            self.grid(),
            step,
            self.state,
            cost=self.cost,
            text_tokens=self.text_tokens,
            forced=self.mask,
            multiple=self.multiple,
            patch=self.patch,
            ranks=self.ranks,
        )


class NetworkRoute(Protocol):
    """What the calls of a network need of their route."""

    def begin_call(self) -> None:
        """Notes that a call begins."""
        ...

    def forward(self, call: ModelCall) -> Tensor:
        """Returns the velocity (B, N, D) that the codebase is given for a call."""
        ...

    def leave_dense(self, error: UnsupportedModelError) -> bool:
        """Returns whether a refused call runs as if untouched."""
        ...

    def abandon(self) -> None:
        """Forgets the generation whose call failed."""
        ...


def answered(route: NetworkRoute, compute: Callable[[], Result], original: Callable[[], Result]) -> Result:
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


def cache_problem(transformer: Any) -> str | None:
    """Returns which cache a transformer of diffusers has, and how to remove it; None without one.

    A cache answers with what it kept of other tokens, or of another stage.
    """
    if getattr(transformer, "is_cache_enabled", False):
        return "a cache enabled on the transformer (transformer.disable_cache() removes it)"
    if names := caches_in(uncompiled(transformer)):
        found = ", ".join(repr(name) for name in names)
        return (
            f"cache hooks {found} in the transformer (diffusers.hooks.HookRegistry.check_if_exists_or_initialize("
            f"transformer).remove_hook(name) removes each)"
        )
    return None


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
