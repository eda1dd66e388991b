"""Counts the operations of a FLUX transformer that really run, whatever a cache skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import CommandError


class Work:
    """Floating-point operations so far, for the whole batch; a multiply-add counts as two.

    Counts matrix products and attention, as `jitaccel.flops` does, so a complete forward counts exactly what
    `flux_flops` returns. Counts layer by layer, not block by block, because a cache may replace a part of a block, as
    TaylorSeer replaces attention. Does not use torch's FlopCounterMode, which would slow a timed run.
    """

    def __init__(self) -> None:
        self.flops = 0
        self._tokens = 0

    def see_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the numbers of image and text tokens of a call of the transformer."""
        self._tokens = kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1]

    def counting(self, layer: nn.Linear, is_query: bool) -> Callable[[Tensor], Tensor]:
        """Returns a counting forward of the layer; for queries, also counts the attention that follows."""
        forward = layer.forward

        def counted_forward(state: Tensor) -> Tensor:
            self.flops += 2 * state.numel() * layer.out_features
            if is_query:  # every token to every token, two products
                self.flops += 2 * 2 * len(state) * self._tokens**2 * layer.out_features
            return forward(state)

        return counted_forward


@contextmanager
def counted(transformer: nn.Module) -> Iterator[Work]:
    """Counts the forwards of a diffusers `FluxTransformer2DModel` inside the block.

    Wraps the layers' `forward` instead of using hooks, because a module's hooks run even if a cache answers instead.
    Anything installed inside the block must be removed before it ends.

    Raises CommandError for another model, whose layers might not be counted.
    """
    if type(transformer).__name__ != "FluxTransformer2DModel":
        raise CommandError(f"caches must have FLUX.1's FluxTransformer2DModel, got {type(transformer).__name__}")
    work = Work()
    with ExitStack() as undo:
        undo.callback(transformer.register_forward_pre_hook(work.see_call, with_kwargs=True).remove)
        for name, layer in transformer.named_modules():
            if isinstance(layer, nn.Linear):
                attributes = vars(layer)
                if "forward" in attributes:
                    undo.callback(attributes.__setitem__, "forward", attributes["forward"])
                else:
                    undo.callback(attributes.pop, "forward", None)
                attributes["forward"] = work.counting(layer, name.endswith(".attn.to_q"))
        yield work
