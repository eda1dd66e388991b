"""Pipelines whose latents are not tokens yet, that have a multistep scheduler, or that have two transformers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jitaccel.generation.handle import MISSING, Handle, Patched, Uncopied, restore_attributes
from jitaccel.method.config import JiTConfig
from jitaccel.method.lift import LiftPlan
from jitaccel.method.pool import PooledPlan
from jitaccel.method.run import Run

from ..foreign import Forward, Pipeline, Scheduler
from ..layout import Layout
from ..loops.velocity import Calls
from ..network import ModelCall
from .asked import Spacing
from .caller import argument_of_call, calling_pipeline
from .multistep import STATE, begun_again, euler_step, full_noise, is_multistep
from .scheduler import SCHEDULE, SchedulerRoute, with_state

_GUIDED = "do_classifier_free_guidance"  # an attribute of a pipeline, or a variable of its call
_ALL_TOKENS = 1e-9  # a density within this distance of 1 leaves no token out
_LOWERED = 1e-6  # multistep schedulers lower a first level of 1 by this


class LatentsRoute(SchedulerRoute[Calls]):
    """The generations of one pipeline. Unlike in `SchedulerRoute`, the sampler moves latents and the method tokens.

    Args:
        pipeline: The pipeline whose scheduler sets the steps.
        networks: The transformers that the pipeline calls, by attribute name.
        layout: How the latents hold tokens.
        config: The configuration to run.
        codebase: Its name in statistics.
        calls: Runs the transformers.
        may_be_dense: Whether a generation that cannot be accelerated correctly may run dense, as if unpatched.
        spacings: Levels that the pipeline itself may request from its scheduler, in addition to evenly spaced ones.
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
        spacings: tuple[Spacing, ...] = (),
    ) -> None:
        first = next(iter(networks.values()))
        super().__init__(pipeline, config, codebase, calls, transformer=first, may_be_dense=may_be_dense)
        self._networks = {name: weakref.ref(network) for name, network in networks.items()}
        self._layout = layout
        self._spacings = (*spacings, *self._spacings)
        self._is_inverted = bool(pipeline.scheduler.config.get("invert_sigmas", False))  # levels rise, data is ahead
        self._is_multistep = is_multistep(pipeline.scheduler)
        is_sparse = config.densities[0] < 1.0 - _ALL_TOKENS
        self._makes_step = self._is_multistep and is_sparse and config.solver != "caller"
        self._keeps_solver = self._is_multistep and is_sparse and config.solver == "caller"
        self._activated: Tensor | None = None  # (B, N) bool, tokens activated at the current step
        self._state: Tensor | None = None  # (B, N, D), the state the network got in the current step
        self._twins: list[Scheduler] = []  # copies of the scheduler that the pipeline made in its current call

    def branches_of(self, rows: int) -> int:
        """Returns how many guidance branches a call with this many rows holds, for pipelines that batch them.

        For the generation's first call this follows from the pipeline's own guidance flag, for later ones from the
        number of images.
        """
        if self._generation is not None:
            return rows // self._generation.run.anchors.shape[0]
        said = getattr(self._pipeline(), _GUIDED, None)
        said = argument_of_call(_GUIDED) if said is None else said
        if said is None:
            said = (argument_of_call("guidance_scale") or 1.0) > 1.0
        return 2 if said else 1

    def install(self, handle: Handle) -> None:
        """Wraps `set_timesteps` and `step` of the scheduler instance; signatures stay."""
        if self._is_multistep:
            state = vars(self._scheduler)
            handle.on_remove(self._restore_multistep, {name: state.get(name, MISSING) for name in STATE})
        super().install(handle)
        handle.set_attribute(self._scheduler, "__deepcopy__", Patched(self._copied))

    def _copied(self, memo: object) -> Scheduler:
        """Returns an unpatched copy of the scheduler with the same levels, which a pipeline uses for audio.

        Raises:
            TypeError: If the copy is not made in the pipeline's own call.
        """
        if not self.is_of(calling_pipeline()):
            Uncopied().__reduce_ex__(4)
        kind: Any = type(self._scheduler)
        twin: Scheduler = kind.from_config(self._scheduler.config)
        self._share_levels(twin)
        self._twins.append(twin)
        return twin

    def _share_levels(self, twin: Scheduler) -> None:
        vars(twin).update({name: value for name, value in vars(self._scheduler).items() if name in SCHEDULE})

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
        twins = self._twins
        super()._set_timesteps(original, *args, **kwargs)
        for twin in twins:
            self._share_levels(twin)
        if self._is_multistep and self._levels is not None:
            self._levels = full_noise(self._levels)
        if self._is_inverted and self._levels is not None and self.config.schedule == "native":
            self._levels = tuple(1.0 - level for level in self._levels)

    def _write_levels(self, levels: tuple[float, ...]) -> None:
        if self._is_inverted:
            levels = tuple(1.0 - level for level in levels)
        if self._is_multistep and not self._makes_step and levels[0] == 1.0:
            levels = (1.0 - _LOWERED, *levels[1:])
        super()._write_levels(levels)

    def forward(self, call: ModelCall) -> Tensor:
        """Returns the velocity (branches * B, N, D): exact at the anchors, elsewhere zeros or lifted."""
        self._state = call.state
        return super().forward(call)

    def _sparse_step(
        self, original: Forward, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layout, tokens = self._layout, self._layout.to_tokens(sample)
        given = self._given_before(tokens)
        made: list[tuple[Any, Tensor]] = []  # the scheduler's result, and its state as tokens

        def step(velocity: Tensor, timestep: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            if self._is_multistep and not self._makes_step and not self._keeps_solver:
                # Dense: the scheduler uses its own solver, so no second one is applied.
                output = original(model_output, timestep, sample, *args, **kwargs)
            else:
                sent = -velocity if self._is_inverted else velocity
                latents = layout.to_latents(sent[:, given.shape[1] :], like=sample)
                output = self._step_of(original)(latents, timestep, sample, *args, **kwargs)
            made.append((output, _after(given, layout.to_tokens(output[0]))))
            return (made[0][1],)

        velocity = _after(torch.zeros_like(given), layout.to_tokens(model_output))
        velocity = -velocity if self._is_inverted else velocity
        tokens = _after(given, tokens)
        generation = self._generation
        before = None if generation is None else generation.run.plan
        moved = super()._sparse_step(step, velocity, timestep, tokens, *args, **kwargs)[0]
        self._activated = self._state = None
        if self._keeps_solver and generation is not None and generation.run.plan is not before:
            activated = _activated(before, generation.run, tokens)
            self._activated = None if activated is None else activated[:, given.shape[1] :]
        output, unmoved = made[0]
        if moved is unmoved:
            return output
        return with_state(output, layout.to_latents(moved[:, given.shape[1] :], like=sample))

    def _given_before(self, tokens: Tensor) -> Tensor:
        """Returns the tokens (B, K, D) of a given first frame, which the network gets before the sampler's tokens."""
        if self._state is None:
            return tokens[:, :0]
        return self._state[:, : self._state.shape[1] - tokens.shape[1]].to(tokens.dtype)

    def _step_of(self, original: Forward) -> Any:
        """Returns the function that makes the step: the scheduler's, or Euler's if the scheduler keeps history."""
        if not self._is_multistep:
            return original
        if self._keeps_solver:
            return self._own_step_of(original)
        assert self._levels is not None
        index = self._index()
        return euler_step(self._scheduler, original, index, self._levels[index + 1] - self._levels[index])

    def _own_step_of(self, original: Any) -> Any:
        """Returns the scheduler's step, made the first step for tokens that were just activated."""

        def step(latents: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._activated is None:
                return original(latents, timestep, sample, *args, **kwargs)
            width = self._layout.to_tokens(sample).shape[2]
            tokens = self._layout.to_latents(self._activated[..., None].expand(-1, -1, width), like=sample)
            with begun_again(self._scheduler, tokens):
                return original(latents, timestep, sample, *args, **kwargs)

        return step

    def reset(self) -> None:
        """Forgets the generation; its statistics stay."""
        super().reset()
        self._activated = self._state = None
        self._twins = []


def _after(given: Tensor, tokens: Tensor) -> Tensor:
    """Returns the given tokens (B, K, D) followed by `tokens` (B, N, D); `tokens` itself if none are given."""
    return torch.cat([given, tokens], dim=1) if given.shape[1] else tokens


def _activated(before: LiftPlan | PooledPlan | None, run: Run, tokens: Tensor) -> Tensor | None:
    """Returns the tokens (B, N) that were lifted before and are computed from now on; None after a pooled stage."""
    if not isinstance(before, LiftPlan):
        return None
    lifted = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    lifted.scatter_(1, before.anchors[: len(lifted)], False)
    computed = torch.zeros_like(lifted).scatter_(1, run.anchors[: len(lifted)], True)
    return lifted & computed
