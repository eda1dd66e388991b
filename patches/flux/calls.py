"""Which execution a call of a FLUX transformer gets; packed: all images of a batch, and both branches, in one forward.

A pipeline with true CFG calls the network twice a step, guided and unguided. Both see one state, so the first call runs
both branches in one forward and keeps the second's answer. What the second call will ask is known from the steps
before, or from the pipeline that calls; it is compared when it comes, and run by itself where it is another.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.attention.choice import Backend, choose_backend
from jitaccel.execution.options import Execution
from jitaccel.method.config import JiTConfig
from jitaccel.method.lift import LiftPlan
from jitaccel.method.run import Run

from ..diffusers.caller import unguided_branch
from ..network import Answer
from ..split import Split
from .indexed import run_indexed
from .kinds import kind_of
from .packed import (
    Conditions,
    Pack,
    Shown,
    compiler_of,
    make_pack,
    model_hooks,
    reasons_unpackable,
    run_stage,
)

if TYPE_CHECKING:
    from jitaccel.execution.compile import CompileStats

_log = logging.getLogger(__name__)
_ALL_TOKENS = 1e-9  # a density this near to 1 leaves no token out
_COMPILED_AROUND = (
    "the transformer runs uncompiled, since it was compiled around the patch: use apply(compile=True), or wrap it with "
    "torch.compile(...) before apply"
)
_CONDITIONS = ("encoder_hidden_states", "pooled_projections", "txt_ids")

@dataclass(frozen=True, eq=False)
class _Branch:
    """What a call asks beside the state: its tensors by name, how often each was written, and the LoRA scale."""

    tensors: Mapping[str, Tensor | None]
    versions: tuple[int | None, ...]
    lora_scale: float | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> _Branch:
        names = (*_CONDITIONS, "img_ids", "guidance")
        tensors = {name: arguments.get(name) for name in names}
        scale = (arguments.get("joint_attention_kwargs") or {}).get("scale")
        return cls(tensors, tuple(_version(tensor) for tensor in tensors.values()), scale)

    def now(self) -> _Branch:
        """Returns the same question as its tensors stand now."""
        return _Branch(self.tensors, tuple(_version(tensor) for tensor in self.tensors.values()), self.lora_scale)

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def is_same(self, other: _Branch) -> bool:
        """Whether both ask the same, told by the tensors' identity; an answer kept for one then serves the other."""
        return (
            self.has_tensors_of(other)
            and self.versions == other.versions
            and None not in self.versions
            and self.lora_scale == other.lora_scale
        )

    def has_tensors_of(self, other: _Branch) -> bool:
        """Whether both ask with the same tensors, whatever was written to them between."""
        return all(tensor is other.tensors[name] for name, tensor in self.tensors.items())


@dataclass
class _Memory:
    """What one generation's calls leave for its next ones.

    followers, next_followers: the branches that came after the first one of the step before, and of this one. What came
    in two steps in a row is foreseen in the third; of the first step a pipeline tells.
    """

    plan: LiftPlan | None = None
    reasons: tuple[str, ...] = ()
    packs: list[tuple[tuple[Tensor, ...], Pack]] = field(default_factory=list)
    state: Tensor | None = None
    state_version: int | None = None
    followers: list[_Branch] = field(default_factory=list)
    next_followers: list[_Branch] = field(default_factory=list)
    kept: list[tuple[_Branch, Tensor]] = field(default_factory=list)
    is_first_step: bool = True
    may_foresee: bool = True

    def is_branch(self, state: Tensor) -> bool:
        """Whether a call is of the step under way: its state is the very one, and was not written since."""
        if self.state is None or self.state_version is None or self.state_version != _version(state):
            return False
        return state is self.state or _is_same_view(state, self.state)


class FluxCalls:
    """Answers one route's calls, packed or indexed."""

    def __init__(self, model: Any, config: JiTConfig, options: Execution) -> None:
        self._options = options
        kind = kind_of(model)
        assert kind is not None
        self._kind = kind
        # What is dense throughout stays the model's own, bit for bit.
        pays = config.densities[0] < 1.0 - _ALL_TOKENS or options.compile is not None
        self._is_wanted = options.execution == "packed" or (options.execution == "auto" and pays)
        self._memories: WeakKeyDictionary[Run, _Memory] = WeakKeyDictionary()
        self._attention: Backend | None = None
        self._compiler = compiler_of(options)
        # In a graph the lift costs nothing; elsewhere it is the method's, and timed as such.
        self._lifter = None if self._compiler is None else config.lifter
        self._reasons: tuple[str, ...] = ()
        self._is_compiled_around = self._has_residuals = False
        if self._is_wanted and not kind.packs:
            self._is_wanted = False
            if options.execution == "packed" or options.compile is not None:
                self._fall_back((f"packed execution does not know {kind.model}",))
        elif self._is_wanted:
            self._fall_back(tuple(reasons_unpackable(model)))

    @property
    def execution(self) -> str:
        """What the last call ran on."""
        return "packed" if self._is_wanted and not self._reasons else "indexed"

    @property
    def attention(self) -> str | None:
        """The attention backend of packed execution; None before it ran, and for the model's own."""
        return self._attention.name if self._attention is not None and self.execution == "packed" else None

    @property
    def compiled(self) -> CompileStats | None:
        """What compilation did so far; None without it."""
        return None if self._compiler is None else self._compiler.stats

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the model runs indexed where packed was asked for, and why stages are not compiled."""
        notes = tuple(f"indexed execution, since {reason}" for reason in self._reasons)
        if self._has_residuals:
            notes += ("costs are of the transformer alone, without the ControlNet",)
        if self._is_compiled_around:
            notes += (_COMPILED_AROUND,)
        return notes + (() if self._compiler is None else self._compiler.notes)

    def note_compiled_around(self) -> None:
        """Notes that the model runs uncompiled, and warns once."""
        if not self._is_compiled_around:
            _log.warning("jitaccel: %s", _COMPILED_AROUND)
        self._is_compiled_around = True

    def _fall_back(self, reasons: tuple[str, ...]) -> None:
        """Notes why a model runs indexed, or that nothing hinders it; an error where the user allowed no fallback."""
        if reasons and self._options.strict:
            raise UnsupportedModelError(
                f"jitaccel: execution must be covered with strict=True, got {'; '.join(reasons)}; "
                f"use strict=False to run indexed, or execution='indexed'"
            )
        if reasons and reasons != self._reasons:
            level = logging.WARNING if self._options.execution == "packed" else logging.INFO
            _log.log(level, "jitaccel: indexed execution, since %s", "; ".join(reasons))
        self._reasons = reasons

    def release(self) -> None:
        """Lets go of compiled graphs and their memory."""
        if self._compiler is not None:
            self._compiler.release()

    def evaluate(
        self,
        module: Any,
        hook: Any,
        original: Callable[..., Any],
        arguments: dict[str, Any],
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
        memory = self._memories.setdefault(run, _Memory())
        if memory.plan is not run.plan:
            memory.plan, memory.reasons = run.plan, _reasons(module, hook, arguments)
            memory.packs.clear()
        reasons = memory.reasons + (("the call has ControlNet residuals",) if residuals else ())
        self._fall_back(reasons)
        if reasons:
            return Answer(indexed())
        branch = _Branch.of(arguments)
        answer = _kept_answer(memory, branch, state)
        if answer is not None:
            return Answer(answer)
        return self._run_branches(module, hook, arguments, split, memory, branch, run, state)

    def _run_branches(
        self,
        module: Any,
        hook: Any,
        arguments: dict[str, Any],
        split: Split,
        memory: _Memory,
        branch: _Branch,
        run: Run,
        state: Tensor,
    ) -> Answer:
        branches = [branch, *_foreseen(memory, branch, arguments, state)]
        with model_hooks(module, hook, branch.lora_scale):
            values, lifted = self._forward(module, memory, branches, split, run, state, arguments["timestep"])
        memory.kept = [*zip(branches[1:], values[1:].unbind(0), strict=True)]
        return Answer(values[0], lifted)

    def _forward(
        self,
        module: Any,
        memory: _Memory,
        branches: list[_Branch],
        split: Split,
        run: Run,
        state: Tensor,
        level: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns each branch's velocity (branches, B, M, D), of one forward, and one branch's lifted in its graph."""
        batch = state.shape[0]
        attention = self._attention = choose_backend(
            self._options.attention, state.device, state.dtype, module.config.attention_head_dim
        )
        given = Conditions(
            text=torch.cat([_expand(branch["encoder_hidden_states"], batch).flatten(0, 1) for branch in branches]),
            pooled=_rows([branch["pooled_projections"] for branch in branches], batch),
            level=_rows([level] * len(branches), batch),
            guidance=None
            if branches[0]["guidance"] is None
            else _rows([branch["guidance"] for branch in branches], batch),
        )
        pack = _pack(module, memory, branches, split, run, batch)
        shown = Shown(split.extra, split.references)
        return run_stage(
            module, pack, run.plan, state, shown, given, attention, self._lifter, run.noise_level, self._compiler
        )


def _reasons(module: Any, hook: Any, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    reasons = reasons_unpackable(module, hook)
    extra = arguments.get("joint_attention_kwargs") or {}
    reasons += [f"the call has joint_attention_kwargs[{name!r}]" for name in extra if name != "scale"]
    return tuple(reasons)


def _kept_answer(memory: _Memory, branch: _Branch, state: Tensor) -> Tensor | None:
    """Returns the answer that an earlier call of this step's state has brought along, and forgets it."""
    if not memory.is_branch(state):
        return None
    memory.next_followers.append(branch)
    for place, (kept, answer) in enumerate(memory.kept):
        if kept.is_same(branch):
            del memory.kept[place]
            return answer
    return None


def _foreseen(memory: _Memory, branch: _Branch, arguments: Mapping[str, Any], state: Tensor) -> list[_Branch]:
    """Returns the branches that will be asked for after this one, with the same state; notes where a step begins."""
    memory.may_foresee &= not memory.kept  # what was foreseen did not come, or something else came before it
    if memory.is_branch(state):
        return []
    before, seen = memory.followers, memory.next_followers
    expected = [follower for follower in seen if any(follower.has_tensors_of(other) for other in before)]
    if memory.is_first_step:
        memory.is_first_step = False
        expected = seen = _told_by_pipeline(branch, arguments)
    memory.followers, memory.next_followers, memory.kept = seen, [], []
    memory.state, memory.state_version = state, _version(state)
    if memory.state_version is None or not memory.may_foresee:
        return []
    followers = [follower.now() for follower in expected if follower.lora_scale == branch.lora_scale]
    return [follower for follower in followers if None not in follower.versions and not follower.is_same(branch)]


def _told_by_pipeline(branch: _Branch, arguments: Mapping[str, Any]) -> list[_Branch]:
    unguided = unguided_branch()
    if unguided is None or unguided["encoder_hidden_states"] is branch["encoder_hidden_states"]:
        return []
    return [_Branch.of({**arguments, **unguided})]


def _pack(
    module: Any, memory: _Memory, branches: list[_Branch], split: Split, run: Run, batch: int
) -> Pack:
    """Returns the pack of these branches' position ids, the one made before where they are the same tensors."""
    ids = tuple(_flat_ids(branch[name]) for branch in branches for name in ("txt_ids", "img_ids"))
    given = tuple(branch[name] for branch in branches for name in ("txt_ids", "img_ids"))
    for known, pack in memory.packs:
        if len(known) == len(given) and all(one is other for one, other in zip(known, given, strict=True)):
            return pack
    text_ids = [text for text in ids[::2] for _ in range(batch)]
    anchors = [None if run.is_dense else run.anchors[k] for k in range(batch)]
    image_ids = [split.ids_at(image, of_image) for image in ids[1::2] for of_image in anchors]
    pack = make_pack(module, text_ids, image_ids)
    memory.packs = [*memory.packs[-1:], (given, pack)]
    return pack


def _flat_ids(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids


def _rows(tensors: list[Tensor], batch: int) -> Tensor:
    """Returns (branches * B, ...) of one tensor for each branch, (B, ...) or one row for all images."""
    return torch.cat([_expand(tensor, batch) for tensor in tensors])


def _expand(tensor: Tensor, batch: int) -> Tensor:
    return tensor if tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])


def _is_same_view(one: Tensor, other: Tensor) -> bool:
    """Returns whether both are the same part of one tensor."""
    if one._base is None or one._base is not other._base:
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _version(tensor: Tensor | None) -> int | None:
    """Returns how often a tensor was written; None where nobody counts (inference mode). 0 stands for no tensor."""
    if tensor is None:
        return 0
    return None if tensor.is_inference() else tensor._version
