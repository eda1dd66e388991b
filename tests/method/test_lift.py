"""Nearest anchors, the blur, and the lift from anchors to every token."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jitaccel.method.lift import LiftPlan, blur_weights, lift, lift_velocity, make_lift_plan
from jitaccel.ops import nearest_anchor
from jitaccel.ops.reference import blur_matrix
from jitaccel.tokens import gather_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _anchors(batch: int, num_tokens: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _plan(grid: tuple[int, int], count: int, batch: int = 2, blur_scale: float = 0.4) -> LiftPlan:
    return make_lift_plan(_anchors(batch, grid[0] * grid[1], count), grid, blur_scale)


def _nearest_by_force(anchors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the nearest anchor through the whole distance matrix, ties to the lowest raster index."""
    tokens = torch.arange(grid[0] * grid[1])
    row, column = tokens // grid[1], tokens % grid[1]
    distance = (row[:, None, None] - row[anchors]) ** 2 + (column[:, None, None] - column[anchors]) ** 2
    return (distance * len(tokens) + anchors).argmin(dim=2).T


def _lift_by_definition(values: Tensor, plan: LiftPlan, blur_scale: float = 0.4) -> Tensor:
    """Returns the lift of float64 values by torch's own reflect padding and convolution."""
    batch, num_anchors, channels = values.shape
    height, width = plan.grid
    sigma = min(max(blur_scale / math.sqrt(num_anchors / (height * width)), 1.0), 10.0)
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1).double()
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    filled = values.gather(1, plan.nearest[:, :, None].expand(-1, -1, channels))
    image = filled.transpose(1, 2).reshape(batch, channels, height, width)
    image = F.pad(image, (radius,) * 4, mode="reflect")
    blurred = F.conv2d(image, kernel.expand(channels, 1, -1, -1), groups=channels)
    result = blurred.flatten(2).transpose(1, 2).contiguous()
    return result.scatter(1, plan.anchors[:, :, None].expand(-1, -1, channels), values)


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 11), width=st.integers(1, 11), data=st.data(), seed=st.integers(0, 999))
def test_nearest_anchor_equals_brute_force(height: int, width: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, height * width))
    anchors = _anchors(2, height * width, count, seed)
    nearest = nearest_anchor(anchors, (height, width))
    assert nearest.dtype == torch.int64
    assert torch.equal(nearest, _nearest_by_force(anchors, (height, width)))


@pytest.mark.parametrize("grid", [(1, 200), (200, 1), (37, 53), (64, 64)])
@pytest.mark.parametrize("count", [1, 2, 60])
def test_nearest_anchor_equals_brute_force_on_larger_grids(grid: tuple[int, int], count: int) -> None:
    anchors = _anchors(3, grid[0] * grid[1], count)
    assert torch.equal(nearest_anchor(anchors, grid), _nearest_by_force(anchors, grid))


def test_nearest_anchor_of_an_anchor_is_itself() -> None:
    anchors = _anchors(2, 130, 40)
    at_anchors = gather_tokens(nearest_anchor(anchors, (10, 13)), anchors)
    assert torch.equal(at_anchors, torch.arange(40).expand(2, -1))


def test_nearest_anchor_breaks_ties_by_lowest_raster_index() -> None:
    middle = 4  # of a 3x3 grid; its four neighbours are equally near
    assert nearest_anchor(torch.tensor([[1, 3, 5, 7]]), (3, 3))[0, middle] == 0
    assert nearest_anchor(torch.tensor([[3, 5, 7]]), (3, 3))[0, middle] == 0
    assert nearest_anchor(torch.tensor([[0, 7]]), (3, 3))[0, middle] == 1


@pytest.mark.parametrize(
    ("density", "scale", "sigma"), [(0.32, 0.4, 1.0), (0.04, 0.4, 2.0), (1e-6, 0.4, 10.0), (0.25, 0.75, 1.5)]
)
def test_blur_weights_follow_the_density(density: float, scale: float, sigma: float) -> None:
    weights = blur_weights(density, scale)
    radius = math.ceil(3 * sigma)
    assert len(weights) == 2 * radius + 1
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(weights, weights.flip(0))
    assert float(weights[radius + 1] / weights[radius]) == pytest.approx(math.exp(-0.5 / sigma**2))


@pytest.mark.parametrize("size", range(1, 10))
def test_blur_reflects_repeatedly_where_the_axis_is_shorter_than_the_kernel(size: int) -> None:
    weights = blur_weights(1.0)
    axis = torch.eye(size, dtype=torch.float64)
    bounce = [*range(size), *range(size - 2, 0, -1)]  # one whole period of the reflected axis
    rows = [
        sum(weight * axis[bounce[(i + offset) % len(bounce)]] for offset, weight in enumerate(weights, -3))
        for i in range(size)
    ]
    torch.testing.assert_close(blur_matrix(weights, size), torch.stack(rows), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("grid", "count"), [((16, 16), 90), ((9, 23), 70), ((40, 24), 20), ((32, 32), 1023)])
@pytest.mark.parametrize("scale", [0.4, 0.9])
def test_lift_matches_the_definition(grid: tuple[int, int], count: int, scale: float) -> None:
    plan = _plan(grid, count, batch=3, blur_scale=scale)
    values = _randn(3, count, 6)
    expected = _lift_by_definition(values.double(), plan, scale)
    torch.testing.assert_close(lift(values, plan).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lift_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    plan = _plan((24, 24), 200)
    values = _randn(2, 200, 16).to(dtype)
    exact = _lift_by_definition(values.double(), plan)
    half = dtype in (torch.bfloat16, torch.float16)
    plain = exact.to(dtype) if half else _lift_by_definition_in(values, plan, exact)
    floor = 1e-6 if dtype is torch.float64 else 0.0  # the plan's weights are float32
    error, plain_error = ((x.double() - exact).abs().max() for x in (lift(values, plan), plain))
    assert lift(values, plan).dtype == dtype
    assert error <= 2 * plain_error + floor


def _lift_by_definition_in(values: Tensor, plan: LiftPlan, exact: Tensor) -> Tensor:
    if values.dtype is torch.float64:
        return exact
    batch, _, channels = values.shape
    height, width = plan.grid
    kernel = blur_weights(1.0).to(values.dtype)
    filled = gather_tokens(values, plan.nearest).transpose(1, 2).reshape(batch, channels, height, width)
    image = F.pad(filled, (3, 3, 3, 3), mode="reflect")
    image = F.conv2d(image, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    image = F.conv2d(image, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    result = image.flatten(2).transpose(1, 2).contiguous()
    return result.scatter(1, plan.anchors[:, :, None].expand(-1, -1, channels), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_lift_keeps_anchors_bit_for_bit(dtype: torch.dtype, lifter: Any) -> None:
    plan = _plan((9, 14), 50)
    values = _randn(2, 50, 8).to(dtype)
    state = _randn(2, 126, 8, seed=1).to(dtype)
    velocity = lift_velocity(values, state, 0.37, plan, lifter)
    assert velocity.dtype == dtype
    assert torch.equal(gather_tokens(velocity, plan.anchors), values)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_lift_preserves_constants_and_range(height: int, width: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, height * width))
    plan = make_lift_plan(_anchors(2, height * width, count, seed), (height, width))
    constant = torch.tensor([3.7, -0.2, 1e4]).expand(2, count, 3)
    torch.testing.assert_close(
        lift(constant, plan), constant[:, :1].expand(-1, height * width, -1), rtol=1e-6, atol=0
    )
    values = _randn(2, count, 3, seed=seed)
    lifted = lift(values, plan)
    assert bool((lifted.amax(1) <= values.amax(1) + 1e-5).all())
    assert bool((lifted.amin(1) >= values.amin(1) - 1e-5).all())


def test_lift_uses_each_images_own_anchors() -> None:
    plan = _plan((10, 12), 33, batch=3)
    values = _randn(3, 33, 4)
    for image in range(3):
        alone = make_lift_plan(plan.anchors[image : image + 1], plan.grid)
        torch.testing.assert_close(lift(values, plan)[image], lift(values[image : image + 1], alone)[0])


@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_lift_of_every_token_returns_the_values(lifter: Any) -> None:
    plan = make_lift_plan(torch.arange(35).expand(2, -1), (5, 7))
    values, state = _randn(2, 35, 4), _randn(2, 35, 4, seed=1)
    assert plan.is_dense
    assert torch.equal(lift_velocity(values, state, 0.5, plan, lifter), values)


def test_lift_computes_in_float32_under_autocast() -> None:
    plan = _plan((16, 16), 90)
    values = _randn(2, 90, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = lift(values, plan)
    assert torch.equal(under_autocast, lift(values, plan))


def test_lift_reads_transposed_values_and_writes_none_of_its_inputs() -> None:
    plan = _plan((9, 14), 50)
    values = _randn(2, 8, 50).transpose(1, 2)
    state = _randn(2, 8, 126, seed=1).transpose(1, 2)
    values_before, state_before = values.clone(), state.clone()
    for lifter in ("velocity", "clean"):
        expected = lift_velocity(values.contiguous(), state.contiguous(), 0.5, plan, lifter)
        assert torch.equal(lift_velocity(values, state, 0.5, plan, lifter), expected)
    assert torch.equal(values, values_before)
    assert torch.equal(state, state_before)


def test_lift_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    lift(torch.ones(2, 50, 8), _plan((9, 14), 50))
    assert torch.equal(torch.get_rng_state(), state)


def test_lift_compiles_whole() -> None:
    plan = _plan((9, 14), 50)
    values, state = _randn(2, 50, 8), _randn(2, 126, 8, seed=1)
    compiled = torch.compile(lift_velocity, fullgraph=True, backend="eager")
    for lifter in ("velocity", "clean"):
        expected = lift_velocity(values, state, 0.5, plan, lifter)
        torch.testing.assert_close(compiled(values, state, 0.5, plan, lifter), expected)


@pytest.mark.parametrize("level", [1.0, 0.3])
def test_clean_lifter_makes_the_clean_estimate_smooth(level: float) -> None:
    plan = _plan((12, 12), 50)
    values, state = _randn(2, 50, 4).double(), _randn(2, 144, 4, seed=1).double()
    velocity = lift_velocity(values, state, level, plan, "clean")
    clean = state - level * velocity
    expected = lift(gather_tokens(state, plan.anchors) - level * values, plan)
    torch.testing.assert_close(clean, expected)


def test_clean_lifter_is_exact_where_the_clean_image_is_flat() -> None:
    plan = _plan((12, 12), 50)
    noise, level = _randn(2, 144, 4), 0.8
    true_velocity = noise - 2.0
    state = (1 - level) * 2.0 + level * noise
    values = gather_tokens(true_velocity, plan.anchors)
    velocity = lift_velocity(values, state, level, plan, "clean")
    torch.testing.assert_close(velocity, true_velocity, rtol=0, atol=1e-5)
    assert (lift_velocity(values, state, level, plan, "velocity") - true_velocity).abs().max() > 1.0


def test_lift_velocity_refuses_an_unknown_lifter_and_a_clean_lift_at_level_zero() -> None:
    plan = _plan((4, 4), 5)
    values, state = _randn(2, 5, 1), _randn(2, 16, 1)
    with pytest.raises(ValueError, match='lifter must be "velocity" or "clean"'):
        lift_velocity(values, state, 0.5, plan, "no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level must be above 0"):
        lift_velocity(values, state, 0.0, plan, "clean")


def test_lift_refuses_values_that_are_not_the_plans() -> None:
    plan = _plan((4, 4), 5)
    for shape in [(2, 6, 1), (1, 5, 1), (2, 5)]:
        with pytest.raises(ValueError, match=r"values must be \(B, M, D\)"):
            lift(torch.zeros(shape), plan)


def test_make_lift_plan_refuses_anchors_off_the_grid() -> None:
    with pytest.raises(ValueError, match="check the grid"):
        make_lift_plan(torch.tensor([[0, 16]]), (4, 4))
