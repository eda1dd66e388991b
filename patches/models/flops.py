"""Operations of a forward, counted by torch on tensors without data, so that no model needs a formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jitaccel.execution.private import uncompiled

from ..cutting import Cut, places_of
from .model import Model


class OperationCounter:
    """Counts matrix products, convolutions and attention of a transformer; a multiply-add counts as two.

    It runs a copy of the model without data, made from the configuration at the first count. Layers added to the model
    (LoRA) are therefore not counted. It holds neither the model nor any tensor of a call.

    Args:
        module: The transformer.
        model: Its description.
    """

    def __init__(self, module: nn.Module, model: Model) -> None:
        self._kind: Any = type(uncompiled(module))
        self._config: Mapping[str, Any] = dict(uncompiled(module).config)
        self._adapter, self._words = model.adapter, model.words
        self._twin: nn.Module | None = None
        self._counted: dict[tuple[Any, ...], int] = {}

    def count(self, shapes: Mapping[str, Any], num_tokens: int, active: int) -> int:
        """Returns the operations of one forward of the whole batch.

        Args:
            shapes: The call's arguments, as returned by `shapes_of`.
            num_tokens: N, the number of tokens in the grid.
            active: M, the number of anchors that enter.
        """
        key = (active, num_tokens, repr(sorted(shapes.items())))
        if key not in self._counted:
            self._counted[key] = self._count(shapes, num_tokens, active)
        return self._counted[key]

    def _count(self, shapes: Mapping[str, Any], num_tokens: int, active: int) -> int:
        with torch.device("meta"), torch.no_grad():
            if self._twin is None:
                self._twin = self._kind.from_config(self._config).eval()
            cut, places = Cut(self._twin, self._adapter), None
            arguments = {name: _of_shape(value) for name, value in shapes.items()}
            if active < num_tokens:
                places = places_of(torch.arange(active)[None], num_tokens, are_shared=True)
                arguments = cut.arguments(arguments, places)
            try:
                with cut.at(places), FlopCounterMode(display=False) as counter:
                    self._twin(**self._words.write(arguments))
            finally:
                cut.remove()
        return int(counter.get_total_flops())


def shapes_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call with each tensor, also within lists, replaced by (shape, dtype)."""
    return {name: _shape_of(x) for name, x in arguments.items()}


def _shape_of(x: Any) -> Any:
    if isinstance(x, list):
        return [_shape_of(each) for each in x]
    return (x.shape, x.dtype) if isinstance(x, Tensor) else x


def _of_shape(value: Any) -> Any:
    """Returns a tensor without data of a shape. Floats get the copy's dtype, which does not affect the count."""
    if isinstance(value, list):
        return [_of_shape(each) for each in value]
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], torch.Size)):
        return value
    return torch.empty(value[0], dtype=None if value[1].is_floating_point else value[1])
