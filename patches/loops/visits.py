"""One generation of a bare network in somebody's Euler loop: what it saw, what it returned, and what it still owes.

Where a stage begins, the network runs on `y + jump` and `v + jump / (next_level - level)` is returned, so that the
loop's own step lands where the state belongs, and nobody's tensor is written. Where the next level had to be
predicted, what the step really paid is known one step later, and the rest is owed to the following one.
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
    """One step as the loop made it. `level`, `seen`: what it gave, the state in a copy, since loops write in place.

    Copies keep the state's gradient, which a loop may ask for: what the next steps make of them depends on it.
    `entered`: the state that the network saw. `calls`, `returned`: how many branches, and the sum of what they got.
    """

    step: Step
    level: float
    seen: Tensor
    entered: Tensor
    calls: int = 0
    returned: Tensor | None = None

    def expected(self, level: float) -> Tensor:
        """Returns the state (B, N, D) in float32 that an Euler step of the mean branch ends in.

        level: the one that the loop goes to; where rounding makes it this step's own, the clock's takes its place.
        """
        end = self.step.next_level if level == self.level else level
        if self.returned is None:
            return self.seen.detach().float()
        return self.seen.detach().float() + (end - self.step.noise_level) * self.returned / self.calls


class LoopGeneration:
    """`call` begins it; then `begin_step` with the first call of every later step, and `answer` every call.

    `last_called`: the route's count of calls when it was last called. `is_given_up`: whether the loop has begun
    again from the same noise since.
    """

    def __init__(self, config: JiTConfig, call: ModelCall, step: Step, level: float) -> None:
        self.generation = call.begin(config, step)
        self._run = self.generation.run
        self._owed: Tensor | None = None  # what the state still lacks of its last move
        self._before: _Visit | None = None
        self._now = self._visit(call, step, level)
        self.first, self.first_level = self._now.seen.detach(), level
        self.last_called, self.is_given_up = 0, False

    @property
    def step(self) -> Step:
        """The step under way."""
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
        """Whether the last step's calls may have been two images that started from one noise, not two branches."""
        return self._before is not None and self._before.calls > 1

    def is_begun_by(self, state: Tensor, level: float) -> bool:
        """Whether a call with this state (B, N, D) at this level begins the picture again. Waits for the device."""
        return level == self.first_level and state.shape == self.first.shape and torch.equal(state, self.first)

    def may_go_to(self, level: float) -> bool:
        """Whether a step of this generation may end at `level`, as far as levels tell."""
        return level < self.level or (level == self.level and is_rounding_of(level, self.step.next_level))

    def expected(self, level: float) -> Tensor:
        """Returns the state with which the loop comes back, if it takes Euler steps and edits nothing."""
        return self._now.expected(level)

    def expected_now(self) -> Tensor:
        """Returns the state that another image, begun with this one and in the same step now, has about here."""
        assert self._before is not None
        return self._before.expected(self.level)

    def begin_step(self, call: ModelCall, step: Step, level: float) -> None:
        """Enters the next step with the state of its first call, and moves it where a stage begins."""
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
        """Returns the velocity (B, N, D) that takes the loop's state where the method wants it.

        may_be_last: whether the loop may end with this step, so that what it returns must be finite.
        """
        now = self._now
        entered = now.entered if now.calls == 0 else _with_gradient_of(now, call.state)
        answer = self.generation.evaluate(now.step, entered, call.evaluate)
        velocity = self.generation.leave(now.step, entered, answer)
        with self.generation.recorder.outside(now.step.index):
            if may_be_last:
                self._run.check_finite()
            velocity = fold_move(velocity, self._owed, now.step)
            # A copy: the loop may go on to write what it got.
            got = velocity.detach().to(torch.float32, copy=True)
            if now.calls != 1 or now.returned is None or not torch.equal(got, now.returned):
                now.calls += 1
                now.returned = got if now.returned is None else now.returned + got
            # Else the same call once more is no other branch: the loop was stopped here, and has begun again.
        return velocity

    def _visit(self, call: ModelCall, step: Step, level: float) -> _Visit:
        seen = call.state.clone()
        return _Visit(step=step, level=level, seen=seen, entered=seen)

    def _settle(self, state: Tensor, step: Step) -> None:
        """Takes stock of the step that the loop has made: the guided velocity it used, and what it paid of the move."""
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
    """Returns the state that the network sees in a further branch, whose gradient is that of the branch's `state`."""
    if not (torch.is_grad_enabled() and (state.requires_grad or visit.entered.requires_grad)):
        return visit.entered
    # What was added to the state, and what else it depends on, is the same in every branch.
    return visit.entered + (state - state.detach()) - (visit.seen - visit.seen.detach())


def _step_made(visit: _Visit, state: Tensor, rounded: float) -> float:
    """Returns the length of the unguided step from `visit` to `state` (B, N, D); `rounded`: the one its levels tell.

    Half precision rounds a level by up to a third of a short step. The step is then the least-squares fit of
    `state = seen + made * returned`, where that leaves no more than rounding, and levels may be rounded by so much.
    `rounded` stays where it explains the state too, or where neither does: the loop edited it. Waits for the device.
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
    """Whether two images of a batch have one and the same state: the branches of a batched guidance."""
    return state.shape[0] > 1 and len(set(state_seeds(state))) < state.shape[0]
