"""Runs a bare network in a custom Euler loop: a move of the state is folded into the returned velocity.

The loop does not say which generation a call belongs to. It may make one image after another, or several in turn, one
step of each. A call continues the generation whose next state it brings. That state can be predicted from the last
velocity the loop got (`visits.LoopGeneration`), except for guidance and for edits by the loop.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

import torch
from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.generation.route import Executor, History
from jitaccel.generation.stats import Stats
from jitaccel.method.config import JiTConfig
from jitaccel.method.steps import KnownLevels, PredictedLevels, Step

from ..network import ModelCall
from .visits import LoopGeneration

Calls = TypeVar("Calls", bound=Executor)
"""The type of the object that runs a route's network."""

_log = logging.getLogger(__name__)
_MAX_IN_TURN = 64  # unfinished generations
_FORGOTTEN_AFTER = 1024  # calls of other generations; a loop that alternates between images returns much sooner
# Limit of the squared distance to an expected state, divided by the sum of both mean squares. It is about 1 between two
# images and 0 after an unguided Euler step. Guidance, and loops that noise a given picture outside a mask, lie between.
_UNRELATED = 0.8


class VelocityRoute(Generic[Calls]):
    """The generations of one network.

    Args:
        config: The configuration to run.
        levels: The noise levels of the loop, the final 0 included; None if they are to be predicted.
        codebase: Its name in statistics.
        calls: Runs the network.
        may_be_dense: Whether calls that cannot be accelerated correctly may run dense, as if unpatched.
    """

    is_dense = False  # decided for each call
    num_tokens = None  # there may be several generations

    def __init__(
        self,
        config: JiTConfig,
        levels: tuple[float, ...] | None,
        codebase: str,
        calls: Calls,
        may_be_dense: bool = False,
    ) -> None:
        self.config = config
        self.calls = calls
        self._may_be_dense = may_be_dense
        self._dense_reason: str | None = None
        if levels is None and (config.schedule == "native" or config.steps == "caller"):
            raise ConfigError(
                f"apply: noise_levels must be given for a bare transformer with schedule={config.schedule!r}, "
                f"steps={config.steps!r}, got None; pass the levels of your loop, 0 included"
            )
        if config.solver == "caller":
            raise ConfigError(
                "apply: solver must be 'euler' or 'dpmpp_2m' for a bare network, whose loop must step by Euler, got "
                "'caller'; apply to a diffusers pipeline to keep its scheduler's own solver"
            )
        self._clock = PredictedLevels(config) if levels is None else KnownLevels(config, levels)
        self._history = History(config, codebase, calls)
        self._calls = 0
        self._generations: list[LoopGeneration] = []
        self._current: LoopGeneration | None = None

    def reset(self) -> None:
        """Forgets every generation; the statistics of the last one stay."""
        self._generations.clear()
        self._current = None

    def begin_call(self) -> None:
        """Notes that a new call begins; until it is assigned to a generation, refusing it abandons none."""
        self._current = None

    def leave_dense(self, error: UnsupportedModelError) -> bool:
        """Returns whether a refused call runs dense, and warns once. Calls within a generation never do."""
        if not self._may_be_dense or any(g.step.next_level > 0.0 for g in self._generations):
            return False
        if self._dense_reason is None:
            _log.warning("jitaccel: calls run dense: %s", error)
        self._dense_reason = str(error)
        return True

    def abandon(self) -> None:
        """Forgets the generation whose call failed; other unfinished generations stay."""
        self._generations = [g for g in self._generations if g is not self._current]
        self._current = None

    def accepts(self, caller: object) -> bool:
        """Returns True: calls from anywhere are answered."""
        return True

    def inpainted_tokens(self, batch: int, num_tokens: int) -> Tensor | None:
        """Returns None: a loop's mask, if it has one, is not visible here."""
        return None

    @property
    def history(self) -> History:
        """The record of the generations."""
        return self._history

    def stats(self) -> Stats:
        """Returns the statistics of the generation that was called last; `generations` counts all that were begun."""
        self._history.notes = self._notes()
        return self._history.stats()

    def _notes(self) -> tuple[str, ...]:
        dense = () if self._dense_reason is None else (f"calls ran dense: {self._dense_reason}",)
        return (*dense, *self._level_notes())

    def _level_notes(self) -> tuple[str, ...]:
        if isinstance(self._clock, PredictedLevels):
            return ("the loop's levels are predicted from the preset's; pass them with noise_levels=",)
        steps = self._clock.num_steps
        if self.config.steps in ("caller", steps):
            return ()
        return (f"the loop's {steps} steps are followed; the configuration asks for {self.config.steps}",)

    def forward(self, call: ModelCall) -> Tensor:
        """Returns the velocity (B, N, D) that takes the loop to the state the method requires."""
        self._calls += 1
        self._current = None
        level = call.noise_level()
        generation = self._find(call, level)
        if generation is None:
            generation = self._begin(call, level)
        self._current = generation
        self._history.show(generation.generation)
        generation.last_called = self._calls
        return generation.answer(call, may_be_last=self._may_be_last(generation.step))

    def _may_be_last(self, step: Step) -> bool:
        """Returns whether the loop may end here, which is certain only if its levels are known."""
        if step.next_level == 0.0:
            return True
        return isinstance(self._clock, PredictedLevels) and step.stage + 1 == self.config.num_stages

    def _find(self, call: ModelCall, level: float) -> LoopGeneration | None:
        """Returns the generation that this call belongs to, moved to its next step if it is due; None for a new one."""
        known = [g for g in self._generations if g.seen.shape == call.state.shape and g.level >= level]
        likely = self._nearest(known, call.state, level)
        for place, kind in likely:
            generation = known[place]
            if kind == "twin" and any(other != place and what == "next" for other, what in likely):
                continue  # the loop is making the same picture again; that has its own generation
            if kind == "branch":
                return generation
            if kind == "restart":
                self._generations.remove(generation)
                return None
            if kind == "twin":
                raise ConfigError(
                    f"jitaccel: images made in turn must start from different noise, got two from the same noise, "
                    f"now at level {level:g}; run them one after the other, or together in one batch"
                )
            step = self._clock.follow(generation.step, level)
            if step is not None:
                self._current = generation  # to be abandoned if this call fails
                generation.begin_step(call, step, level)
                return generation
        return None

    @torch.no_grad()
    def _nearest(self, known: list[LoopGeneration], state: Tensor, level: float) -> list[tuple[int, str]]:
        """Returns the indices of the generations that the state may belong to, most likely first, each with its role.

        The roles are "branch" (another guidance branch of the current step), "next" (the next step), "restart" (the
        generation's first state again) and "twin" (another image that was taken for a branch of this one). Waits for
        the device once.
        """
        options: list[tuple[int, str, Tensor]] = []
        for place, generation in enumerate(known):
            if generation.is_given_up:
                # A generation that began later from the same noise has nearly the same states and takes precedence.
                if generation.may_go_to(level):
                    options.append((place, "next", 2.0 * _distance(state, generation.expected(level)) + 1e-6))
                continue
            if level == generation.level:
                options.append((place, "branch", _differs(state, generation.seen)))
                if generation.step.index > 0:
                    options.append((place, "restart", _differs(state, generation.first)))
                if generation.may_be_two:
                    options.append((place, "twin", _distance(state, generation.expected_now())))
            if generation.may_go_to(level):
                options.append((place, "next", _distance(state, generation.expected(level))))
        if not options:
            return []
        distances = torch.stack([distance for *_, distance in options]).tolist()
        likely = sorted(
            (distance, k)
            for k, distance in enumerate(distances)
            if distance < (1.0 if options[k][1] in ("branch", "restart") else _UNRELATED)
        )
        return [(options[k][0], options[k][1]) for _, k in likely]

    def _begin(self, call: ModelCall, level: float) -> LoopGeneration:
        step = self._clock.follow(None, level)
        if step is None:
            raise ConfigError(
                f"jitaccel: the loop must use the noise_levels given to apply, got level {level:g} but a generation "
                f"starts at {getattr(self._clock, 'levels', (1.0,))[0]:g}; pass the loop's own list to apply"
            )
        self._make_room()
        for before in self._generations:
            if before.is_begun_by(call.state, level):
                before.is_given_up = True
        generation = LoopGeneration(self.config, call, step, level)
        self._generations.append(generation)
        self._history.begin(generation.generation)
        return generation

    def _make_room(self) -> None:
        """Drops finished and forgotten generations. With predicted levels, keeps the last that seems finished."""
        over = [g for g in self._generations if g.step.next_level == 0.0]
        kept = over[-1:] if isinstance(self._clock, PredictedLevels) else []
        self._generations = [
            g
            for g in self._generations
            if g in kept or (g not in over and self._calls - g.last_called <= _FORGOTTEN_AFTER)
        ]
        if len(self._generations) >= _MAX_IN_TURN:
            raise ConfigError(
                f"jitaccel: at most {_MAX_IN_TURN} generations may be unfinished at once, got one more; finish some, "
                f"or call handle.reset() if they were abandoned"
            )


def _differs(state: Tensor, other: Tensor) -> Tensor:
    """Returns 0 if two states have the same values, otherwise 1."""
    return (state != other).any().float()


def _distance(state: Tensor, expected: Tensor) -> Tensor:
    """Returns the mean squared distance of two states, divided by the sum of both mean squares; about 1 if unrelated.

    A state that is not finite is matched first to a generation whose expected state is not finite either, because that
    generation can report at which step this began.
    """
    state = state.float()
    scale = state.square().mean() + expected.square().mean()
    distance = (state - expected).square().mean() / scale.clamp(min=1e-12)
    is_finite, is_expected = state.isfinite().all(), expected.isfinite().all()
    lost = torch.where(is_expected, 0.5, 0.0)
    return torch.where(is_finite, torch.where(is_expected, distance, 1.0), lost)
