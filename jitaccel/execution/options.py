"""How the network runs: execution, attention, compilation. `JiTConfig` defines what the method computes."""

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

    Attributes:
        execution: "packed" (the blocks run on one packed sequence, so images of a batch with different anchors share a
            forward), "indexed" (the model's own forward runs on the anchors), or "auto" (packed if the model is covered
            and any stage is sparse).
        attention: Attention backend of packed execution; "auto" uses the first usable one.
        compile: Options of `torch.compile` for each stage's packed forward; None runs it eagerly.
        strict: Raise where a fallback would run instead of what was requested.
        on_unsupported: For a target, sampler or call that cannot be accelerated correctly: "error" raises, "dense" logs
            a warning and runs it as if untouched.
        controlnet: Whether a pipeline's ControlNet runs on every token ("dense") or on the "anchors" alone.

    Raises:
        ConfigError: For unknown names, and for compilation of the model's own forward.
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
        """Whether a call that cannot be accelerated correctly may run as if untouched."""
        return self.on_unsupported == "dense"
