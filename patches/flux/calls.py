"""Runs the calls of a FLUX transformer packed (all images of a batch in one forward) or indexed."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.attention.choice import Backend, choose_backend
from jitaccel.execution.options import Execution
from jitaccel.generation.route import Answer
from jitaccel.method.config import JiTConfig
from jitaccel.method.lift import LiftPlan
from jitaccel.method.pool import PooledPlan
from jitaccel.method.run import Run

from ..foreign import Arguments, Forward, settings_of
from ..split import Split
from .arguments import shown_timestep
from .hooks import model_hooks
from .indexed import run_indexed
from .kinds import kind_of
from .packed import (
    Conditions,
    Pack,
    Shown,
    compiler_of,
    make_pack,
    run_stage,
)
from .unpackable import reasons_unpackable

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from jitaccel.execution.compile import CompileStats

_log = logging.getLogger(__name__)
_ALL_TOKENS = 1e-9  # a density within this distance of 1 leaves no token out
_COMPILED_AROUND = (
    "the transformer runs uncompiled, because torch.compile was applied after the patch: use apply(compile=True), or "
    "call torch.compile(...) before apply"
)


@dataclass
class _Stage:
    """Data that a generation's calls share within a stage. `packs` holds pairs of position ids and their pack."""

    plan: LiftPlan | PooledPlan | None = None
    reasons: tuple[str, ...] = ()
    packs: list[tuple[tuple[Tensor, Tensor], Pack]] = field(default_factory=list)


class FluxCalls:
    """Answers one route's calls, packed or indexed."""

    def __init__(self, model: nn.Module, config: JiTConfig, options: Execution) -> None:
        self._options = options
        kind = kind_of(model)
        assert kind is not None
        self._kind = kind
        # A configuration that is dense throughout runs the model's own forward, bit for bit.
        pays = config.densities[0] < 1.0 - _ALL_TOKENS or options.compile is not None
        self._is_wanted = options.execution == "packed" or (options.execution == "auto" and pays)
        self._stages: WeakKeyDictionary[Run, _Stage] = WeakKeyDictionary()
        self._attention: Backend | None = None
        self._compiler = compiler_of(options)
        # In a compiled graph the lift costs nothing. Otherwise the method does it, so that its time is counted there.
        self._lifter = None if self._compiler is None else config.lifter
        self._reasons: tuple[str, ...] = ()
        self._is_compiled_around = self._has_residuals = False
        if self._is_wanted and not kind.packs:
            self._is_wanted = False
            if options.execution == "packed" or options.compile is not None:
                self._fall_back((f"packed execution does not support {kind.model}",))
        elif self._is_wanted:
            self._fall_back(tuple(reasons_unpackable(model)))

    @property
    def execution(self) -> str:
        """How the last call was executed."""
        return "packed" if self._is_wanted and not self._reasons else "indexed"

    @property
    def attention(self) -> str | None:
        """The attention backend of packed execution; None before the first packed call and for the model's own."""
        return self._attention.name if self._attention is not None and self.execution == "packed" else None

    @property
    def compiled(self) -> CompileStats | None:
        """Statistics of compilation so far; None if not compiled."""
        return None if self._compiler is None else self._compiler.stats

    @property
    def notes(self) -> tuple[str, ...]:
        """Reasons why the model runs indexed although packed was requested, and why stages are not compiled."""
        notes = tuple(f"indexed execution, because {reason}" for reason in self._reasons)
        if self._has_residuals:
            notes += ("costs are those of the transformer, without the ControlNet",)
        if self._is_compiled_around:
            notes += (_COMPILED_AROUND,)
        return notes + (() if self._compiler is None else self._compiler.notes)

    def note_compiled_around(self) -> None:
        """Notes that the model runs uncompiled, and warns once."""
        if not self._is_compiled_around:
            _log.warning("jitaccel: %s", _COMPILED_AROUND)
        self._is_compiled_around = True

    def _fall_back(self, reasons: tuple[str, ...]) -> None:
        """Records why a model runs indexed (no reasons: it runs packed); raises if the user allowed no fallback."""
        if reasons and self._options.strict:
            raise UnsupportedModelError(
                f"jitaccel: execution must be covered with strict=True, got {'; '.join(reasons)}; "
                f"use strict=False to run indexed, or execution='indexed'"
            )
        if reasons and reasons != self._reasons:
            level = logging.WARNING if self._options.execution == "packed" else logging.INFO
            _log.log(level, "jitaccel: indexed execution, because %s", "; ".join(reasons))
        self._reasons = reasons

    def release(self) -> None:
        """Frees compiled graphs and their memory."""
        if self._compiler is not None:
            self._compiler.release()

    def evaluate(
        self,
        module: nn.Module,
        hook: ModelHook | None,
        original: Forward,
        arguments: Arguments,
        split: Split,
        run: Run,
        state: Tensor,
    ) -> Answer:
        """Returns the network's velocity at the run's anchors of a state (B, N, D)."""
        residuals = [name for name in self._kind.residuals if arguments.get(name) is not None]
        self._has_residuals = bool(residuals)
        indexed = functools.partial(run_indexed, self._kind, original, arguments, split, run, state)
        if not self._is_wanted:
            return Answer(indexed())
        stage = self._stages.setdefault(run, _Stage())
        if stage.plan is not run.plan:
            stage.plan, stage.reasons = run.plan, _reasons(module, hook, arguments)
            stage.packs.clear()
        reasons = stage.reasons + (("the call has ControlNet residuals",) if residuals else ())
        self._fall_back(reasons)
        if reasons:
            return Answer(indexed())
        lora_scale = (arguments.get("joint_attention_kwargs") or {}).get("scale")
        with model_hooks(module, hook, lora_scale):
            return self._packed(module, stage, arguments, split, run, state)

    def _packed(
        self, module: nn.Module, stage: _Stage, arguments: Arguments, split: Split, run: Run, state: Tensor
    ) -> Answer:
        """Returns the velocity at the anchors, from one forward for all images of the batch."""
        batch, guidance = state.shape[0], arguments.get("guidance")
        attention = self._attention = choose_backend(
            self._options.attention, state.device, state.dtype, settings_of(module).attention_head_dim
        )
        given = Conditions(
            text=_expand(arguments["encoder_hidden_states"], batch).flatten(0, 1),
            pooled=_rows(arguments["pooled_projections"], batch),
            level=_rows(shown_timestep(run, arguments["timestep"]), batch),
            guidance=None if guidance is None else _rows(guidance, batch),
        )
        pack = _pack(module, stage, arguments, split, run)
        shown = Shown(split.extra, split.references)
        values, lifted = run_stage(
            module, pack, run.plan, state, shown, given, attention, self._lifter, run.noise_level, self._compiler
        )
        return Answer(values, lifted)


def _reasons(module: nn.Module, hook: ModelHook | None, arguments: Arguments) -> tuple[str, ...]:
    reasons = reasons_unpackable(module, hook)
    extra = arguments.get("joint_attention_kwargs") or {}
    reasons += [f"the call has joint_attention_kwargs[{name!r}]" for name in extra if name != "scale"]
    return tuple(reasons)


def _pack(module: nn.Module, stage: _Stage, arguments: Arguments, split: Split, run: Run) -> Pack:
    """Returns the pack of a call's position ids; reuses an earlier pack of the same tensors."""
    given = (_flat_ids(arguments["txt_ids"]), _flat_ids(arguments["img_ids"]))
    key = (arguments["txt_ids"], arguments["img_ids"])
    for known, pack in stage.packs:
        if all(one is other for one, other in zip(known, key, strict=True)):
            return pack
    batch = run.anchors.shape[0]
    positions = run.plan.positions
    image_ids = [split.ids_at(given[1], None if run.is_dense else positions[k]) for k in range(batch)]
    pack = make_pack(module, [given[0]] * batch, image_ids)
    stage.packs = [*stage.packs[-1:], (key, pack)]  # keeps two, because the guidance branches may have different ids
    return pack


def _flat_ids(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids


def _expand(tensor: Tensor, batch: int) -> Tensor:
    return tensor if tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])


def _rows(tensor: Tensor, batch: int) -> Tensor:
    """Returns one row for each image as a new tensor, because a captured graph writes its inputs."""
    return _expand(tensor, batch).contiguous()
