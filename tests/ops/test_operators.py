"""The compiled operators against their references, float64, and every way in which torch may call them."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jitaccel import ops
from jitaccel.ops import reference, schema
from tests.support import operators
from tests.support.operators import ARGUMENTS, WRITTEN, Fields, call, compiled, fields, plain

NAMES = sorted(ARGUMENTS)
FLOATING = ["lift", "importance", "micro_flow_into", "pool", "lift_pooled"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [(1, 1), (1, 13), (9, 1), (5, 7), (16, 16), (12, 31), (3, 4, 5), (1, 6, 2), (4, 1, 1)]
COUNTS = {"one": lambda n: 1, "third": lambda n: max(1, n // 3), "all": lambda n: n}


def same(actual: Tensor, expected: Tensor, exact: Tensor | None = None, plain_error: float | None = None) -> None:
    """Integers must be equal, floats at most twice as far from float64 as plain torch is; shape and dtype alike."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not actual.is_floating_point() or actual.numel() == 0:
        assert torch.equal(actual, expected)
        return
    exact = expected.double() if exact is None else exact.double()
    if bool(exact.isnan().all()):  # the mean over no channels
        assert bool(actual.isnan().all())
        return
    allowed = float((expected.double() - exact).abs().max()) if plain_error is None else plain_error
    # Where plain torch happens to be exact (one anchor, say), sums of up to 61 weights may still be rounded.
    floor = 16 * torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=0.1)
    assert float((actual.double() - exact).abs().max()) <= 2 * allowed + floor


def check(name: str, f: Fields) -> None:
    """Compares one operator with its reference, in the fields' dtype and in float64."""
    actual = call(compiled(name), name, ARGUMENTS[name](f))
    expected = call(plain(name), name, ARGUMENTS[name](f))
    exact = call(plain(name), name, ARGUMENTS[name](f.double())) if name in FLOATING else None
    plain_error = moments_error(f.velocity, f.grid, 3) if name == "importance" else None
    same(actual, expected, exact, plain_error)


def moments_error(velocity: Tensor, grid: tuple[int, ...], window: int) -> float:
    """Returns how far the two moments are from float64 where they are taken in float32, as plain torch takes them."""
    field, size = velocity.float().reshape(len(velocity), *grid, -1), window ** len(grid)
    first, second = (reference._window_sum(x, window) / size for x in (field, field.square()))
    moments = (second - first.square()).mean(dim=-1).flatten(1)
    exact = plain("importance")(velocity.double(), grid, window).double()
    return float((moments.double() - exact).abs().max()) if moments.numel() else 0.0


# What is there


def test_every_operator_of_the_namespace_has_arguments_a_reference_and_a_fake_kernel() -> None:
    registered = {n.removeprefix("jitaccel::") for n in torch._C._dispatch_get_all_op_names() if "jitaccel::" in n}
    assert {name.partition(".")[0] for name in registered} == set(ARGUMENTS) == set(schema.SCHEMAS)
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"jitaccel::{name}", "CompositeExplicitAutograd")
        arguments = ARGUMENTS[name](fields())
        with torch._subclasses.FakeTensorMode() as mode:
            arguments = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)
            result = call(compiled(name), name, arguments)
        expected = call(plain(name), name, ARGUMENTS[name](fields()))
        assert result.shape == expected.shape and result.dtype == expected.dtype


def test_operators_are_compiled_where_there_is_a_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    assert "cpu" in ops.compiled(), ops.missing()
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"jitaccel::{name}", "CPU")


def test_schemas_of_the_library_are_those_of_python() -> None:
    for name, signature in schema.SCHEMAS.items():
        assert str(compiled(name)._schema) == f"jitaccel::{name}{signature}"


# What they compute


@pytest.mark.parametrize("count", list(COUNTS))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_operator_equals_its_reference(name: str, grid: tuple[int, ...], count: str) -> None:
    check(name, fields(grid, COUNTS[count](schema.num_tokens_of(grid)), batch=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 64, 100, 128, 3072])
@pytest.mark.parametrize("name", FLOATING)
def test_operator_takes_every_dtype_and_width(name: str, channels: int, dtype: torch.dtype) -> None:
    check(name, fields((6, 9), 17, channels, dtype=dtype))


@pytest.mark.parametrize("scale", [0.9, 3.0, 100.0])
@pytest.mark.parametrize("name", ["lift", "micro_flow_into"])
def test_operator_blurs_as_wide_as_asked(name: str, scale: float) -> None:
    for grid in ((11, 8), (2, 5, 3)):
        check(name, fields(grid, 10, blur_scale=scale))


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_importance_takes_any_window(grid: tuple[int, ...], window: int) -> None:
    f = fields(grid, 1)
    expected = plain("importance")(f.velocity, grid, window)
    same(ops.importance(f.velocity, grid, window), expected, plain_error=moments_error(f.velocity, grid, window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_is_nearer_to_float64_than_two_moments_in_the_same_dtype(dtype: torch.dtype) -> None:
    f = fields((16, 16), 1, 16)
    velocity = (50.0 + f.velocity).to(dtype)
    exact = plain("importance")(velocity.double(), f.grid, 3).double()
    actual = ops.importance(velocity, f.grid)
    assert float((actual.double() - exact).abs().max()) <= moments_error(velocity, f.grid, 3)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_keeps_anchors_bit_for_bit_whatever_their_value(dtype: torch.dtype) -> None:
    f = fields((9, 9), 30, 8, dtype=dtype)
    special = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max])
    f.values[0, :5, 0] = special.to(dtype)
    lifted = compiled("lift")(*ARGUMENTS["lift"](f))
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    kept = lifted.gather(1, f.anchors[:, :, None].expand(-1, -1, 8))
    assert torch.equal(kept.contiguous().view(bits), f.values.view(bits))


@pytest.mark.parametrize("name", NAMES)
def test_operator_gives_the_same_bits_every_time_and_on_any_number_of_threads(name: str) -> None:
    f = fields((24, 20), 150, 48, batch=3)
    first = call(compiled(name), name, ARGUMENTS[name](f))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(call(compiled(name), name, ARGUMENTS[name](f)), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_image_of_a_batch_is_the_image_alone(name: str) -> None:
    f = fields((7, 8), 15, 6, batch=3)
    together = call(compiled(name), name, ARGUMENTS[name](f))
    shared = ("grid", "weights", "levels")
    for k in range(3):
        one = Fields(**{n: x if n in shared else x[k : k + 1] for n, x in vars(f).items()})
        assert torch.equal(call(compiled(name), name, ARGUMENTS[name](one)), together[k : k + 1])


def test_micro_flow_takes_an_old_anchors_own_clean_estimate() -> None:
    f = fields((6, 7), 12, 8)
    tokens = f.anchors[:, ::3].contiguous()
    check("micro_flow_into", Fields(**{**vars(f), "tokens": tokens}))


# How they may be called


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
        _strided(x) if isinstance(x, Tensor) and i != written else x for i, x in enumerate(ARGUMENTS[name](f))
    )
    before = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    assert torch.equal(call(compiled(name), name, arguments), expected)
    for i, (x, copy) in enumerate(zip(arguments, before, strict=True)):
        assert not isinstance(x, Tensor) or i == written or torch.equal(x, copy)


def _strided(x: Tensor) -> Tensor:
    """Returns the same values with every other element of memory left out along the last axis; a single one as is."""
    if x.ndim == 0:
        return x
    wide = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    assert x.numel() < 2 or not wide.is_contiguous()
    return wide


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


# Properties


@st.composite
def grids_with_anchors(draw: st.DrawFn) -> Fields:
    grid = draw(st.sampled_from([2, 3]).flatmap(lambda axes: st.tuples(*[st.integers(1, 7)] * axes)))
    count = draw(st.integers(1, schema.num_tokens_of(grid)))
    return fields(grid, count, draw(st.integers(1, 9)), seed=draw(st.integers(0, 999)))


@settings(max_examples=80, deadline=None)
@given(f=grids_with_anchors())
def test_nearest_is_truly_nearest_and_ties_go_to_the_lowest(f: Fields) -> None:
    places = torch.stack(torch.unravel_index(torch.arange(f.state.shape[1]), f.grid), dim=-1)
    nearest = ops.nearest_anchor(f.anchors, f.grid)
    for image in range(2):
        at = places[f.anchors[image]]
        distance = (places[:, None] - at[None]).square().sum(dim=-1)
        assert torch.equal(nearest[image], distance.argmin(dim=1))  # the first of equal ones: anchors rise


@settings(max_examples=40, deadline=None)
@given(f=grids_with_anchors(), value=st.floats(-1e3, 1e3, width=32))
def test_lift_preserves_constants_and_keeps_within_the_values(f: Fields, value: float) -> None:
    plan = (f.nearest, f.anchors, f.grid, f.weights)
    constant = torch.full_like(f.values, value)
    # Along each axis K weights, rounded to float32, are summed up: as many half units in the last place, and one.
    bound = len(f.grid) * (len(f.weights) + 1) * 2.0**-24
    torch.testing.assert_close(ops.lift(constant, *plan), torch.full_like(f.state, value), rtol=bound, atol=1e-12)
    lifted = ops.lift(f.values, *plan)
    assert bool((lifted <= f.values.amax(dim=1, keepdim=True) + 1e-5).all())
    assert bool((lifted >= f.values.amin(dim=1, keepdim=True) - 1e-5).all())


@settings(max_examples=40, deadline=None)
@given(f=grids_with_anchors())
def test_activation_is_nested_exact_in_size_and_of_the_most_important(f: Fields) -> None:
    inactive = f.state.shape[1] - f.anchors.shape[1]
    # Few different values: ties everywhere, some of them between the two zeros.
    scores = (f.importance * 4).floor() - 1
    scores = torch.where(scores == 0, torch.where(f.importance > 0.37, -0.0, 0.0), scores)
    for count in {0, 1, inactive // 2, inactive} & set(range(inactive + 1)):
        chosen = ops.activate(scores, f.anchors, count)
        assert torch.equal(chosen, plain("activate")(scores, f.anchors, count))
        for image in range(2):
            tokens = chosen[image].tolist()
            assert len(tokens) == count and not set(tokens) & set(f.anchors[image].tolist())
            assert all(low < high for low, high in pairwise(tokens))


@settings(max_examples=20, deadline=None)
@given(f=grids_with_anchors(), value=st.floats(-100, 100, width=32))
def test_importance_of_a_constant_is_zero_away_from_the_border(f: Fields, value: float) -> None:
    scores = ops.importance(torch.full_like(f.state, value), f.grid).view(2, *f.grid)
    inside = scores[(slice(None), *(slice(1, -1) for _ in f.grid))]
    assert bool((inside == 0).all()) and bool((scores >= 0).all())


def test_importance_keeps_what_is_not_a_number() -> None:
    f = fields((6, 7), 1, 19)
    for channel in (3, 18):  # in a vector, and in the rest
        velocity = f.velocity.clone()
        velocity[0, 16, channel] = torch.nan
        assert ops.importance(velocity, f.grid)[0].view(6, 7)[1:4, 1:4].isnan().all()


# What they refuse


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
    """Returns the arguments with the written one as given, where `ARGUMENTS` makes one of its own."""
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
    arguments = (_strided(f.state), *ARGUMENTS[name](f)[1:])
    for function in (getattr(ops, name), compiled(name)):
        with pytest.raises((RuntimeError, ValueError), match=rf"{name}: \w+ must be contiguous"):
            function(*arguments)


@pytest.mark.parametrize("count", [-1, 27])
def test_activate_refuses_more_tokens_than_are_inactive(count: int) -> None:
    f = fields()
    for function in (ops.activate, compiled("activate")):
        with pytest.raises((RuntimeError, ValueError), match=rf"activate: count must be in 0\.\.26.*got {count};"):
            function(f.importance, f.anchors, count)


@pytest.mark.parametrize("window", [0, 2, -3])
def test_importance_refuses_a_window_without_a_middle(window: int) -> None:
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


def test_float64_runs_the_reference() -> None:
    f = fields().double()
    lifted = ops.lift(*ARGUMENTS["lift"](f))
    assert lifted.dtype == torch.float64
    assert torch.equal(lifted, plain("lift")(*ARGUMENTS["lift"](f)))
    with pytest.raises(RuntimeError, match="lift: values must be float32, float16 or bfloat16"):
        compiled("lift")(*ARGUMENTS["lift"](f))


def test_arguments_cover_what_is_public() -> None:
    assert set(operators.ARGUMENTS) | {"lift_clean", "compiled", "missing", "DTYPES", "SCHEMAS"} == set(ops.__all__)
