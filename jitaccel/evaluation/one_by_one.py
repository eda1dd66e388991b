"""Runs a pipeline with a cache installed, image by image, and restores the pipeline."""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..execution.private import children_of
from .comparison import TimedCall, timed
from .work import counted

_PER_IMAGE = (
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "pooled_prompt_embeds",
    "negative_prompt_embeds", "negative_pooled_prompt_embeds", "generator", "latents",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CachedRun(ABC):
    """`steps` steps on the pipeline's own levels while `installed` is active in the pipeline."""

    steps: int

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish two methods, as JSON values."""

    @abstractmethod
    def installed(self, pipe: Any) -> AbstractContextManager[None]:
        """Returns a context in which the pipeline has the cache, initially empty."""

    def __call__(self, pipe: Any, on_step: Callable[[], object] | None, call: Mapping[str, Any]) -> TimedCall:
        """Returns what `pipe(**call)` makes; `on_step` is called `steps` times, whatever the number of images.

        Seconds are totals for the images one after another; compare them with methods that make one image at a time.
        """
        calls = _single_calls(call)
        steps_of_batch = _every(len(calls), on_step)
        return _together([self._one(pipe, steps_of_batch, each) for each in calls])

    def _one(self, pipe: Any, on_step: Callable[[], object], call: Mapping[str, Any]) -> TimedCall:
        with left_as_found(pipe.transformer), counted(pipe.transformer) as work, self.installed(pipe):
            made = timed(pipe, self.steps, None, on_step, **call)
        ran = work.flops / made.flops  # `timed` counts every step as a dense one
        return dataclasses.replace(made, flops=work.flops, token_steps=round(made.token_steps * ran))


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restores, on exit, the attributes of a model's modules and the order of its children.

    diffusers' `disable_cache` leaves a `forward` and a registry on every instance that had a hook. cache-dit leaves its
    own `forward` on the transformer, and moves the blocks to the end of its children.
    """
    before = [(module, dict(vars(module)), dict(children_of(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            children_of(module).clear()
            children_of(module).update(children)


def _single_calls(call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one call per image for a call that makes several."""
    given = {name: call[name] for name in _PER_IMAGE if call.get(name) is not None}
    several = {name: value for name, value in given.items() if not isinstance(value, str) and hasattr(value, "__len__")}
    count = max((len(value) for value in several.values()), default=1)
    return [{**call, **{name: value[k : k + 1] for name, value in several.items()}} for k in range(count)]


def _every(count: int, on_step: Callable[[], object] | None) -> Callable[[], None]:
    """Returns a function that calls `on_step` at every `count`-th of its calls."""
    calls = itertools.count(1)

    def step() -> None:
        if next(calls) % count == 0 and on_step is not None:
            on_step()

    return step


def _together(made: Sequence[TimedCall]) -> TimedCall:
    import numpy as np
    import torch

    pictures = [each.pictures for each in made]
    if isinstance(pictures[0], list):
        joined: Any = [*itertools.chain.from_iterable(pictures)]
    else:
        joined = np.concatenate(pictures) if isinstance(pictures[0], np.ndarray) else torch.cat(pictures)
    return TimedCall(
        pictures=joined,
        denoise_s=sum(each.denoise_s for each in made),
        whole_s=sum(each.whole_s for each in made),
        flops=sum(each.flops for each in made),
        token_steps=round(sum(each.token_steps for each in made) / len(made)),
        stats=None,
    )
