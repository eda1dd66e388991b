"""When the host of a generation waits for the device: once at the start of a stage, and in no step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jitaccel import PRESETS, JiTConfig, noise_levels
from jitaccel.method import run as run_module
from jitaccel.method.run import Run
from jitaccel.method.steps import KnownLevels

GRID = (12, 10)


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU: values that become Python numbers, and shapes from values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(function.__name__.startswith(name) for name in self.NAMES)
        return function(*args, **(kwargs or {}))


def test_what_would_wait_is_counted() -> None:
    x = torch.ones(3)
    for wait in (lambda: bool(x.all()), lambda: int(x[0]), x.nonzero, lambda: torch.equal(x, x)):
        with Waits() as waits:
            wait()
        assert waits.count > 0


@pytest.mark.parametrize("name", ["7x-paper", "4x"])
def test_start_of_a_stage_waits_once_and_steps_never_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config: JiTConfig = PRESETS[name]
    levels = noise_levels(config)
    state = torch.randn(2, GRID[0] * GRID[1], 4, generator=torch.Generator().manual_seed(0))
    clock = KnownLevels(config, levels)
    run = Run(config, GRID, clock.step(0), state)
    lists: list[Tensor] = []  # flags that are read, which the mode does not see

    def tolist(x: Tensor, plain: Any = Tensor.tolist) -> list[Any]:
        lists.extend([x] if x.dtype == torch.bool else [])
        return plain(x)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    # Positions are drawn on the CPU, where nothing waits.
    monkeypatch.setattr(run_module, "first_anchors", lambda grid, count, *_: torch.arange(count))
    for i in range(clock.num_steps):
        before, stage = len(lists), run.stage
        with Waits() as waits:
            state = run.enter(clock.step(i), state)
            velocity = run.leave(clock.step(i), state, run.show(state))
        assert waits.count + len(lists) - before == (1 if run.stage > stage else 0), i
        state = state + (levels[i + 1] - levels[i]) * velocity
    assert run.stage > 0
