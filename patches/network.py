"""One call of a network, described in the same terms for every codebase."""

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
    """One call of a model, as its patch describes it.

    Attributes:
        state: (B, N, D), as the sampler gave it.
        text_tokens: Number of text tokens.
        cost: Maps numbers of tokens to the operations of one forward.
        grid: Reads the token grid from the arguments and checks it; may wait for the device.
        noise_level: Reads and checks the noise level in the same way.
        mask: Reads and checks the mask (B, N) of tokens to inpaint; returns None if there is no mask.
        multiple: The number of anchors is rounded up to a multiple of this.
        branches: Number of guidance branches in the batch; `evaluate` returns all of them, (branches * B, M, D).
        mixes: Whether the pipeline's guidance needs whole pictures, so that each branch is lifted before guidance.
        ranks: The ranks that divide the tokens of each forward.
        patch: Number of latents along a token's side.
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
        """Returns a new generation at its first step, which begins with this call."""
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
    """The methods that a network's calls need from their route."""

    def begin_call(self) -> None:
        """Notes that a call begins."""
        ...

    def forward(self, call: ModelCall) -> Tensor:
        """Returns the velocity (B, N, D) that the codebase gets for a call."""
        ...

    def leave_dense(self, error: UnsupportedModelError) -> bool:
        """Returns whether a refused call should run dense, as if the model were not patched."""
        ...

    def abandon(self) -> None:
        """Forgets the generation whose call failed."""
        ...


def answered(route: NetworkRoute, compute: Callable[[], Result], original: Callable[[], Result]) -> Result:
    """Returns the result of `compute`. If it fails, the generation of this call is abandoned.

    If the call is refused and the route allows dense calls, returns the result of `original` instead.
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
    """Returns which cache a diffusers transformer has and how to remove it; None without a cache.

    A cache would return results that belong to other tokens or to another stage.
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
    """Raises ConfigError if a sparse ControlNet is requested for a target that is not a pipeline with a ControlNet."""
    if options.controlnet != "dense":
        raise ConfigError(
            f"apply: controlnet must be 'dense' for a target that is not a pipeline with a ControlNet, got "
            f"{options.controlnet!r}; apply to the pipeline"
        )


class IndexedCalls:
    """Statistics of a model that always runs its own forward on the anchors.

    If packed or compiled execution was requested, which this model does not support, this is noted; with strict=True
    it raises UnsupportedModelError.
    """

    execution = "indexed"
    attention = None
    compiled = None

    def __init__(self, model: str, options: Execution) -> None:
        self.notes: tuple[str, ...] = ()
        refuse_controlnet(options)
        if options.execution != "packed" and options.compile is None:
            return
        reason = f"packed execution does not support {model}"
        if options.strict:
            raise UnsupportedModelError(
                f"jitaccel: execution must be covered with strict=True, got {reason}; use strict=False to run indexed"
            )
        _log.warning("jitaccel: indexed execution, because %s", reason)
        self.notes = (f"indexed execution, because {reason}",)

    def release(self) -> None:
        """Nothing is kept."""
