"""Layouts, random tensors and stand-ins of attention packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from jitaccel.execution.attention.choice import (
    BACKENDS,
    choose_backend,
)
from jitaccel.execution.packing import PackedLayout

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NAMES = [backend.name for backend in BACKENDS]
OF_CUDA = [name for name in NAMES if name != "sdpa"]
LAYOUTS = {  # text lengths, image lengths
    "one": ((7,), (30,)),
    "a token each": ((1, 0, 0), (0, 1, 1)),
    "uneven": ((5, 1, 30, 0), (40, 129, 1, 64)),
    "equal": ((8,) * 9, (24,) * 9),
    "equal in sum": ((8, 4, 0), (24, 28, 32)),
    "no text": ((0, 0), (33, 48)),
}


def layout_of(name: str, device: torch.device = CPU) -> PackedLayout:
    text, image = LAYOUTS[name]
    return PackedLayout.of(text, image, device)


def randn(layout: PackedLayout, head_dim: int, dtype: torch.dtype, heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(layout.lengths), heads, head_dim)
    return [torch.randn(shape, generator=generator).to(layout.order.device, dtype) for _ in range(3)]


class FakeKernel:
    """A function of a package that records its calls and returns its first tensor, or the result of `answer` on it."""

    def __init__(self, answer: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._answer = answer

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        self.calls.append((positional, keywords))
        return self._answer([*positional, *keywords.values()][0])


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    choose_backend.cache_clear()


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes packages look not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
