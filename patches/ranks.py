"""Context parallelism of diffusers: requirements for dividing tokens among ranks, checked before any rank waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitaccel.errors import ConfigError
from jitaccel.generation.ranks import ALONE, Ranks
from jitaccel.method.config import JiTConfig

from .diffusers_private import context_parallelism, divided_group, is_divided_around, is_parallel

DIVIDED = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
)
"""Transformers whose tokens ranks may divide. The others have no parallel plan in diffusers or were not tested."""
_LATE = (
    "jitaccel: apply must be called after enable_parallelism, got a transformer whose tokens are divided among ranks "
    "before the patch sees them; call jitaccel.apply again now"
)


def ranks_of(model: Any) -> Ranks:
    """Returns the ranks that divide the tokens of a diffusers model."""
    settings = context_parallelism(model)
    if settings is None:
        return ALONE
    group, size = divided_group(settings)
    return Ranks(size, group)


def ranks_multiple(model: Any) -> int:
    """Returns the number of which token counts must be a multiple, so that a model's ranks can divide them."""
    settings = context_parallelism(model)
    return 1 if settings is None or _takes_anything(settings) else ranks_of(model).size


def rank_problems(model: Any, *, is_known: bool) -> list[str]:
    """Returns why a model's ranks cannot run it; empty if they can. `is_known` says whether its class was tested."""
    if not is_parallel(model):
        return []
    settings = context_parallelism(model)
    if settings is None:
        return ["transformer must not be split over devices (tensor parallel), got a parallel configuration"]
    if not is_known:
        return [
            f"transformer must not be split over devices (context parallel), got a parallel configuration; it is "
            f"tested for {', '.join(DIVIDED)}"
        ]
    heads, degree = model.config.num_attention_heads, settings.ulysses_degree
    if heads % degree == 0 or _takes_anything(settings):
        return []
    return [
        f"transformer must have heads that ulysses_degree divides, got {heads} heads and {degree} ranks; use "
        f"ulysses_anything=True, or ring_degree"
    ]


def check_order(model: Any, hook: Any) -> None:
    """Raises ConfigError if tokens are divided outside our hook on a model; on every rank, before any rank waits."""
    if is_divided_around(model, hook):
        raise ConfigError(_LATE)


def check_still(model: Any, *, was_parallel: bool) -> None:
    """Raises like `check_order` for a model that was cut first and divided afterwards."""
    if is_parallel(model) and not was_parallel:
        raise ConfigError(_LATE)


def check_divided(
    ranks_multiple: int,
    config: JiTConfig,
    grid: Callable[[], tuple[int, ...]],
    num_tokens: int,
    text_tokens: int,
    references: int,
) -> None:
    """Raises ConfigError, with every reason, for a call whose tokens the ranks cannot divide.

    Args:
        ranks_multiple: Number of ranks.
        config: Finds nearby sizes for the message.
        grid: Returns the picture's token grid; only called for the message.
        num_tokens: Number of generated tokens.
        text_tokens: Number of text tokens.
        references: Number of reference tokens.
    """
    problems = []
    if num_tokens % ranks_multiple:
        sizes = " or ".join("x".join(map(str, size)) for size in config.sizes_near(grid(), ranks_multiple))
        problems.append(
            f"jitaccel: the picture must have a multiple of {ranks_multiple} tokens, one part for each rank, got "
            f"{num_tokens} ({'x'.join(map(str, grid()))}); choose another size, for example {sizes} tokens"
        )
    for what, count, advice in (
        ("prompts", text_tokens, "set max_sequence_length"),
        ("references", references, "give references of another size"),
    ):
        if count % ranks_multiple:
            problems.append(
                f"jitaccel: {what} must have a multiple of {ranks_multiple} tokens, one part for each rank, got "
                f"{count}; {advice}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _takes_anything(settings: Any) -> bool:
    """Returns whether ranks may have parts of different sizes. Old versions of diffusers lack both settings."""
    return bool(getattr(settings, "ulysses_anything", False) or getattr(settings, "ring_anything", False))
