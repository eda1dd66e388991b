"""Runs a pipeline with an accessible scheduler. The state is moved exactly, in `scheduler.step`.

The network returns its velocity at the anchors and zeros elsewhere. The pipeline combines the guidance branches, and
`step` lifts the guided result once. A velocity already lifted by a compiled stage is recognised and used as it is.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Mapping
from typing import Any, Generic

import torch
from torch import Tensor, nn

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.generation.handle import MISSING, Handle, restore_attributes
from jitaccel.generation.route import Answer, Generation, History
from jitaccel.generation.stats import Stats
from jitaccel.method.config import JiTConfig
from jitaccel.method.grid import num_tokens_of
from jitaccel.method.run import Run
from jitaccel.method.schedule import noise_levels
from jitaccel.method.steps import KnownLevels

from ..diffusers_private import scheduler_place
from ..foreign import Arguments, Forward, Pipeline, Scheduler
from ..loops.velocity import Calls
from ..network import ModelCall
from ..split import Branches
from .asked import USUAL, default_steps, enough_steps, refuse_custom_levels, requested_steps, with_steps
from .branches import copies_of, note_of, repeated
from .caller import argument_of_call, calling_pipeline, is_called_elsewhere
from .wrapped import wrap

_log = logging.getLogger(__name__)
SCHEDULE = ("sigmas", "timesteps", "num_inference_steps")


class SchedulerRoute(Generic[Calls]):
    """The generations of one pipeline, one at a time.

    `transformer` is the module that the pipeline calls once this is installed: its own, or a replacement. With
    `may_be_dense`, a generation that cannot be accelerated correctly runs dense, as if unpatched.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        config: JiTConfig,
        codebase: str,
        calls: Calls,
        transformer: nn.Module | None = None,
        may_be_dense: bool = False,
    ) -> None:
        self.config = config
        self.calls = calls
        self._pipeline = weakref.ref(pipeline)
        self._transformer = weakref.ref(pipeline.transformer if transformer is None else transformer)
        self._scheduler = pipeline.scheduler
        self._default_steps = default_steps(pipeline)
        self._spacings = USUAL
        self._levels: tuple[float, ...] | None = None  # the scheduler's; the pipeline may start at a later one
        self._clock: KnownLevels | None = None
        self._first = 0  # the scheduler's index of the generation's first step
        self._thread: int | None = None  # the thread that began the generation
        self._is_by_hand = False  # whether a custom loop runs the generation instead of the pipeline
        self._generation: Generation | None = None
        self._seen = -1
        self._called: Tensor | None = None  # the state (copies * B, N, D) of the first step's call
        self._copies: int | None = None  # copies of the sampler's images in a call, known from the first step on
        self._lifted: tuple[Tensor, int] | None = None  # a call's lifted velocity, and its version when returned
        self._mask: weakref.ref[Tensor] | None = None  # lives as long as the pipeline's call that made it
        self._history = History(config, codebase, calls)
        self._may_be_dense = may_be_dense
        self.is_dense = False  # whether the current generation runs dense, as if unpatched

    def install(self, handle: Handle) -> None:
        """Wraps `set_timesteps` and `step` of the scheduler instance; signatures stay."""
        schedule = {name: vars(self._scheduler).get(name, MISSING) for name in SCHEDULE}
        handle.on_remove(self._restore_progress, {**schedule, **scheduler_place(self._scheduler, MISSING)})
        for name, wrapper in (("set_timesteps", self._set_timesteps), ("step", self._step)):
            original = getattr(self._scheduler, name)
            handle.set_attribute(self._scheduler, name, wrap(original, wrapper, handle))
        pipeline = self._pipeline()
        if pipeline is not None and hasattr(pipeline, "prepare_mask_latents"):
            wrapped = wrap(pipeline.prepare_mask_latents, self._prepare_mask_latents, handle)
            handle.set_attribute(pipeline, "prepare_mask_latents", wrapped)

    def _restore_progress(self, before: Mapping[str, object]) -> None:
        """Restores the scheduler's levels and position, except within a generation that still needs them."""
        caller = calling_pipeline()
        is_needed = self._generation is not None or not self.is_of(caller)
        if is_needed and getattr(caller, "scheduler", None) is self._scheduler:
            return
        restore_attributes(vars(self._scheduler), before)

    def check_idle(self) -> None:
        """Raises RuntimeError if another thread is making a picture, which would end up half sparse."""
        if self._levels is not None and is_called_elsewhere(self._pipeline(), self._thread):
            raise RuntimeError(
                "Handle.remove: the pipeline must not be making a picture in another thread, got one in progress; wait "
                "for that thread, or call remove() in its callback_on_step_end"
            )

    def _check_thread(self, pipeline: object) -> None:
        """Raises RuntimeError if another thread is making a picture with this pipeline; that picture continues."""
        if self._levels is not None and is_called_elsewhere(pipeline, self._thread):
            raise RuntimeError(
                "jitaccel: a pipeline must make one picture at a time, got calls in two threads; take turns with "
                "a lock, or give each thread its own pipeline, which may share the weights, but neither scheduler "
                "nor tokenizers (docs/reliability.md shows how)"
            )

    def is_of(self, pipeline: object) -> bool:
        """Returns whether this route belongs to that pipeline."""
        return pipeline is not None and self._pipeline() is pipeline

    @property
    def is_orphan(self) -> bool:
        """Whether the pipeline has been garbage-collected."""
        return self._pipeline() is None

    @property
    def transformer(self) -> nn.Module:
        """The module that the pipeline calls."""
        transformer = self._transformer()
        assert transformer is not None, "only used within calls of the pipeline, which holds it"
        return transformer

    def begin_call(self) -> None:
        """Does nothing, because there is only one generation at a time."""

    @property
    def num_tokens(self) -> int | None:
        """Number of tokens in the current generation, or None."""
        return None if self._generation is None else num_tokens_of(self._generation.run.grid)

    def accepts(self, caller: object) -> bool:
        """Returns whether a call made inside `caller` (a pipeline, or None for a custom loop) belongs here."""
        return self._is_by_hand if caller is None else self.is_of(caller)

    def reset(self) -> None:
        """Forgets the generation; its statistics stay."""
        self._levels = self._clock = self._generation = self._lifted = self._called = self._copies = None
        self._is_by_hand, self._seen, self.is_dense = False, -1, False

    def leave_dense(self, error: UnsupportedModelError) -> bool:
        """Returns whether a generation that was refused at its first call runs dense, and warns if it does."""
        if not self._may_be_dense or self._generation is not None:
            return False
        self.is_dense = True
        self._history.show(None)
        steps = 0 if self._levels is None else len(self._levels) - 1
        self._history.notes += (f"the last generation ran dense, on {steps} steps of the configuration: {error}",)
        _log.warning("jitaccel: the generation runs dense: %s", error)
        return True

    def abandon(self) -> None:
        """Forgets the generation whose call failed."""
        self.reset()

    @property
    def history(self) -> History:
        """The record of the generations."""
        return self._history

    def stats(self) -> Stats:
        """Returns the statistics of the last generation."""
        return self._history.stats()

    def forward(self, call: ModelCall) -> Tensor:
        """Returns the velocity (branches * B, N, D): exact at the anchors, elsewhere zeros or lifted."""
        generation, index = self._entered(call), self._index()
        assert self._clock is not None
        step = self._clock.step(index - self._first)
        answer = generation.evaluate(step, call.state, call.evaluate, call.branches)
        self._seen, self._lifted = index, None
        self._called = call.state if self._copies is None else None
        if answer.lifted is None:
            with generation.recorder.outside(step.index):
                if call.mixes:
                    branches = answer.values.chunk(call.branches)
                    return torch.cat([generation.run.lift(step, call.state, values) for values in branches])
                return Branches(generation.run, call.branches).scatter(answer.values)
        if not answer.lifted.is_inference():  # inference tensors have no version counter
            self._lifted = answer.lifted, answer.lifted._version
        return answer.lifted

    def run_of(self, call: ModelCall) -> Run:
        """Returns the run at the current step; the first call of a generation begins it."""
        return self._entered(call).run

    def _entered(self, call: ModelCall) -> Generation:
        pipeline = self._pipeline()
        if pipeline is not None and pipeline.scheduler is not self._scheduler:
            raise RuntimeError(
                f"jitaccel: pipeline.scheduler must be the patched one, got another "
                f"{type(pipeline.scheduler).__name__} set after apply; apply again"
            )
        index = self._index()
        if self._generation is None:
            self._generation = self._begin(call, index)
        self._check_follows(call, index, self._generation.run)
        return self._generation

    def _check_follows(self, call: ModelCall, index: int, run: Run) -> None:
        clock, shape = self._clock, tuple(call.state.shape[:2])
        assert clock is not None
        expected = (run.anchors.shape[0], num_tokens_of(run.grid))
        step = index - self._first
        is_next = index in (self._seen, self._seen + 1) and step < clock.num_steps
        if not is_next or clock.step(step).stage != run.stage or shape != expected:
            raise RuntimeError(
                f"jitaccel: the transformer must be called for the scheduler's next step, with {expected[0]} images of "
                f"{expected[1]} tokens, got step {index} after step {self._seen} with {shape[0]} of {shape[1]}; "
                f"give each generation its own scheduler, and start it with set_timesteps"
            )

    def _begin(self, call: ModelCall, index: int) -> Generation:
        if self._levels is None:
            raise RuntimeError(
                "jitaccel: set_timesteps of the patched scheduler must be called before the transformer, got no call; "
                "start the generation with it, and use a scheduler that no other generation uses at the same time"
            )
        self._first, self._seen = index, index - 1
        try:
            self._clock = KnownLevels(self.config, self._levels[index:])
        except ConfigError as error:
            if self._is_by_hand:
                raise
            raise ConfigError(self._late_start(index, len(self._levels) - 1)) from error
        generation = call.begin(self.config, self._clock.step(0))
        self._history.begin(generation)
        return generation

    def _late_start(self, index: int, steps: int) -> str:
        """Returns the error message for a start at step `index` of `steps` that leaves too few steps for all stages."""
        strength = argument_of_call("strength")
        is_known = isinstance(strength, (int, float)) and 0.0 < strength <= 1.0
        share = strength if is_known else (steps - index) / steps
        enough = enough_steps(self.config, share, steps)
        how = "num_inference_steps=" if self.config.steps == "caller" else "jitaccel.apply(..., steps="
        advice = "a higher strength"
        if enough is not None:
            advice = f"use {how}{enough}{')' if how.endswith('steps=') and '(' in how else ''}, or {advice}"
        given = f" at strength {strength:g}" if is_known else ""
        return (
            f"jitaccel: a call that starts late must leave a step for every stage, got {steps - index} of {steps} steps"
            f"{given} for {self.config.num_stages} stages; {advice}"
        )

    def inpainted_tokens(self, batch: int, num_tokens: int) -> Tensor | None:
        """Returns the tokens (batch, num_tokens) under the mask that the pipeline prepared; None without a mask."""
        mask = None if self._mask is None else self._mask()  # (B, N, C) per latent
        if mask is None or mask.ndim != 3 or mask.shape[1] != num_tokens:
            return None
        return repeated((mask > 0).any(dim=2), batch // mask.shape[0])

    def _prepare_mask_latents(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """Records the mask that a pipeline's public `prepare_mask_latents` returns, alone or as first of several."""
        prepared = original(*args, **kwargs)
        mask = prepared[0] if isinstance(prepared, tuple) else prepared
        self._mask = weakref.ref(mask) if isinstance(mask, Tensor) else None
        return prepared

    def _step(
        self, original: Forward, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._levels is None or self.is_dense or not self.accepts(calling_pipeline()):
            return original(model_output, timestep, sample, *args, **kwargs)
        try:
            return self._sparse_step(original, model_output, timestep, sample, *args, **kwargs)
        except BaseException:
            self.reset()
            raise

    def _sparse_step(
        self, original: Forward, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        index, generation, clock = self._index(), self._generation, self._clock
        if generation is None or clock is None or self._seen != index:
            raise RuntimeError(
                f"jitaccel: the patched transformer must run before scheduler.step, got no call at step {index}; "
                f"it was replaced, or its forward restored (offloading does), after apply: apply again"
            )
        if self._copies is None:
            self._copies, self._called = copies_of(sample, self._called), None
            self._history.notes += note_of(self._copies)
        # From here on, all copies of an image get the same velocity, so that their tokens stay equal.
        step, rows, copies = index - self._first, sample.shape[0], self._copies
        answer = self._answer(generation.run, repeated(model_output, copies))
        velocity = generation.leave(clock.step(step), repeated(sample, copies), answer)
        output = original(velocity[:rows], timestep, sample, *args, **kwargs)
        if step + 1 == clock.num_steps:
            generation.run.check_finite()
            self.reset()
            return output
        moved = generation.enter(clock.step(step + 1), before := repeated(output[0], copies))
        return output if moved is before else with_state(output, moved[:rows])

    def _answer(self, run: Run, model_output: Tensor) -> Answer:
        """Returns the pipeline's model output: the anchors' velocity, or a velocity that a call already lifted."""
        if self._lifted is None or model_output is not self._lifted[0] or model_output._version != self._lifted[1]:
            return Answer(run.gather(model_output))
        return Answer(model_output, lifted=model_output)

    def _index(self) -> int:
        index = self._scheduler.step_index
        return int(index if index is not None else self._scheduler.begin_index or 0)

    def _set_timesteps(self, original: Forward, *args: Any, **kwargs: Any) -> Any:
        caller = calling_pipeline()
        if not (caller is None or self.is_of(caller)):
            return original(*args, **kwargs)
        if caller is not None:
            self._check_thread(caller)
        self.reset()
        if caller is not None:
            self._check_transformer(caller)
        asked: Arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        requested = requested_steps(asked)
        steps = requested if self.config.steps == "caller" else self.config.steps
        self.config.stage_ends(steps)  # raises before anything is set
        self._note_steps(requested, steps)
        own_levels = self.config.schedule != "native"
        if own_levels or steps != requested:
            refuse_custom_levels(asked, requested, self._spacings)
        if not own_levels and steps != requested:
            asked = with_steps(asked, steps, self._spacings)
        original(**asked)
        if own_levels:
            levels = noise_levels(self.config, steps)
            self._write_levels(levels)
        else:
            levels = tuple(self._scheduler.sigmas.tolist())
        self._levels, self._is_by_hand = levels, caller is None
        self._thread = threading.get_ident()

    def _check_transformer(self, pipeline: Pipeline) -> None:
        """Raises if the pipeline would run another network; a wrapper around the patched one is allowed."""
        if all(module is not self._transformer() for module in pipeline.transformer.modules()):
            raise RuntimeError(
                f"jitaccel: pipeline.transformer must be the patched one, got another "
                f"{type(pipeline.transformer).__name__} set after apply; apply again"
            )

    def _note_steps(self, requested: int, steps: int) -> None:
        self._history.notes = ()
        if requested == steps:
            return
        note = f"the configuration sets {steps} steps; the pipeline asked for {requested}"
        note = f"{note} (steps='caller' keeps the pipeline's number)"
        self._history.notes = (note,)
        _log.log(logging.INFO if requested == self._default_steps else logging.WARNING, "jitaccel: %s", note)

    def _write_levels(self, levels: tuple[float, ...]) -> None:
        scheduler = self._scheduler
        scheduler.sigmas = torch.tensor(levels, dtype=torch.float32, device=scheduler.sigmas.device)
        scale = scheduler.config.num_train_timesteps
        scheduler.timesteps = (scheduler.sigmas[:-1] * scale).to(scheduler.timesteps.device)
        scheduler.num_inference_steps = len(levels) - 1


def check_scheduler(scheduler: Scheduler, is_inverted: bool = False) -> list[str]:
    """Returns why a scheduler is not first-order Euler on flow-matching levels or their inverse; [] if it is."""
    kind = type(scheduler).__name__
    if not any(base.__name__ == "FlowMatchEulerDiscreteScheduler" for base in type(scheduler).__mro__):
        return [f"its scheduler must be a FlowMatchEulerDiscreteScheduler (first-order Euler), got {kind}"]
    return [
        f"its scheduler must have {name}={wanted}, got {not wanted}"
        for name, wanted in (("stochastic_sampling", False), ("invert_sigmas", is_inverted))
        if bool(scheduler.config.get(name, False)) != wanted
    ]


def with_state(output: Any, state: Tensor) -> Any:
    """Returns the result of a scheduler's step with its state replaced."""
    if isinstance(output, tuple):
        return (state, *output[1:])
    return type(output)(prev_sample=state)
