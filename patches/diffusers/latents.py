"""A pipeline whose latents are no tokens yet, or whose scheduler is a multistep one, or that has two transformers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from jitaccel.generation.handle import MISSING, Handle, restore_attributes
from jitaccel.method.config import JiTConfig

from ..foreign import Forward, Pipeline
from ..layout import Layout
from ..loops.velocity import Calls
from .multistep import STATE, euler_step, full_noise, is_multistep
from .scheduler import SchedulerRoute, with_state

_ALL_TOKENS = 1e-9  # a density this near to 1 leaves no token out
_LOWERED = 1e-6  # what multistep schedulers take off a first level of 1


class LatentsRoute(SchedulerRoute[Calls]):
    """The generations of one pipeline, as `SchedulerRoute`: here the sampler moves latents, and the method tokens.

    Args:
        pipeline: Whose scheduler is followed.
        networks: The transformers that the pipeline calls, by the names of its attributes.
        layout: How the latents hold tokens.
        config: What runs.
        codebase: Its name in statistics.
        calls: What runs the transformers.
        may_be_dense: Whether a generation that cannot be accelerated correctly may run as if untouched.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        networks: Mapping[str, nn.Module],
        layout: Layout,
        config: JiTConfig,
        codebase: str,
        calls: Calls,
        may_be_dense: bool = False,
    ) -> None:
        first = next(iter(networks.values()))
        super().__init__(pipeline, config, codebase, calls, transformer=first, may_be_dense=may_be_dense)
        self._networks = {name: weakref.ref(network) for name, network in networks.items()}
        self._layout = layout
        self._is_multistep = is_multistep(pipeline.scheduler)
        self._is_sparse = config.densities[0] < 1.0 - _ALL_TOKENS

    def branches_of(self, rows: int) -> int:
        """Returns how many branches of guidance a call with this many rows holds, where they come in one batch.

        The generation's first call is told from the pipeline's own word on guidance; others follow from its images.
        """
        if self._generation is not None:
            return rows // self._generation.run.anchors.shape[0]
        return 2 if getattr(self._pipeline(), "do_classifier_free_guidance", False) else 1

    def install(self, handle: Handle) -> None:
        """Wraps `set_timesteps` and `step` of the scheduler instance; signatures stay."""
        if self._is_multistep:
            state = vars(self._scheduler)
            handle.on_remove(self._restore_multistep, {name: state.get(name, MISSING) for name in STATE})
        super().install(handle)

    def _restore_multistep(self, before: Mapping[str, object]) -> None:
        if self._generation is None:
            restore_attributes(vars(self._scheduler), before)

    def _check_transformer(self, pipeline: Pipeline) -> None:
        for name, patched in self._networks.items():
            network = getattr(pipeline, name)
            if network is None or all(module is not patched() for module in network.modules()):
                raise RuntimeError(
                    f"jitaccel: pipeline.{name} must be the patched one, got another {type(network).__name__} set "
                    f"after apply; apply again"
                )

    def _set_timesteps(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        super()._set_timesteps(original, *args, **kwargs)
        if self._is_multistep and self._levels is not None:
            self._levels = full_noise(self._levels)

    def _write_levels(self, levels: tuple[float, ...]) -> None:
        if self._is_multistep and not self._is_sparse and levels[0] == 1.0:
            levels = (1.0 - _LOWERED, *levels[1:])
        super()._write_levels(levels)

    def _sparse_step(
        self, original: Forward, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layout = self._layout
        made: list[tuple[Any, Tensor]] = []  # the scheduler's result, and its state as tokens

        def step(velocity: Tensor, timestep: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            if self._is_multistep and not self._is_sparse:  # the scheduler's own solver, and no other on top of it
                output = original(model_output, timestep, sample, *args, **kwargs)
            else:
                latents = layout.to_latents(velocity, like=sample)
                output = self._step_of(original)(latents, timestep, sample, *args, **kwargs)
            made.append((output, layout.to_tokens(output[0])))
            return (made[0][1],)

        velocity, tokens = layout.to_tokens(model_output), layout.to_tokens(sample)
        moved = super()._sparse_step(step, velocity, timestep, tokens, *args, **kwargs)[0]
        output, unmoved = made[0]
        if moved is unmoved:
            return output
        return with_state(output, layout.to_latents(moved, like=sample))

    def _step_of(self, original: Forward) -> Any:
        """Returns what makes the step: the scheduler, or Euler's step where that would keep what it must not."""
        if not self._is_multistep:
            return original
        assert self._levels is not None
        index = self._index()
        return euler_step(self._scheduler, original, index, self._levels[index + 1] - self._levels[index])
