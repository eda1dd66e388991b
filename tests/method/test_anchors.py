"""First anchors, activation by importance, and indexing by anchors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jitaccel.errors import NonFiniteVelocityError
from jitaccel.method.anchors import activate, first_anchors, merge_anchors
from jitaccel.method.lift import make_lift_plan
from jitaccel.tokens import gather_tokens, put_tokens_, scatter_tokens


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _is_regular(token: int, height: int, width: int) -> bool:
    row, column = divmod(token, width)
    return (row % 2 == 0 and column % 2 == 0) or row in (0, height - 1) or column in (0, width - 1)


def _anchors(batch: int, num_tokens: int, count: int, seed: int = 0) -> Tensor:
    generator = _generator(seed)
    rows = [torch.randperm(num_tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


@pytest.mark.parametrize(("grid", "regular"), [((64, 64), 1213), ((32, 32), 349)])
def test_first_anchors_are_every_second_row_and_column_and_the_border(
    grid: tuple[int, int], regular: int
) -> None:
    anchors = first_anchors(grid, regular)  # no generator: nothing is drawn
    assert anchors.dtype == torch.int64
    assert anchors.tolist() == [t for t in range(grid[0] * grid[1]) if _is_regular(t, *grid)]


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99))
def test_first_anchors_are_as_many_as_asked_sorted_and_regular_first(
    height: int, width: int, data: st.DataObject, seed: int
) -> None:
    count = data.draw(st.integers(1, height * width))
    anchors = first_anchors((height, width), count, _generator(seed)).tolist()
    regular = {token for token in range(height * width) if _is_regular(token, height, width)}
    assert len(anchors) == count
    assert anchors == sorted(set(anchors))
    assert anchors[0] >= 0 and anchors[-1] < height * width
    assert set(anchors) <= regular or regular <= set(anchors)


def test_first_anchors_follow_the_generator_alone() -> None:
    for count in (200, 500):  # some dropped, some added
        state = torch.get_rng_state()
        first = first_anchors((32, 32), count, _generator(1))
        torch.rand(3)
        torch.set_rng_state(state)
        assert torch.equal(first, first_anchors((32, 32), count, _generator(1)))
        assert not torch.equal(first, first_anchors((32, 32), count, _generator(2)))


def test_first_anchors_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first_anchors((32, 32), 200, _generator())
    first_anchors((32, 32), 500, _generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [200, 500])
def test_first_anchors_need_a_generator_to_draw(count: int) -> None:
    with pytest.raises(ValueError, match="generator must be given"):
        first_anchors((32, 32), count)


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_first_anchors_refuse_an_impossible_count(count: int) -> None:
    with pytest.raises(ValueError, match=r"count must be in 1\.\.1024"):
        first_anchors((32, 32), count, _generator())


def test_activate_takes_the_most_important_inactive_tokens_of_each_image() -> None:
    importance = torch.tensor([[9.0, 1.0, 8.0, 3.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    anchors = torch.tensor([[0], [4]])
    assert activate(importance, anchors, 2).tolist() == [[2, 3], [2, 3]]
    assert activate(importance, anchors, 1).tolist() == [[2], [3]]
    assert activate(importance, anchors, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(1, 60), data=st.data(), seed=st.integers(0, 99))
def test_activate_nests_with_exact_sizes(num_tokens: int, data: st.DataObject, seed: int) -> None:
    active = data.draw(st.integers(1, num_tokens))
    count = data.draw(st.integers(0, num_tokens - active))
    importance = torch.rand(3, num_tokens, generator=_generator(seed)).mul(4).round()  # many ties
    anchors = _anchors(3, num_tokens, active, seed)
    activated = activate(importance, anchors, count)
    merged = merge_anchors(anchors, activated)
    assert merged.shape == (3, active + count)
    for image in range(3):
        old, new = set(anchors[image].tolist()), activated[image].tolist()
        inactive = [token for token in range(num_tokens) if token not in old]
        best = sorted(inactive, key=lambda token: (-float(importance[image, token]), token))[:count]
        assert new == sorted(best)
        assert merged[image].tolist() == sorted(old | set(new))


def test_activate_breaks_ties_by_lowest_raster_index() -> None:
    importance = torch.zeros(1, 1000)
    anchors = torch.arange(0, 1000, 2)[None]
    assert activate(importance, anchors, 300).tolist() == [list(range(1, 600, 2))]


def test_activate_of_a_batch_equals_activate_of_each_image() -> None:
    importance, anchors = torch.rand(4, 50, generator=_generator()), _anchors(4, 50, 10)
    alone = [activate(importance[i : i + 1], anchors[i : i + 1], 15) for i in range(4)]
    assert torch.equal(activate(importance, anchors, 15), torch.cat(alone))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activate_refuses_importance_that_is_not_finite(value: float) -> None:
    importance = torch.ones(2, 6)
    importance[1, 3] = value
    with pytest.raises(NonFiniteVelocityError, match=r"images \[1\]"):
        activate(importance, torch.tensor([[0], [3]]), 2)


@pytest.mark.parametrize("count", [-1, 5])
def test_activate_refuses_an_impossible_count(count: int) -> None:
    with pytest.raises(ValueError, match=r"count must be in 0\.\.4"):
        activate(torch.ones(1, 5), torch.tensor([[0]]), count)


def test_activate_refuses_anchors_of_another_batch() -> None:
    with pytest.raises(ValueError, match="each image its own row"):
        activate(torch.ones(2, 5), torch.tensor([[0]]), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
def test_gather_tokens_picks_each_images_own(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    x = torch.randint(0, 100, (3, 20, *trailing), generator=_generator()).to(dtype)
    anchors = _anchors(3, 20, 7)
    gathered = gather_tokens(x, anchors)
    assert gathered.dtype == dtype
    for image in range(3):
        assert torch.equal(gathered[image], x[image, anchors[image]])


def test_gather_tokens_reads_a_transposed_tensor() -> None:
    x = torch.rand(5, 3, 20, generator=_generator()).permute(1, 2, 0)
    anchors = _anchors(3, 20, 7)
    assert torch.equal(gather_tokens(x, anchors), gather_tokens(x.contiguous(), anchors))


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 20), data=st.data())
def test_scatter_tokens_undoes_gather_tokens_and_is_zero_elsewhere(
    num_tokens: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_tokens))
    anchors = _anchors(2, num_tokens, count)
    values = torch.rand(2, count, 3, generator=_generator()) + 1.0
    scattered = scatter_tokens(values, anchors, num_tokens)
    assert torch.equal(gather_tokens(scattered, anchors), values)
    assert int((scattered != 0).sum()) == values.numel()


def test_put_tokens_writes_in_place_and_only_at_the_anchors() -> None:
    x, anchors = torch.rand(2, 9, 3, generator=_generator()), _anchors(2, 9, 4)
    before = x.clone()
    assert put_tokens_(x, torch.full((2, 4, 3), 7.0), anchors) is x
    written = scatter_tokens(torch.ones(2, 4, 3), anchors, 9).bool()
    assert torch.equal(x, torch.where(written, torch.tensor(7.0), before))


@pytest.mark.parametrize(
    "anchors",
    [
        torch.tensor([0, 1]),
        torch.tensor([[0.0, 1.0]]),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([[1, 0]]),
        torch.tensor([[1, 1]]),
        torch.tensor([[-1, 1]]),
        torch.tensor([[0, 9]]),
        torch.tensor([[0, 1], [3, 2]]),
    ],
)
def test_make_lift_plan_refuses_what_is_no_sorted_set_of_tokens(anchors: Tensor) -> None:
    with pytest.raises(ValueError, match="make_lift_plan: anchors must"):
        make_lift_plan(anchors, (3, 3))
