"""Inputs that operators refuse before they read or write anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jitaccel import ops
from jitaccel.method.config import MAX_WINDOW
from jitaccel.ops import schema
from tests.support.operator_checks import NAMES, strided
from tests.support.operators import ARGUMENTS, WRITTEN, Fields, compiled, fields

BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("nearest_anchor", "grid of one axis", {"grid": (35,)}, "grid must be"),
    ("nearest_anchor", "empty grid", {"grid": (0, 7)}, "grid must be"),
    ("nearest_anchor", "int32", {"anchors": torch.zeros(2, 3, dtype=torch.int32)}, "anchors must be int64"),
    ("nearest_anchor", "no anchors", {"anchors": torch.zeros(2, 0, dtype=torch.int64)}, "anchors must be int64"),
    ("lift", "other values", {"values": torch.zeros(2, 8, 5)}, "values must be"),
    ("lift", "integers", {"values": torch.zeros(2, 9, 5, dtype=torch.int32)}, "values must be"),
    ("lift", "another grid", {"grid": (5, 8)}, "nearest must be int64"),
    ("lift", "even weights", {"weights": torch.ones(4)}, "weights must be float32"),
    ("lift", "float64 weights", {"weights": torch.ones(7).double()}, "weights must be float32"),
    ("importance", "another grid", {"grid": (5, 6)}, "velocity must be"),
    ("activate", "float64", {"importance": torch.zeros(2, 35).double()}, "importance.* must be float32"),
    ("activate", "another batch", {"importance": torch.zeros(3, 35)}, "importance and anchors must be"),
    ("micro_flow_into", "one level", {"levels": torch.zeros(1)}, "levels must be float32"),
    ("micro_flow_into", "fewer tokens", {"state": torch.zeros(2, 34, 5)}, "state must be"),
    ("micro_flow_into", "another noise", {"noise": torch.zeros(2, 35, 4)}, "noise must be"),
    ("micro_flow_into", "other tokens", {"tokens": torch.zeros(1, 3, dtype=torch.int64)}, "tokens must be int64"),
]


@pytest.mark.parametrize(("name", "what", "changed", "message"), BAD, ids=[f"{b[0]}-{b[1]}" for b in BAD])
def test_operator_refuses_what_does_not_fit(name: str, what: str, changed: dict[str, Any], message: str) -> None:
    f = Fields(**{**vars(fields()), **changed})
    with pytest.raises(ValueError, match=f"{name}: {message}.*got.*;"):
        getattr(ops, name)(*_raw(name, f))
    with pytest.raises(RuntimeError, match=f"{name}: {message}.*got.*;"):
        compiled(name)(*_raw(name, f))


def _raw(name: str, f: Fields) -> tuple[Any, ...]:
    """Returns the arguments with the given written one, instead of the one made by `ARGUMENTS`."""
    arguments = ARGUMENTS[name](f)
    return (f.state, *arguments[1:]) if name in WRITTEN else arguments


def _rows(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


WRONG_ROWS = {
    "out of order": [3, 2, 9, 10, 11, 12, 13, 14, 15],
    "twice": [2, 2, 9, 10, 11, 12, 13, 14, 15],
    "negative": [-1, 2, 9, 10, 11, 12, 13, 14, 15],
    "off the grid": [1, 2, 9, 10, 11, 12, 13, 14, 35],
}


@pytest.mark.parametrize("what", list(WRONG_ROWS))
@pytest.mark.parametrize("name", [name for name in NAMES if "anchors" in schema.SCHEMAS[name]])
def test_operator_refuses_anchors_that_are_no_set(name: str, what: str) -> None:
    good = fields()
    f = Fields(**{**vars(good), "anchors": torch.stack([good.anchors[0], torch.tensor(WRONG_ROWS[what])])})
    with pytest.raises((RuntimeError, ValueError), match=rf"{name}: anchors must rise strictly within 0\.\.34, got"):
        getattr(ops, name)(*ARGUMENTS[name](f))


@pytest.mark.parametrize("index", [-1, 9, 2**40])
@pytest.mark.parametrize("name", ["lift", "micro_flow_into"])
def test_operator_refuses_a_nearest_anchor_that_is_none(name: str, index: int) -> None:
    f = fields()
    f.nearest[1, 7] = index
    with pytest.raises(RuntimeError, match=rf"{name}: nearest must lie in 0\.\.8, got {index}; use nearest_anchor"):
        compiled(name)(*ARGUMENTS[name](f))


@pytest.mark.parametrize("what", list(WRONG_ROWS))
def test_micro_flow_refuses_tokens_that_are_no_set(what: str) -> None:
    f = Fields(**{**vars(fields()), "tokens": _rows(WRONG_ROWS[what], WRONG_ROWS[what])})
    with pytest.raises(RuntimeError, match="micro_flow_into: tokens must rise strictly"):
        compiled("micro_flow_into")(*ARGUMENTS["micro_flow_into"](f))


@pytest.mark.parametrize("name", list(WRITTEN))
def test_operator_refuses_to_write_what_is_not_contiguous(name: str) -> None:
    f = fields()
    arguments = (strided(f.state), *ARGUMENTS[name](f)[1:])
    for function in (getattr(ops, name), compiled(name)):
        with pytest.raises((RuntimeError, ValueError), match=rf"{name}: \w+ must be contiguous"):
            function(*arguments)


@pytest.mark.parametrize("count", [-1, 27])
def test_activate_refuses_more_tokens_than_are_inactive(count: int) -> None:
    f = fields()
    for function in (ops.activate, compiled("activate")):
        with pytest.raises((RuntimeError, ValueError), match=rf"activate: count must be in 0\.\.26.*got {count};"):
            function(f.importance, f.anchors, count)


@pytest.mark.parametrize("window", [0, 2, -3, 1025, 2**21 + 1, 3037000501, 2**63 - 1])
def test_importance_refuses_a_window_without_a_middle_or_beyond_the_limit(window: int) -> None:
    f = fields()
    for function in (ops.importance, compiled("importance")):
        with pytest.raises((RuntimeError, ValueError), match=f"importance: window must be odd.*got {window};"):
            function(f.velocity, f.grid, window)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_micro_flow_refuses_a_weight_that_is_no_share(weight: float) -> None:
    arguments = ARGUMENTS["micro_flow_into"](fields())[:-1]
    for function in (ops.micro_flow_into, compiled("micro_flow_into")):
        with pytest.raises((RuntimeError, ValueError), match=r"micro_flow_into: weight must be in \[0, 1\]"):
            function(*arguments, weight)


def test_greatest_window_is_the_configurations_and_is_right() -> None:
    """A window over the whole grid: zeros beyond the border count in its size."""
    f = fields()
    window = schema.MAX_WINDOW
    assert window == MAX_WINDOW
    exact = f.velocity.double()
    share = 1.0 / window ** len(f.grid)
    mean, square = exact.sum(dim=1) * share, exact.square().sum(dim=1) * share
    expected = (square - mean.square()).mean(dim=1)
    for function in (ops.importance, compiled("importance")):
        found = function(f.velocity, f.grid, window)
        assert torch.allclose(found.double(), expected[:, None].expand_as(found), rtol=1e-4)
