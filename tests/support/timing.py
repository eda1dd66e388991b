"""Artificial costs, and a clock that advances when a transformer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from jitaccel.speed.auto import Choice, auto_config
from jitaccel.speed.cost import Costs
from tests.support import tiny

NUM_TOKENS = 4096
CURVES: dict[str, Callable[[int], float]] = {
    "linear": lambda tokens: tokens / NUM_TOKENS,
    "quadratic": lambda tokens: (tokens / NUM_TOKENS) ** 2,
    "constant": lambda tokens: 1.0,
    "overhead": lambda tokens: 0.3 + 0.4 * tokens / NUM_TOKENS + 0.3 * (tokens / NUM_TOKENS) ** 2,
    "falling": lambda tokens: 2.0 - tokens / NUM_TOKENS,  # not realistic, but noise may look like this
}
FLUX_DEV = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip


def costs(curve: str = "overhead", **changed: Any) -> Costs:
    """Returns costs in which a dense step takes a second, or the time given by the curve."""
    terms = {"linear": (0.0, 1 / NUM_TOKENS, 0.0), "overhead": (0.3, 0.4 / NUM_TOKENS, 0.3 / NUM_TOKENS**2)}
    given = {
        "num_tokens": NUM_TOKENS, "text_tokens": 512, "dense_s": CURVES[curve](NUM_TOKENS), "measured": ((4096, 1.0),),
        "terms": terms[curve],
    }  # fmt: skip
    return Costs(**{**given, **changed})


class Clock:
    """A clock that only advances when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def follow(self, model: Any) -> Any:
        """Makes every token that enters a transformer take a millisecond; returns the hook, to be removed."""

        def tick(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.now += 1e-3 * args[0].flatten(0, -2).shape[0]

        return model.x_embedder.register_forward_pre_hook(tick)


def scripted(clock: Clock, tokens: int, times: Iterator[float], seen: list[int]) -> Callable[[], None]:
    def run() -> None:
        seen.append(tokens)
        clock.now += next(times)

    return run


AUTO: dict[str, Any] = {"preset": "auto", "size": (48, 48), "text_tokens": tiny.TEXT_TOKENS}


def chosen_for(target: Any, **arguments: Any) -> Choice:
    """Returns the choice if every token takes a millisecond."""
    clock = Clock()
    hook = clock.follow(getattr(target, "transformer", target))
    try:
        return auto_config(target, clock=clock, target_speedup=6.0, text_tokens=8, **arguments)
    finally:
        hook.remove()
