"""One generation's way through a step, written once: enter, evaluate, leave. How it reaches a sampler is a delivery.

enter      the state of the step, moved where a stage begins
evaluate   the network on the anchors of that state
leave      the velocity at every token, from the one at the anchors
deliver    differs by codebase: a sampler whose state can be set gets the moved state (`Generation.enter` after its
           step); a loop that cannot be reached gets the move folded into the velocity (`fold_move`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..method.config import JiTConfig
from ..method.run import Run
from ..method.steps import Step
from .ranks import ALONE, Ranks, begun_alike, eight_bytes
from .stats import Cost, Recorder, Stats, summarize
from .tape import Tape

if TYPE_CHECKING:
    from ..execution.compile import CompileStats


@dataclass(frozen=True, eq=False)
class Answer:
    """A network's velocity at the anchors, `values` (B, M, D), and `lifted` (B, N, D) where that came along."""

    values: Tensor
    lifted: Tensor | None = None


Network = Callable[[Run, Tensor], Answer]
"""Runs a network on a run's anchors of a state (B, N, D)."""


class Executor(Protocol):
    """What runs a codebase's network for a route, as far as statistics name it."""

    @property
    def execution(self) -> str: ...

    @property
    def attention(self) -> str | None: ...

    @property
    def compiled(self) -> CompileStats | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def release(self) -> None: ...


class Generation:
    """One generation: its run of the method, and the record of its steps.

    Args:
        config: What runs.
        grid: The token grid; N is the product of its sides.
        step: The first step.
        state: (B, N, D), the first state.
        cost: Operations of one forward by numbers of tokens.
        text_tokens: Text tokens next to those of the image.
        forced: (B, N) bool, tokens that are anchors from the first stage on, or None.
        multiple: What numbers of anchors are rounded up to.
        patch: Latents along a token's side, which pooled stages average.
        ranks: Who divides the tokens of each forward; they have begun alike when this is made.
    """

    def __init__(
        self,
        config: JiTConfig,
        grid: tuple[int, ...],
        step: Step,
        state: Tensor,
        *,
        cost: Cost,
        text_tokens: int,
        forced: Callable[[], Tensor | None] = lambda: None,
        multiple: int = 1,
        patch: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recorder = Recorder(
            cost=cost,
            batch=state.shape[0],
            grid=grid,
            text_tokens=text_tokens,
            device=state.device,
            ranks=ranks.size,
        )

        def begin() -> Run:
            return Run(config, grid, step, state, forced=forced(), multiple=multiple, patch=patch)

        def number(run: Run) -> int:
            seeds = [generator.initial_seed() for generator in run.generators]
            return eight_bytes(seeds, config, grid, step, run.num_active, text_tokens, state.dtype)

        with self.recorder.outside(step.index):
            self.run = begun_alike(ranks, state.device, begin, number)
        self.tape: Tape | None = None
        self._patch = patch

    def enter(self, step: Step, state: Tensor) -> Tensor:
        """Returns the state (B, N, D) from which `step` starts: the given one, or a moved copy where a stage begins."""
        with self.recorder.outside(step.index):
            return self.run.enter(step, state)

    def evaluate(self, step: Step, state: Tensor, network: Network, branches: int = 1) -> Answer:
        """Returns what the network says of the anchors of a state (B, N, D); one forward, counted and timed.

        Args:
            step: The step under way.
            state: The state that the network sees.
            network: What is run.
            branches: How many branches of guidance the forward holds.
        """
        with self.recorder.network(step, self.run.anchors, branches):
            return network(self.run, state)

    def leave(self, step: Step, state: Tensor, answer: Answer) -> Tensor:
        """Returns the velocity (B, N, D) that an Euler step from `state`, the one the network saw, is to take."""
        with self.recorder.outside(step.index):
            velocity = answer.lifted
            if velocity is None:
                velocity = self.run.lift(step, state, answer.values)
            corrected = self.run.remember(step, state, velocity)
        if self.tape is not None:
            self.tape.see(step, state, velocity, corrected)
        return corrected

    def record(self, image: int) -> None:
        """Keeps from now on what a report shows of one image of the batch. Raises ConfigError where it has fewer."""
        self.tape = Tape(image, self.recorder.batch, self.run.grid, self._patch)


def fold_move(velocity: Tensor, move: Tensor | None, step: Step) -> Tensor:
    """Returns the velocity whose Euler step from the unmoved state ends where `velocity`'s does from the moved one.

    METHOD.md 8: `v + move / (next_level - level)`.

    Args:
        velocity: (B, N, D), of the moved state.
        move: (B, N, D), moved minus unmoved state; None where nothing is moved.
        step: The step that the sampler takes.
    """
    if move is None:
        return velocity
    return (velocity.float() + move.float() / (step.next_level - step.noise_level)).to(velocity.dtype)


class History:
    """What the generations of one route did: how many there were, and the record of the last one.

    `notes` are the route's own remarks on it. `image`: which image of a batch to keep for a report; None keeps nothing.
    `tape`: what was kept of the last generation, None where nothing was.
    """

    def __init__(self, config: JiTConfig, codebase: str, executor: Executor) -> None:
        self._config, self._codebase, self._executor = config, codebase, executor
        self._recorder: Recorder | None = None
        self._generations = 0
        self.notes: tuple[str, ...] = ()
        self.image: int | None = None
        self.tape: Tape | None = None

    def begin(self, generation: Generation) -> None:
        """Counts a generation, which is the last one from now on."""
        self._generations += 1
        if self.image is not None:
            generation.record(self.image)
        self.show(generation)

    def record(self, image: int | None) -> None:
        """Keeps this image of each generation from the next one on; None drops what was kept."""
        self.image = image
        if image is None:
            self.tape = None

    def show(self, generation: Generation | None) -> None:
        """Makes statistics those of this generation; of None, where the last one ran dense."""
        self._recorder = None if generation is None else generation.recorder
        self.tape = None if generation is None else generation.tape

    def stats(self) -> Stats:
        """Returns what the last generation did."""
        return summarize(
            self._recorder,
            codebase=self._codebase,
            execution=self._executor.execution,
            attention=self._executor.attention,
            compiled=self._executor.compiled,
            notes=(*self.notes, *self._executor.notes),
            config=self._config,
            generations=self._generations,
        )
