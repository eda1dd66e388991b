"""Backends of torch.compile that count, and generations to compile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jitaccel.execution.graphs import Recording, RepeatedCalls
from tests.support.tiny import SHORT

CLEAN = SHORT.replace(lifter="clean", micro_flow="none")
GUIDED: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 3.0}


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


class Failing(RepeatedCalls):
    """Fails at the first replays, or at every capture."""

    def __init__(self, replays: int = 0, captures: bool = False) -> None:
        super().__init__()
        self.replays, self.captures = replays, captures

    def record(self, call: Any) -> Recording:
        if self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        recording = super().record(call)

        def replay() -> None:
            if self.replays:
                self.replays -= 1
                raise RuntimeError("replay failed")
            recording.replay()

        return Recording(recording.outputs, replay)
