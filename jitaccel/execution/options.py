"""How the network runs: on which execution and attention, beside what the method computes (`JiTConfig`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError, suggestion

Mode = Literal["auto", "packed", "indexed"]
Unsupported = Literal["error", "dense"]
ControlNet = Literal["dense", "anchors"]
Attention = Literal["auto", "flash_attn_3", "flash_attn", "torch_varlen", "xformers", "sdpa"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a network runs on the anchors.

    execution: "packed" (the blocks run on one packed sequence: images of a batch with anchors of their own in one
        forward), "indexed" (the model's own forward on the anchors), or "auto": packed where the model is covered and
        something is sparse.
    attention: what packed execution attends with; "auto" takes the first that is usable.
    compile: what `torch.compile` gets for each stage's packed forward, or None to run it eagerly.
    strict: raise where a fallback would run instead of what was asked for.
    on_unsupported: what to do with a target, sampler or call that cannot be accelerated correctly: raise ("error"), or
        let it run as if untouched and log a warning ("dense").
    controlnet: whether a pipeline's ControlNet runs on every token ("dense"), or on the "anchors" alone.

    Raises ConfigError for unknown names, and for compilation of the model's own forward.
    """

    execution: Mode = "auto"
    attention: Attention = "auto"
    compile: Mapping[str, Any] | None = None
    strict: bool = False
    on_unsupported: Unsupported = "error"
    controlnet: ControlNet = "dense"

    def __post_init__(self) -> None:
        problems = [
            f"apply: {name} must be one of {', '.join(allowed)}, got {value!r}; {suggestion(value, allowed)}"
            for name, value, allowed in (
                ("execution", self.execution, get_args(Mode)),
                ("attention", self.attention, get_args(Attention)),
                ("on_unsupported", self.on_unsupported, get_args(Unsupported)),
                ("controlnet", self.controlnet, get_args(ControlNet)),
            )
            if value not in allowed
        ]
        if not isinstance(self.strict, bool):
            problems.append(f"apply: strict must be True or False, got {self.strict!r}; leave it out for False")
        elif self.strict and self.on_unsupported == "dense":
            problems.append(
                'apply: on_unsupported must be "error" with strict=True, got "dense"; leave one of them out'
            )
        if self.compile is not None and self.execution == "indexed":
            problems.append(
                'apply: execution must be "packed" or "auto" with compile, got "indexed"; '
                "compile the model yourself before apply, or leave compile out"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def may_be_dense(self) -> bool:
        """Whether what cannot be accelerated correctly may run as if untouched."""
        return self.on_unsupported == "dense"
