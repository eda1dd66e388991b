"""Runs a bare network in somebody's own Euler loop: a move of the state rides on the returned velocity.

Where a stage begins, the network runs on `y + jump` and `v + jump / (next_level - level)` is returned, so that the
loop's own step lands where the state belongs, and nobody's tensor is written. Where the next level had to be
predicted, what the step really paid is known one step later, and the rest is owed to the following one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jitaccel.clock import KnownLevels, PredictedLevels, Step
from jitaccel.config import JiTConfig
from jitaccel.errors import ConfigError
from jitaccel.run import Run, state_seeds
from jitaccel.stats import Recorder, Stats, summarize

from .call import ModelCall


class VelocityRoute:
    """The generations of one network, one at a time. `levels`: of the loop, the final 0 included, or None."""

    def __init__(self, config: JiTConfig, levels: tuple[float, ...] | None, codebase: str) -> None:
        self.config = config
        if levels is None and (config.schedule == "native" or config.steps == "caller"):
            raise ConfigError(
                f"apply: noise_levels must be given for a bare transformer with schedule={config.schedule!r}, "
                f"steps={config.steps!r}, got None; pass the levels of your loop, 0 included"
            )
        self._clock = PredictedLevels(config) if levels is None else KnownLevels(config, levels)
        self._codebase = codebase
        self._generations = 0
        self._recorder: Recorder | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets the generation; what it did stays in the statistics."""
        self._run: Run | None = None
        self._step: Step | None = None
        self._seen: Tensor | None = None  # the state as the loop gave it
        self._entered: Tensor | None = None  # the state that the network saw
        self._owed: Tensor | None = None  # what the state still lacks of its last move
        self._calls = 0
        self._first: Tensor | None = None  # the state that the generation started from
        self._level = 0.0  # of this step, as the loop rounded it

    def accepts(self, caller: Any) -> bool:
        """Returns True: whoever calls this network is answered."""
        return True

    def stats(self) -> Stats:
        """Returns what the last generation did."""
        return summarize(
            self._recorder,
            codebase=self._codebase,
            execution="indexed",
            notes=self._notes(),
            config=self.config,
            generations=self._generations,
        )

    def _notes(self) -> tuple[str, ...]:
        if isinstance(self._clock, PredictedLevels):
            return ("the loop's levels are predicted from the preset's; noise_levels= gives them",)
        steps = self._clock.num_steps
        if self.config.steps in ("caller", steps):
            return ()
        return (f"the loop's {steps} steps are followed; the configuration asks for {self.config.steps}",)

    def forward(self, call: ModelCall) -> Tensor:
        """Returns the velocity (B, N, D) that takes the loop's state where the method wants it."""
        if not self._is_same_step(call):
            self._begin_step(call)
        run, step, recorder = self._run, self._step, self._recorder
        assert run is not None and step is not None and recorder is not None and self._entered is not None
        with recorder.network(step, run.anchors):
            values = call.evaluate(run, self._entered)
        self._calls += 1
        with recorder.outside(step.index):
            velocity = run.leave(step, self._entered, values)
            if step.next_level == 0.0 or self._may_be_last(step):
                run.check_finite()
            if self._owed is None:
                return velocity
            return (velocity.float() + self._owed / (step.next_level - step.noise_level)).to(velocity.dtype)

    def _may_be_last(self, step: Step) -> bool:
        """Whether the loop may end here: told only where its levels are known."""
        return isinstance(self._clock, PredictedLevels) and step.stage + 1 == self.config.num_stages

    def _is_same_step(self, call: ModelCall) -> bool:
        """Whether this is another branch (classifier-free guidance) of the step that is under way."""
        seen = self._seen
        if seen is None or seen.shape != call.state.shape or not torch.equal(seen, call.state):
            return False
        return call.noise_level() == self._level

    def _begin_step(self, call: ModelCall) -> None:
        level = call.noise_level()
        step = None if self._is_new_generation(call, level) else self._clock.follow(self._step, level)
        if step is None:
            self._begin_generation(call, level)
            return
        assert self._run is not None and self._recorder is not None
        with self._recorder.outside(step.index):
            self._settle(call.state, step)
            state = call.state if self._owed is None else (call.state.float() + self._owed).to(call.state.dtype)
            entered = self._run.enter(step, state)
            if entered is not state:
                self._owed = entered.float() - call.state.float()
        self._note(call, step, level)
        if entered is not call.state:
            self._entered = entered

    def _begin_generation(self, call: ModelCall, level: float) -> None:
        self.reset()
        step = self._clock.follow(None, level)
        if step is None:
            raise ConfigError(
                f"jitaccel: the loop must use the noise_levels given to apply, got level {level:g} where a generation "
                f"starts at {getattr(self._clock, 'levels', (1.0,))[0]:g}; pass the loop's own list to apply"
            )
        grid = call.grid()
        self._recorder = call.recorder(grid)
        self._generations += 1
        with self._recorder.outside(step.index):
            self._run = Run(self.config, grid, step, call.state)
        self._note(call, step, level)
        self._first = self._seen

    def _note(self, call: ModelCall, step: Step, level: float) -> None:
        """Notes what a step starts from, in a copy: the loop may write its state in place."""
        self._step, self._level, self._calls = step, level, 0
        self._seen = self._entered = call.state.clone()

    def _is_new_generation(self, call: ModelCall, level: float) -> bool:
        seen, first = self._seen, self._first
        if seen is None or first is None or seen.shape != call.state.shape:
            return True
        if level != self._level:
            return level > self._level
        # bfloat16 rounds the first levels of a long schedule to one. A new generation starts from the same noise
        # again, or from noise that is far from any state of the last one.
        return torch.equal(call.state, first) or bool((call.state.float() - seen.float()).square().mean() > 0.5)

    def _settle(self, state: Tensor, step: Step) -> None:
        """Takes stock of the step that the loop has made: the guided velocity it used, and what it paid of the move."""
        last, run = self._step, self._run
        assert last is not None and run is not None and self._seen is not None and self._entered is not None
        made, predicted = step.noise_level - last.noise_level, last.next_level - last.noise_level
        if last.may_end_stage and made and (self._calls > 1 or _has_twins(self._seen)):
            velocity = (state.float() - self._seen.float()) / made
            if self._owed is not None:
                velocity = velocity - self._owed / predicted
            run.remember(last, self._entered, velocity.to(state.dtype))
        if self._owed is not None:
            rest = 1.0 - made / predicted
            self._owed = None if abs(rest) < 1e-6 else self._owed * rest


def _has_twins(state: Tensor) -> bool:
    """Whether two images of a batch have one and the same state: the branches of a batched guidance."""
    return state.shape[0] > 1 and len(set(state_seeds(state))) < state.shape[0]
