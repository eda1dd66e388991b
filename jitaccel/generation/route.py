"""One generation's route through a step: enter, evaluate, leave. How the result reaches the sampler is the delivery.

enter      returns the state of the step, with tokens moved where a stage begins
evaluate   runs the network on the anchors of that state
leave      returns the velocity at every token, from that at the anchors
deliver    differs by codebase: a sampler whose state can be set gets the moved state (`Generation.enter` after its
           step); for a loop that cannot be reached, the move is folded into the velocity (`fold_move`)
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
    """A network's velocity at the anchors, `values` (B, M, D), and, if already computed, `lifted` (B, N, D)."""

    values: Tensor
    lifted: Tensor | None = None


Network = Callable[[Run, Tensor], Answer]
"""Runs a network on a run's anchors of a state (B, N, D)."""


class Executor(Protocol):
    """Runs a codebase's network for a route; statistics read these properties."""

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
    """One generation: its run of the method and the record of its steps.

    Args:
        config: The configuration.
        grid: The token grid; N is the product of its sides.
        step: The first step.
        state: (B, N, D), the first state.
        cost: Operations of one forward by numbers of tokens.
        text_tokens: Text tokens in addition to those of the image.
        forced: Returns (B, N) bool, tokens that are anchors from the first stage on, or None.
        multiple: Numbers of anchors are rounded up to a multiple of this.
        patch: Latents along a token's side, which pooled stages average.
        ranks: The processes that divide the tokens of each forward; the constructor makes sure they start alike.
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
        """Returns the network's answer at the anchors of a state (B, N, D); one forward, counted and timed.

        Args:
            step: The current step.
            state: The state that the network sees.
            network: The function to run.
            branches: Number of guidance branches in the forward.
        """
        with self.recorder.network(step, self.run.anchors, branches):
            return network(self.run, state)

    def leave(self, step: Step, state: Tensor, answer: Answer) -> Tensor:
        """Returns the velocity (B, N, D) for the Euler step from `state`, which is the state that the network saw."""
        with self.recorder.outside(step.index):
            velocity = answer.lifted
            if velocity is None:
                velocity = self.run.lift(step, state, answer.values)
            corrected = self.run.remember(step, state, velocity)
        if self.tape is not None:
            self.tape.see(step, state, velocity, corrected)
        return corrected

    def record(self, image: int) -> None:
        """Starts recording one image of the batch for a report. Raises ConfigError if the batch has fewer images."""
        self.tape = Tape(image, self.recorder.batch, self.run.grid, self._patch)


def fold_move(velocity: Tensor, move: Tensor | None, step: Step) -> Tensor:
    """Returns the velocity whose Euler step from the unmoved state ends where `velocity`'s does from the moved one.

    METHOD.md 8: `v + move / (next_level - level)`.

    Args:
        velocity: (B, N, D), of the moved state.
        move: (B, N, D), moved minus unmoved state; None if nothing is moved.
        step: The step that the sampler takes.
    """
    if move is None:
        return velocity
    return (velocity.float() + move.float() / (step.next_level - step.noise_level)).to(velocity.dtype)


class History:
    """The generations of one route: how many there were, and the record of the last one.

    Attributes:
        notes: Remarks of the route on it.
        image: Index of the image of a batch to record for a report; None records nothing.
        tape: The recording of the last generation; None if there is none.
    """

    def __init__(self, config: JiTConfig, codebase: str, executor: Executor) -> None:
        self._config, self._codebase, self._executor = config, codebase, executor
        self._recorder: Recorder | None = None
        self._generations = 0
        self.notes: tuple[str, ...] = ()
        self.image: int | None = None
        self.tape: Tape | None = None

    def begin(self, generation: Generation) -> None:
        """Counts a generation and makes it the last one."""
        self._generations += 1
        if self.image is not None:
            generation.record(self.image)
        self.show(generation)

    def record(self, image: int | None) -> None:
        """Records this image of each generation from the next one on; None stops and discards the recording."""
        self.image = image
        if image is None:
            self.tape = None

    def show(self, generation: Generation | None) -> None:
        """Makes `stats` report this generation; None if the last one ran dense."""
        self._recorder = None if generation is None else generation.recorder
        self.tape = None if generation is None else generation.tape

    def stats(self) -> Stats:
        """Returns the statistics of the last generation."""
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
