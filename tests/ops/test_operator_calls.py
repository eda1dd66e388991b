"""Ways to call operators: with views, without tokens, compiled, exported, traced, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jitaccel import ops
from tests.support.operator_checks import NAMES, same, strided
from tests.support.operators import ARGUMENTS, WRITTEN, call, compiled, fields, plain


@pytest.mark.parametrize("name", NAMES)
def test_operator_passes_opcheck(name: str) -> None:
    torch.library.opcheck(compiled(name), ARGUMENTS[name](fields()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [0, 1])
def test_operator_takes_an_empty_batch_and_no_channels(name: str, batch: int) -> None:
    f = fields((4, 5), 6, channels=4 if batch == 0 else 0, batch=batch)
    same(call(compiled(name), name, ARGUMENTS[name](f)), call(plain(name), name, ARGUMENTS[name](f)))


@pytest.mark.parametrize("name", NAMES)
def test_operator_reads_tensors_that_are_not_contiguous_and_writes_none(name: str) -> None:
    f = fields((6, 7), 12, 8)
    expected = call(compiled(name), name, ARGUMENTS[name](f))
    written = WRITTEN.get(name)
    arguments = tuple(
        strided(x) if isinstance(x, Tensor) and i != written else x for i, x in enumerate(ARGUMENTS[name](f))
    )
    before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    assert torch.equal(call(compiled(name), name, arguments), expected)
    for i, (x, copy) in enumerate(zip(arguments, before, strict=True)):
        assert not isinstance(x, Tensor) or i == written or torch.equal(x, copy)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_operator_compiles_whole(name: str, dynamic: bool) -> None:
    function = getattr(ops, name)
    torch._dynamo.reset()
    graph = torch.compile(lambda *arguments: function(*arguments), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    f = fields((6, 7), 12, 8)
    assert torch.equal(call(graph, name, ARGUMENTS[name](f)), call(function, name, ARGUMENTS[name](f)))


class _Module(torch.nn.Module):
    def __init__(self, name: str, grid: tuple[int, ...], numbers: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.grid, self.numbers = name, list(grid), numbers

    def forward(self, *tensors: Tensor) -> Tensor:
        return call(compiled(self.name), self.name, _with_numbers(tensors, self.grid, self.numbers))


def _with_numbers(tensors: tuple[Tensor, ...], grid: Any, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns tensors and the rest again in the order of the schema."""
    remaining = iter(tensors)
    return tuple(next(remaining) if kind is Tensor else (grid if kind is tuple else value) for kind, value in numbers)


def _kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        (Tensor, None) if isinstance(x, Tensor) else (tuple, None) if isinstance(x, tuple) else (None, x)
        for x in arguments
    )


@pytest.mark.parametrize("name", NAMES)
def test_operator_exports(name: str) -> None:
    arguments = ARGUMENTS[name](fields())
    tensors = tuple(x for x in arguments if isinstance(x, Tensor))
    module = _Module(name, fields().grid, _kinds(arguments))
    expected = call(compiled(name), name, ARGUMENTS[name](fields()))
    program = torch.export.export(module, tuple(x.clone() for x in tensors))
    assert any(f"jitaccel.{name}" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*(x.clone() for x in tensors)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NAMES)
def test_operator_is_traced_to_torchscript(name: str) -> None:
    arguments = ARGUMENTS[name](fields())
    tensors = tuple(x for x in arguments if isinstance(x, Tensor))
    module = _Module(name, fields().grid, _kinds(arguments))
    expected = call(compiled(name), name, ARGUMENTS[name](fields()))
    traced = torch.jit.trace(module, tuple(x.clone() for x in tensors), check_trace=False)
    assert f"jitaccel::{name}" in str(traced.graph)
    assert torch.equal(traced(*(x.clone() for x in tensors)), expected)


def test_gradients_run_through_the_reference() -> None:
    f = fields().double()
    values = f.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.lift(v, f.nearest, f.anchors, f.grid, f.weights), (values,))
    narrow = fields().values.requires_grad_()
    assert ops.lift(narrow, f.nearest, f.anchors, f.grid, f.weights).requires_grad
    with torch.no_grad():
        assert not ops.lift(narrow, f.nearest, f.anchors, f.grid, f.weights).requires_grad
