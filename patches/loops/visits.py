"""One generation of a bare network in a custom Euler loop.

At the start of a stage, the network runs on `y + jump` and `v + jump / (next_level - level)` is returned. The loop's
own step then ends at the right state, and no foreign tensor is written. If the next level had to be predicted, the part
of the jump that the step really made is known one step later; the rest is added to the following step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jitaccel.generation.route import fold_move
from jitaccel.method.config import JiTConfig
from jitaccel.method.run import state_seeds
from jitaccel.method.steps import Step, is_rounding_of

from ..network import ModelCall


@dataclass
class _Visit:
    """One step of the loop.

    Attributes:
        step: The step of the method.
        level: The noise level the loop gave.
        seen: The state the loop gave, copied because loops write in place. The copy keeps the gradient, because a loop
            may differentiate through its steps.
        entered: The state that the network saw.
        calls: Number of guidance branches.
        returned: Sum of the velocities returned to the branches; None before the first.
    """

    step: Step
    level: float
    seen: Tensor
    entered: Tensor
    calls: int = 0
    returned: Tensor | None = None

    def expected(self, level: float) -> Tensor:
        """Returns the state (B, N, D), float32, after an Euler step along the mean velocity of the branches.

        Args:
            level: The level to which the loop steps. If rounding makes it equal to the current one, the clock's next
                level is used instead.
        """
        end = self.step.next_level if level == self.level else level
        if self.returned is None:
            return self.seen.detach().float()
        return self.seen.detach().float() + (end - self.step.noise_level) * self.returned / self.calls


class LoopGeneration:
    """What one generation saw, what it returned, and what part of its last move is still missing.

    The constructor takes the first call. Call `begin_step` with the first call of every later step, and `answer` with
    every call.

    Attributes:
        last_called: The route's count of calls when this generation was last called.
        is_given_up: Whether the loop has since started again from the same noise.
    """

    def __init__(self, config: JiTConfig, call: ModelCall, step: Step, level: float) -> None:
        self.generation = call.begin(config, step)
        self._run = self.generation.run
        self._owed: Tensor | None = None  # the part of the last move that the state does not have yet
        self._before: _Visit | None = None
        self._now = self._visit(call, step, level)
        self.first, self.first_level = self._now.seen.detach(), level
        self.last_called, self.is_given_up = 0, False

    @property
    def step(self) -> Step:
        """The current step."""
        return self._now.step

    @property
    def level(self) -> float:
        """Its noise level, as the loop rounded it."""
        return self._now.level

    @property
    def seen(self) -> Tensor:
        """Its state, as the loop gave it."""
        return self._now.seen

    @property
    def may_be_two(self) -> bool:
        """Whether the last step's calls may have been two images from the same noise instead of two branches."""
        return self._before is not None and self._before.calls > 1

    def is_begun_by(self, state: Tensor, level: float) -> bool:
        """Returns whether this state (B, N, D) and level start the same picture again. Waits for the device."""
        return level == self.first_level and state.shape == self.first.shape and torch.equal(state, self.first)

    def may_go_to(self, level: float) -> bool:
        """Returns whether the current step may end at `level`, judged by levels alone."""
        return level < self.level or (level == self.level and is_rounding_of(level, self.step.next_level))

    def expected(self, level: float) -> Tensor:
        """Returns the state that the loop will bring next if it takes an Euler step and edits nothing."""
        return self._now.expected(level)

    def expected_now(self) -> Tensor:
        """Returns the approximate current state of another image that started with this one and is in the same step."""
        assert self._before is not None
        return self._before.expected(self.level)

    def begin_step(self, call: ModelCall, step: Step, level: float) -> None:
        """Enters the next step with the state of its first call, and moves that state if a stage begins."""
        with self.generation.recorder.outside(step.index):
            self._settle(call.state, step)
            state = call.state if self._owed is None else (call.state.float() + self._owed).to(call.state.dtype)
        entered = self.generation.enter(step, state)
        if entered is not state:
            self._owed = entered.float() - call.state.float()
        self._before, self._now = self._now, self._visit(call, step, level)
        if entered is not call.state:
            self._now.entered = entered

    def answer(self, call: ModelCall, may_be_last: bool) -> Tensor:
        """Returns the velocity (B, N, D) that takes the loop's state to the one the method requires.

        Args:
            call: A call of the current step.
            may_be_last: Whether the loop may end with this step, in which case the result must be finite.
        """
        now = self._now
        entered = now.entered if now.calls == 0 else _with_gradient_of(now, call.state)
        answer = self.generation.evaluate(now.step, entered, call.evaluate)
        velocity = self.generation.leave(now.step, entered, answer)
        with self.generation.recorder.outside(now.step.index):
            if may_be_last:
                self._run.check_finite()
            velocity = fold_move(velocity, self._owed, now.step)
            # A copy, because the loop may write the tensor it got.
            got = velocity.detach().to(torch.float32, copy=True)
            if now.calls != 1 or now.returned is None or not torch.equal(got, now.returned):
                now.calls += 1
                now.returned = got if now.returned is None else now.returned + got
            # Otherwise the call is a repetition, not another branch: the loop was stopped here and started again.
        return velocity

    def _visit(self, call: ModelCall, step: Step, level: float) -> _Visit:
        seen = call.state.clone()
        return _Visit(step=step, level=level, seen=seen, entered=seen)

    def _settle(self, state: Tensor, step: Step) -> None:
        """Derives from the step that the loop made the guided velocity it used and how much of the move it made."""
        last = self._now.step
        rounded, predicted = step.noise_level - last.noise_level, last.next_level - last.noise_level
        is_kept = last.may_end_stage or self._run.needs_every_step
        needed = is_kept or self._owed is not None
        is_guided = needed and (self._now.calls > 1 or _has_twins(self.seen))
        if is_kept and rounded and is_guided:
            velocity = (state.float() - self.seen.float()) / rounded
            if self._owed is not None:
                velocity = velocity - self._owed / predicted
            entered = self._now.entered
            velocity = self._run.before_solver(last, entered, velocity.to(state.dtype))
            self._run.remember(last, entered, velocity)
        if self._owed is not None:
            made = rounded if is_guided else _step_made(self._now, state, rounded)
            rest = 1.0 - made / predicted
            self._owed = None if abs(rest) < 1e-6 else self._owed * rest


def _with_gradient_of(visit: _Visit, state: Tensor) -> Tensor:
    """Returns the state that the network sees in a further branch, with the gradient of that branch's `state`."""
    if not (torch.is_grad_enabled() and (state.requires_grad or visit.entered.requires_grad)):
        return visit.entered
    # The move added to the state, and everything else it depends on, is the same in every branch.
    return visit.entered + (state - state.detach()) - (visit.seen - visit.seen.detach())


def _step_made(visit: _Visit, state: Tensor, rounded: float) -> float:
    """Returns the length of the unguided step from `visit` to `state` (B, N, D). Waits for the device.

    Half precision rounds a level by up to a third of a short step. The length is then the least-squares fit of
    `state = seen + made * returned`, if its residual is within rounding and its distance from `rounded` could be a
    rounding error of the levels. `rounded` is used if it explains the state too, or if neither does because the loop
    edited the state.

    Args:
        visit: The step that the loop made.
        state: The state after that step.
        rounded: The length according to the levels.
    """
    if visit.returned is None or state.dtype not in (torch.bfloat16, torch.float16):
        return rounded
    norm, eps = torch.linalg.vector_norm, torch.finfo(state.dtype).eps
    state = state.detach().float()
    moved, bound = state - visit.seen.detach().float(), 0.5 * eps * norm(state)
    fitted = float((moved * visit.returned).sum() / visit.returned.square().sum())
    lengths = (rounded, fitted) if abs(fitted - rounded) <= 2.0 * eps * visit.level else (rounded,)
    return next((made for made in lengths if norm(moved - made * visit.returned) <= bound), rounded)


def _has_twins(state: Tensor) -> bool:
    """Returns whether two images of a batch have the same state, because they are branches of batched guidance."""
    return state.shape[0] > 1 and len(set(state_seeds(state))) < state.shape[0]
