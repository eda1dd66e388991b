"""Every operator against its plain-torch reference: registration, results and properties."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jitaccel import ops
from jitaccel.ops import schema
from tests.support import operators
from tests.support.operator_checks import COUNTS, DTYPES, FLOATING, GRIDS, NAMES, check, moments_error, same
from tests.support.operators import ARGUMENTS, Fields, call, compiled, fields, plain


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


def test_float64_runs_the_reference() -> None:
    f = fields().double()
    lifted = ops.lift(*ARGUMENTS["lift"](f))
    assert lifted.dtype == torch.float64
    assert torch.equal(lifted, plain("lift")(*ARGUMENTS["lift"](f)))
    with pytest.raises(RuntimeError, match="lift: values must be float32, float16 or bfloat16"):
        compiled("lift")(*ARGUMENTS["lift"](f))


def test_arguments_cover_what_is_public() -> None:
    assert set(operators.ARGUMENTS) | {"lift_clean", "compiled", "missing", "DTYPES", "SCHEMAS"} == set(ops.__all__)
