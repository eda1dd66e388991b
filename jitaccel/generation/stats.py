"""Statistics of a generation: tokens, operations and time of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..method.config import JiTConfig
from ..method.grid import name_of, num_tokens_of
from ..method.steps import Step
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from ..execution.compile import CompileStats

Cost = Callable[[int, int], int]
"""Operations of one forward for one image: (image tokens, text tokens) -> FLOPs."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One step. `calls`: forwards of the whole batch (2 with true CFG). `outside_s`: seconds of the method itself."""

    index: int
    stage: int
    noise_level: float
    next_level: float
    tokens: int
    calls: int
    flops: int
    network_s: float
    outside_s: float


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of the last generation.

    Attributes:
        flops: Operations for all images of the batch.
        dense_step_flops: Operations of one dense step of the batch.
        ranks: Processes that divide the tokens of each forward; all other values are totals over them.
        execution: "packed" or "indexed".
        attention: The backend of packed execution; None for the model's own.
        compiled: What compilation did since `apply`; None without it.
        anchors: For each stage that ran, (B, M) raster indices, on the device that computed.
    """

    codebase: str
    execution: str
    notes: tuple[str, ...]
    config: JiTConfig
    generations: int
    attention: str | None = None
    compiled: CompileStats | None = None
    batch: int = 0
    ranks: int = 1
    grid: tuple[int, ...] = (0, 0)
    text_tokens: int = 0
    dense_step_flops: int = 0
    steps: tuple[StepStats, ...] = ()
    anchors: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    @property
    def token_steps(self) -> int:
        """Image tokens through the network, summed over the steps, for one image and one branch."""
        return sum(step.tokens for step in self.steps)

    @property
    def rank_tokens(self) -> tuple[int, ...]:
        """Image tokens per step on one rank, the largest number if ranks differ; all tokens without ranks."""
        return tuple(-(-step.tokens // self.ranks) for step in self.steps)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def dense_steps(self) -> float:
        """The cost expressed as a number of dense steps of one branch."""
        return self.flops / self.dense_step_flops if self.dense_step_flops else 0.0

    @property
    def network_s(self) -> float:
        return sum(step.network_s for step in self.steps)

    @property
    def outside_s(self) -> float:
        return sum(step.outside_s for step in self.steps)

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """Seconds of each stage, network and method together."""
        stages = range(max((step.stage for step in self.steps), default=-1) + 1)
        return tuple(sum(s.network_s + s.outside_s for s in self.steps if s.stage == k) for k in stages)

    def shown(self, stage: int) -> str:
        """Returns how a stage showed the picture to the network: "dense", "subset", or "pooled 2" (by 2 a side)."""
        factor = self.config.pooling_of(stage)
        if factor > 1:
            return f"pooled {factor}"
        tokens = next((step.tokens for step in self.steps if step.stage == stage), 0)
        return "dense" if tokens == num_tokens_of(self.grid) else "subset"

    def _repr_html_(self) -> str:
        from ..view.notebook import stats_html

        return stats_html(self)

    def __str__(self) -> str:
        how = f"{self.execution} execution" + (f" with {self.attention}" if self.attention else "")
        times = "1 generation" if self.generations == 1 else f"{self.generations} generations"
        lines = [f"{self.codebase}, {how}, {times}"]
        if self.compiled is not None:
            c = self.compiled
            lines.append(
                f"compiled {c.what}: {c.graphs} graphs for {c.signatures} signatures, {c.calls} calls, "
                f"{c.eager_calls} eager; {c.captures} captured, {c.replays} replays, {c.dropped} dropped"
            )
        lines += [f"note: {note}" for note in self.notes]
        if not self.steps:
            return "\n".join(lines)
        lines.append(
            f"last: batch {self.batch}, grid {name_of(self.grid)}, {self.text_tokens} text tokens, "
            f"{self.flops / 1e9:.1f} GFLOP = {self.dense_steps:.2f} dense steps, "
            f"network {self.network_s:.3f} s, method {self.outside_s:.3f} s"
        )
        if self.ranks > 1:
            each = ", ".join(map(str, dict.fromkeys(self.rank_tokens)))
            lines.append(f"{self.ranks} ranks: image tokens a rank {each}, by stage")
        lines.append(" step stage     shown   level    next  tokens  calls  network_ms  method_ms")
        for s in self.steps:
            lines.append(
                f"{s.index:5d} {s.stage:5d} {self.shown(s.stage):>9} {s.noise_level:7.4f} {s.next_level:7.4f} "
                f"{s.tokens:7d} {s.calls:6d} {1000 * s.network_s:11.2f} {1000 * s.outside_s:10.2f}"
            )
        return "\n".join(lines)


@dataclass
class _Entry:
    step: Step
    tokens: int
    calls: int = 0


@dataclass
class Recorder:
    """Collects one generation's steps while it runs."""

    cost: Cost
    batch: int
    grid: tuple[int, ...]
    text_tokens: int
    device: torch.device
    ranks: int = 1
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _anchors: dict[int, Tensor] = field(default_factory=dict)
    _watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = Stopwatch(self.device)

    @contextmanager
    def network(self, step: Step, anchors: Tensor, branches: int = 1) -> Iterator[None]:
        """Counts and times one forward of the batch on its anchors (B, M), with `branches` of guidance at once."""
        entry = self._entries.setdefault(step.index, _Entry(step, anchors.shape[1]))
        self._anchors[step.stage] = anchors
        entry.calls += branches
        with self._watch.span((step.index, "network")):
            yield

    @contextmanager
    def outside(self, index: int) -> Iterator[None]:
        """Times the work of the method for a step, outside the network."""
        with self._watch.span((index, "outside")):
            yield

    def steps(self) -> tuple[StepStats, ...]:
        return tuple(self._summary(entry) for _, entry in sorted(self._entries.items()))

    def anchors(self) -> tuple[Tensor, ...]:
        return tuple(anchors for _, anchors in sorted(self._anchors.items()))

    def _summary(self, entry: _Entry) -> StepStats:
        step = entry.step
        return StepStats(
            index=step.index,
            stage=step.stage,
            noise_level=step.noise_level,
            next_level=step.next_level,
            tokens=entry.tokens,
            calls=entry.calls,
            flops=entry.calls * self.batch * self.cost(entry.tokens, self.text_tokens),
            network_s=self._watch.seconds((step.index, "network")),
            outside_s=self._watch.seconds((step.index, "outside")),
        )


def summarize(
    recorder: Recorder | None,
    *,
    codebase: str,
    execution: str,
    attention: str | None,
    compiled: CompileStats | None,
    notes: tuple[str, ...],
    config: JiTConfig,
    generations: int,
) -> Stats:
    """Returns the statistics of a recorder; without one, those of a patch that has not run yet."""
    ran = Stats(
        codebase=codebase,
        execution=execution,
        attention=attention,
        compiled=compiled,
        notes=notes,
        config=config,
        generations=generations,
    )
    if recorder is None:
        return ran
    return replace(
        ran,
        batch=recorder.batch,
        ranks=recorder.ranks,
        grid=recorder.grid,
        text_tokens=recorder.text_tokens,
        dense_step_flops=recorder.batch * recorder.cost(num_tokens_of(recorder.grid), recorder.text_tokens),
        steps=recorder.steps(),
        anchors=recorder.anchors(),
    )
