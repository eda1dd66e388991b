"""Answers the calls of a cut transformer: one forward on the anchors of all images, or one forward per image."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.execution.private import uncompiled
from jitaccel.generation.route import Answer
from jitaccel.generation.stats import Cost
from jitaccel.method.config import JiTConfig
from jitaccel.method.grid import num_tokens_of
from jitaccel.method.lift import LiftPlan
from jitaccel.method.pool import PooledPlan
from jitaccel.method.run import Run

from ..cutting import Cut, Places, places_of
from ..foreign import Arguments, Forward
from ..layout import Layout
from ..network import ModelCall, cache_problem, refuse_controlnet
from ..ranks import check_divided, ranks_multiple, ranks_of
from ..split import Branches
from .blocks import compiled_blocks
from .fill import places_of_smaller, share_of, with_share
from .flops import OperationCounter, shapes_of
from .model import Config, Model, Words

if TYPE_CHECKING:
    from jitaccel.execution.compile import Compiler, CompileStats

_log = logging.getLogger(__name__)
"""The original forward of a transformer."""
_Stage = tuple[LiftPlan | PooledPlan, dict[int, list[Places]]]
"""The plan of a stage, and the places of its forwards by number of branches in one batch."""
_COMPILED_AROUND = (
    "the transformer runs uncompiled, because torch.compile was applied after the patch: use apply(compile=True), or "
    "call torch.compile(...) before apply"
)


@dataclass(frozen=True, eq=False)
class Given:
    """The contents of one call of a transformer.

    Attributes:
        config: Configuration of the transformer.
        arguments: Arguments by name.
        grid: Grid of the generated tokens.
        latents: The generated part of `hidden_states`.
        tokens: `latents` as tokens (B, N, D), for one guidance branch.
        branches: Number of guidance branches in `hidden_states`, one after the other.
        mixes: Whether guidance needs whole pictures, so that each branch must be lifted before guidance.
        further: Other outputs of the model next to the velocity (audio), once it has run.
    """

    model: Model
    layout: Layout
    config: Config
    arguments: Arguments
    grid: tuple[int, ...]
    latents: Tensor
    tokens: Tensor
    branches: int = 1
    mixes: bool = False
    further: list[Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens in the grid."""
        return num_tokens_of(self.grid)

    @property
    def fill(self) -> int:
        """Number of tokens that the model adds to those of the grid."""
        return self.model.fill(self.config, self.grid)

    def with_state(self, state: Tensor) -> dict[str, Any]:
        """Returns the arguments with the generated latents replaced by a state (B, N, D)."""
        if state is self.tokens:
            return {**self.arguments, "return_dict": False}
        hidden = self.arguments["hidden_states"]
        latents = self.layout.to_latents(state, like=self.latents).repeat(self.branches, *self._once)
        return {
            **self.arguments,
            "hidden_states": self.layout.put_generated(latents, hidden),
            "return_dict": False,
        }

    @property
    def _once(self) -> tuple[int, ...]:
        return (1,) * (self.latents.ndim - 1)

    def smaller(self, run: Run, plan: PooledPlan, state: Tensor) -> dict[str, Any]:
        """Returns the arguments for the smaller picture that a pooled stage makes of a state (B, N, D).

        Tokens given at timestep 0, and conditions next to the state, contain no noise and are simply averaged.
        """
        shown, held = run.show(state), self.model.forced(self.config, self.arguments)
        if held is not None:
            shown = torch.where(run.gather(held)[..., None], run.show_beside(state), shown)
        hidden = self.layout.smaller(
            shown.repeat(self.branches, 1, 1),
            plan.small_grid,
            self.arguments["hidden_states"],
            self.num_tokens,
            run.show_beside,
        )
        beside = {
            name: self.layout.to_latents(run.show_beside(self.layout.to_tokens(self.arguments[name])), like=hidden)
            for name in self.model.beside
        }
        levels = {
            name: self.model.timestep_like(self.arguments[name], run.shown_level)
            for name in self.model.levels
            if self.arguments.get(name) is not None
        }
        timestep = levels["timestep"]
        is_of_tokens = timestep.ndim > 1 and timestep.shape[1] == self.num_tokens
        return {
            **self.arguments,
            **self.model.resized(self.arguments, plan.small_grid),
            **beside,
            **levels,
            "hidden_states": hidden,
            "timestep": run.gather(timestep) if is_of_tokens else timestep,
            "return_dict": False,
        }

    def velocity(self, output: Tensor) -> Tensor:
        """Returns the velocity (branches * B, N, D) of a model's output."""
        tokens = self.layout.to_tokens(output)[:, : self.num_tokens]
        return tokens if self.model.sign == 1 else -tokens

    def output(self, velocity: Tensor) -> Tensor:
        """Returns the model output that corresponds to a velocity (branches * B, N, D)."""
        tokens = velocity if self.model.sign == 1 else -velocity
        return self.layout.to_latents(tokens, like=self.arguments["hidden_states"])


class CutCalls:
    """The calls of one route, which covers the transformers of a pipeline or a bare transformer.

    Args:
        model: The description of the transformers.
        modules: The transformers.
        options: How they run.

    Raises:
        UnsupportedModelError: If the adapter does not fit a transformer, or, with `strict=True`, if packed execution
            is requested.
    """

    execution = "indexed"
    attention = None

    def __init__(self, model: Model, modules: Sequence[nn.Module], options: Execution) -> None:
        refuse_controlnet(options)
        self.model = model
        self._cuts = WeakKeyDictionary({module: Cut(uncompiled(module), model.adapter) for module in modules})
        self._counters = WeakKeyDictionary({module: OperationCounter(module, model) for module in modules})
        self._stages: WeakKeyDictionary[Run, _Stage] = WeakKeyDictionary()
        self._compiler = _compiler_of(options, model)
        self._notes: tuple[str, ...] = ()
        if options.execution == "packed":
            self._note_indexed(options.strict)
        if options.compile is not None and model.uncompiled is not None:
            self._note_eager(model.uncompiled, options.strict)

    def _note_eager(self, reason: str, strict: bool) -> None:
        if strict:
            raise UnsupportedModelError(
                f"jitaccel: every stage must compile into one graph with strict=True, got {self.model.name}: {reason}; "
                f"use compile=False"
            )
        _log.warning("jitaccel: no part of %s is compiled, because %s", self.model.name, reason)
        self._notes += (f"not compiled, because {reason}",)

    def _note_indexed(self, strict: bool) -> None:
        reason = f"packed execution does not support {self.model.name}"
        if strict:
            raise UnsupportedModelError(
                f"jitaccel: execution must be covered with strict=True, got {reason}; use execution='auto'"
            )
        _log.warning("jitaccel: indexed execution, because %s", reason)
        self._notes += (f"indexed execution, because {reason}",)

    @property
    def compiled(self) -> CompileStats | None:
        """Statistics of compilation so far; None if not compiled."""
        if self._compiler is None:
            return None
        stats = self._compiler.stats
        return dataclasses.replace(stats, what="blocks") if self.model.blocks else stats

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the statistics on how the network ran."""
        return self._notes + (() if self._compiler is None else self._compiler.notes)

    def note_compiled_around(self) -> None:
        """Notes that the model runs uncompiled, and warns once."""
        if _COMPILED_AROUND not in self._notes:
            _log.warning("jitaccel: %s", _COMPILED_AROUND)
            self._notes += (_COMPILED_AROUND,)

    def install(self) -> None:
        """Installs the hooks on the transformers; they change nothing outside `evaluate`."""
        for cut in self._cuts.values():
            cut.install()

    def remove(self) -> None:
        """Removes the hooks; harmless if there are none."""
        for cut in self._cuts.values():
            cut.remove()

    def release(self) -> None:
        """Frees compiled graphs and their memory."""
        if self._compiler is not None:
            self._compiler.release()

    def given(self, module: nn.Module, arguments: Arguments, branches: int = 1, mixes: bool = False) -> Given:
        """Returns the contents of a call of a transformer.

        Args:
            module: The transformer.
            arguments: The arguments of the call, by name.
            branches: Number of guidance branches that come as images of one batch.
            mixes: Whether guidance needs whole pictures.

        Raises:
            UnsupportedModelError: If an argument cannot be accelerated.
            ValueError: If the latents cannot be divided into whole tokens.
        """
        self._cuts[module].check()
        self._refuse(module, arguments)
        config = uncompiled(module).config
        layout, grid = self.model.layout(config), self.model.grid(config, arguments)
        latents = layout.generated(arguments["hidden_states"], num_tokens_of(grid), self.model.channels(config))
        tokens = layout.to_tokens(latents[: len(latents) // branches])
        return Given(self.model, layout, config, arguments, grid, latents, tokens, branches, mixes)

    def _refuse(self, module: nn.Module, arguments: Arguments) -> None:
        found = [reason for name, reason in self.model.refused.items() if arguments.get(name) is not None]
        if (problem := cache_problem(module)) is not None:
            found.append(problem)
        if found:
            raise UnsupportedModelError(
                f"jitaccel: the call may only use features that can be accelerated correctly, got "
                f"{', '.join(sorted(found))}; remove() the handle for this call"
            )

    def call(self, module: nn.Module, original: Forward, given: Given) -> ModelCall:
        """Returns a call of a transformer in the form that every route takes."""
        model, arguments = self.model, given.arguments
        network = uncompiled(module)
        return ModelCall(
            state=given.tokens,
            text_tokens=model.num_text(arguments),
            cost=self._cost(module, given),
            grid=lambda: given.grid,
            noise_level=lambda: model.noise_level(arguments),
            mask=lambda: model.forced(given.config, arguments),
            multiple=ranks_multiple(network),
            ranks=ranks_of(network),
            branches=given.branches,
            mixes=given.mixes,
            patch=given.layout.side,
            evaluate=functools.partial(self._evaluate, module, original, given),
        )

    def check_divided(self, module: nn.Module, given: Given, config: JiTConfig) -> None:
        """Raises ConfigError, with every reason, for a call whose tokens the ranks of a transformer cannot divide."""
        hidden, text = given.arguments["hidden_states"], self.model.num_text(given.arguments)
        references = hidden.shape[1] - given.num_tokens if hidden.ndim == 3 else 0
        check_divided(
            ranks_multiple(uncompiled(module)),
            config,
            lambda: given.grid,
            given.num_tokens,
            text if self.model.divides_text else 0,
            references,
        )

    def _cost(self, module: nn.Module, given: Given) -> Cost:
        """Returns a function from numbers of tokens to the operations of one forward for one image; holds no tensor."""
        if self.model.cost is not None:
            cost, num_tokens, fill = functools.partial(self.model.cost, given.config), given.num_tokens, given.fill
            return lambda image_tokens, text_tokens: cost(
                image_tokens + share_of(fill, image_tokens, num_tokens), text_tokens
            )
        counter, shapes, num_tokens = self._counters[module], shapes_of(given.arguments), given.num_tokens
        batch = given.latents.shape[0]
        return lambda image_tokens, text_tokens: counter.count(shapes, num_tokens, image_tokens) // batch

    def _evaluate(self, module: nn.Module, original: Forward, given: Given, run: Run, state: Tensor) -> Answer:
        """Returns the network's velocity at the run's anchors of a state (B, N, D)."""
        cut = self._cuts[module]
        if isinstance(run.plan, PooledPlan):  # a smaller picture, of which only a model's fill is cut
            with cut.at(places_of_smaller(given.latents, run.plan.small_grid, given.fill, given.num_tokens)):
                output, *given.further[:] = self._forward(module, original, given.smaller(run, run.plan, state), None)
            return Answer(given.velocity(output)[:, : run.num_active])
        arguments = given.with_state(state)
        if run.is_dense:
            with cut.at(None):
                output, *given.further[:] = self._forward(module, original, arguments, None)
            return Answer(given.velocity(output))
        outputs = []
        for places, own in self._parts(run, arguments, given.branches):
            with cut.at(with_share(places, given.fill, given.num_tokens)):
                outputs.append(self._forward(module, original, cut.arguments(own, places), places))
        output, *given.further[:] = outputs[0] if len(outputs) == 1 else map(torch.cat, zip(*outputs, strict=True))
        return Answer(Branches(run, given.branches).gather(given.velocity(output)))

    def _parts(self, run: Run, arguments: dict[str, Any], branches: int) -> Iterator[tuple[Places, dict[str, Any]]]:
        """Yields places and arguments for each forward of a step: one forward, or one for each image."""
        stage = self._stages.get(run)
        if stage is None or stage[0] is not run.plan:
            stage = self._stages[run] = (run.plan, {})
        if branches not in stage[1]:
            stage[1][branches] = self._places(run, branches)
        places = stage[1][branches]
        if len(places) == 1:
            yield places[0], arguments
            return
        for image, own in enumerate(places):
            given = {name: arguments.get(name) for name in self.model.adapter.rows}
            lists = {name: arguments[name] for name in self.model.adapter.lists}
            yield (
                own,
                {
                    **arguments,
                    **{name: _row(value, image) for name, value in given.items() if value is not None},
                    **{name: [_row(each, image) for each in values] for name, values in lists.items()},
                },
            )

    def _places(self, run: Run, branches: int) -> list[Places]:
        num_tokens, anchors = num_tokens_of(run.grid), Branches(run, branches).anchors
        if run.has_shared_anchors or not self.model.adapter.has_one_table:
            return [places_of(anchors, num_tokens, are_shared=run.has_shared_anchors)]
        return [places_of(own[None], num_tokens, are_shared=True) for own in anchors]

    def _forward(
        self, module: nn.Module, original: Forward, arguments: dict[str, Any], places: Places | None
    ) -> tuple[Tensor, ...]:
        """Returns a transformer's outputs. If compilation was requested, each stage and batch size has one graph.

        If the whole forward cannot be traced, each class of block has a graph instead.
        """
        if self._compiler is None:
            return _outputs_of(original, arguments, self.model.words)
        if self.model.blocks:
            with compiled_blocks(uncompiled(module), self.model.blocks, self._compiler):
                return _outputs_of(original, arguments, self.model.words)
        count = None if places is None else (places.anchors.shape, places.shared is None)
        # Contiguous, because a captured graph writes its inputs and pipelines expand one timestep over the batch.
        arguments = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        key = (id(module), count, _signature(arguments))
        outputs: tuple[Tensor, ...] = self._compiler.run(key, _outputs_of, original, arguments, self.model.words)
        return outputs


def _row(value: Any, image: int) -> Any:
    """Returns the row of an image. If there are fewer rows than images, the last row serves the remaining images."""
    at = min(image, len(value) - 1)
    return value[at : at + 1]


def _outputs_of(original: Forward, arguments: dict[str, Any], words: Words) -> tuple[Tensor, ...]:
    output, *further = original(**words.write(arguments))
    return (words.tensor(output), *further)


def _signature(arguments: Arguments) -> Hashable:
    return repr(sorted(shapes_of(arguments).items()))


def _compiler_of(options: Execution, model: Model) -> Compiler | None:
    if options.compile is None or model.uncompiled is not None:
        return None
    from jitaccel.execution.compile import Compiler  # imported late: the compiler takes a second to import

    # A recorded CUDA graph reads the weights of the block it was recorded with, but blocks share a compiled graph.
    uncaptured = {"graphs": False} if model.blocks or not model.captures else {}
    return Compiler({**options.compile, **uncaptured}, options.strict)
