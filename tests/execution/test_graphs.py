"""Inputs that a recorded graph reads in place, and inputs that it copies, with a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jitaccel.execution.compile import Compiler
from jitaccel.execution.graphs import Counts, RepeatedCalls, Replayed, refuse_capture


class Reading:
    """A function that adds its inputs up, and keeps which memory it read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        self.read = [x.data_ptr() for x in inputs]
        return (torch.stack(inputs).sum(dim=0),)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def replayed(function: Any, notes: list[str], **options: Any) -> Replayed:
    return Replayed(function, RepeatedCalls(), Counts(), notes.append, **options)


def test_parameters_and_buffers_are_read_where_they_stand_and_others_copied() -> None:
    reading, notes = Reading(), list[str]()
    weight, buffer, state = nn.Parameter(torch.ones(3)), torch.full((3,), 2.0), torch.full((3,), 4.0)
    run = replayed(reading, notes, buffers=lambda: [buffer])
    for other in (state, torch.full((3,), 8.0)):
        (found,) = run(weight, buffer, other)
        assert torch.equal(found, 3.0 + other)
    assert reading.read[:2] == [weight.data_ptr(), buffer.data_ptr()]
    assert reading.read[2] not in (state.data_ptr(), other.data_ptr())
    buffer += 1.0  # read at the replay, not when it was recorded
    assert torch.equal(run(weight, buffer, state)[0], torch.full((3,), 8.0))


def test_large_input_is_not_copied_and_one_that_moves_is_recorded_no_more() -> None:
    reading, notes = Reading(), list[str]()
    run = replayed(reading, notes, most_copied=8)
    standing = torch.ones(3)
    for _ in range(4):
        run(standing)
        assert reading.read == [standing.data_ptr()]
    assert not notes
    moving = [torch.full((3,), float(k)) for k in range(5)]
    for x in moving:
        assert torch.equal(run(x)[0], x)
    assert len(notes) == 1 and "moves between calls" in notes[0]


def test_compiled_function_copies_no_buffer_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("table", torch.full((3,), 5.0))
    copied: list[Tensor] = []
    monkeypatch.setattr("jitaccel.execution.graphs._own", lambda x: copied.append(x) or x)

    def function(model: Any, x: Tensor) -> tuple[Tensor]:
        return (model(x) + model.table,)

    compiler = Compiler({"backend": "eager", "graphs": True}, strict=True)
    x = torch.ones(2, 3)
    (found,) = compiler.run("a", function, model, x)
    assert torch.equal(found, function(model, x)[0])
    assert [tuple(each.shape) for each in copied if isinstance(each, Tensor)] == [(2, 3)]


def test_capture_within_anothers_capture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"must run outside of other captures.*'graphs': False"):
        refuse_capture()
