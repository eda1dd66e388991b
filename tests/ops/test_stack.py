"""Stacks of frames: every operator works within each frame of (t, h, w), in C++ and in the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from jitaccel import ops
from jitaccel.ops.schema import num_tokens_of
from tests.support.operators import WRITTEN, Fields, call, compiled, fields, plain

NAMES = ["nearest_anchor", "lift", "importance", "micro_flow_into"]
GRIDS = [(1, 5, 7), (3, 5, 7), (4, 1, 9), (2, 9, 1), (5, 1, 1), (2, 1, 13), (3, 8, 6)]
PER_FRAME = ("state", "previous", "velocity", "noise", "values", "importance")


def frames(grid: tuple[int, ...], count: int, batch: int = 2, channels: int = 5, seed: int = 0) -> Fields:
    """Returns fields with `count` anchors and, if possible, as many activated tokens in each frame."""
    f = fields(grid, count * grid[0], channels, batch, seed=seed)
    generator, size = torch.Generator().manual_seed(seed), num_tokens_of(grid[1:])
    more = min(count, size - count)
    rows = [
        [torch.randperm(size, generator=generator) + frame * size for frame in range(grid[0])] for _ in range(batch)
    ]
    anchors = _sorted([torch.cat([order[:count] for order in row]) for row in rows], count * grid[0])
    tokens = _sorted([torch.cat([order[count : count + more] for order in row]) for row in rows], more * grid[0])
    nearest = plain("nearest_anchor")(anchors, grid, stack=True)
    return Fields(**{**vars(f), "anchors": anchors, "tokens": tokens, "nearest": nearest})


def _sorted(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack(rows).sort(dim=1).values if rows else torch.zeros(0, width, dtype=torch.int64)


def arguments(name: str, f: Fields) -> tuple[Any, ...]:
    """Returns one call of an operator in stack mode."""
    plan = (f.nearest, f.anchors, f.grid, f.weights)
    moved = (f.state.clone(), f.previous, f.velocity, f.noise, f.tokens, *plan, f.levels, 0.25)
    calls = {
        "nearest_anchor": (f.anchors, f.grid),
        "lift": (f.values, *plan),
        "importance": (f.velocity, f.grid, 3),
        "micro_flow_into": moved,
    }
    return (*calls[name], True)


def apart(f: Fields) -> Fields:
    """Returns the frames as images of a batch, each with the same number of anchors and activated tokens."""
    number, size = f.grid[0], num_tokens_of(f.grid[1:])
    batch = len(f.state) * number
    split = {name: getattr(f, name).unflatten(1, (number, -1)).flatten(0, 1) for name in PER_FRAME}
    rows = {name: getattr(f, name).reshape(batch, -1) % size for name in ("anchors", "tokens")}
    nearest = f.nearest.reshape(batch, -1) % rows["anchors"].shape[1]
    return Fields(**{**vars(f), **split, **rows, "nearest": nearest, "grid": f.grid[1:]})


@pytest.mark.parametrize("which", [compiled, plain])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_frames_of_a_stack_are_images_of_their_own(name: str, grid: tuple[int, ...], which: Any) -> None:
    f = frames(grid, max(1, num_tokens_of(grid[1:]) // 3))
    together = call(which(name), name, arguments(name, f))
    alone = call(which(name), name, arguments(name, apart(f)))
    if name == "nearest_anchor":
        count = f.anchors.shape[1] // grid[0]
        alone = (alone.view(2, grid[0], -1) + count * torch.arange(grid[0])[:, None]).flatten(1)
        assert torch.equal(together, alone)
    torch.testing.assert_close(together, alone.reshape(together.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_stack_equals_its_reference(name: str, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    f = uneven(grid)
    kept = ("weights", "levels", "importance")
    f = Fields(**{n: x.to(dtype) if n not in kept and _is_float(x) else x for n, x in vars(f).items()})
    actual, expected = (call(which(name), name, arguments(name, f)) for which in (compiled, plain))
    tolerance = 2 * torch.finfo(dtype).eps if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def uneven(grid: tuple[int, ...], seed: int = 3) -> Fields:
    """Returns fields with different numbers of anchors in each frame, at least one."""
    number, size = grid[0], num_tokens_of(grid[1:])
    f = fields(grid, max(number, num_tokens_of(grid) // 3), batch=2, seed=seed)
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        one = torch.arange(number) * size + torch.randint(size, (number,), generator=generator)
        others = torch.randperm(num_tokens_of(grid), generator=generator)
        others = others[~torch.isin(others, one)][: f.anchors.shape[1] - number]
        rows.append(torch.cat([one, others]).sort().values)
    anchors = torch.stack(rows)
    is_anchor = torch.zeros(2, num_tokens_of(grid), dtype=torch.bool).scatter(1, anchors, True)
    tokens = torch.stack([(~row).nonzero().squeeze(1)[::2] for row in is_anchor])
    nearest = plain("nearest_anchor")(anchors, grid, stack=True)
    return Fields(**{**vars(f), "anchors": anchors, "tokens": tokens, "nearest": nearest})


@pytest.mark.parametrize("which", [compiled, plain])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_anchor_of_a_stack_equals_brute_force(grid: tuple[int, ...], which: Any) -> None:
    f = uneven(grid)
    places = list(itertools.product(*(range(size) for size in grid)))
    found = which("nearest_anchor")(f.anchors, grid, True)
    for image in range(2):
        row = f.anchors[image].tolist()
        for n, (t, y, x) in enumerate(places):
            own = [i for i, a in enumerate(row) if places[a][0] == t]
            expected = min(own, key=lambda i: ((places[row[i]][1] - y) ** 2 + (places[row[i]][2] - x) ** 2, row[i]))
            assert int(found[image, n]) == expected


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_frame_reaches_another(name: str) -> None:
    grid, size = (3, 6, 5), 30
    f = uneven(grid)
    if name == "nearest_anchor":
        frame = f.anchors.gather(1, compiled(name)(f.anchors, grid, True)) // size
        assert torch.equal(frame, (torch.arange(90) // size).expand(2, -1))
        return
    before = call(compiled(name), name, arguments(name, f))
    middle = torch.zeros(90, dtype=torch.bool)
    middle[size : 2 * size] = True
    whole = {name: getattr(f, name) for name in ("velocity", "previous", "noise")}
    changed = {name: torch.where(middle[:, None], x + 9.0, x) for name, x in whole.items()}
    values = torch.where((f.anchors // size == 1)[..., None], f.values + 9.0, f.values)
    after = call(compiled(name), name, arguments(name, Fields(**{**vars(f), **changed, "values": values})))
    assert torch.equal(before[:, ~middle], after[:, ~middle]) and not torch.equal(before[:, middle], after[:, middle])


@pytest.mark.parametrize("name", NAMES)
def test_stack_of_a_picture_is_the_picture(name: str) -> None:
    f = fields((5, 7))
    together = call(compiled(name), name, arguments(name, f))
    assert torch.equal(together, call(compiled(name), name, arguments(name, f)[:-1]))


@pytest.mark.parametrize("name", NAMES)
def test_stack_passes_opcheck_and_compiles_whole(name: str) -> None:
    f = uneven((3, 5, 4))
    torch.library.opcheck(compiled(name), arguments(name, f))
    function = getattr(ops, name)
    torch._dynamo.reset()
    graph = torch.compile(lambda *given: function(*given), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(graph, name, arguments(name, f)), call(function, name, arguments(name, f)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "channels"), [(0, 4), (1, 0)])
def test_stack_takes_an_empty_batch_and_no_channels(name: str, batch: int, channels: int) -> None:
    f = frames((3, 4, 5), 6, batch=batch, channels=channels)
    actual, expected = (call(which(name), name, arguments(name, f)) for which in (compiled, plain))
    assert actual.shape == expected.shape and torch.equal(actual.isnan(), expected.isnan())
    assert name in WRITTEN or actual.dtype == expected.dtype


@pytest.mark.parametrize("which", [ops.nearest_anchor, compiled("nearest_anchor"), plain("nearest_anchor")])
def test_frame_without_an_anchor_is_refused(which: Any) -> None:
    anchors = torch.tensor([[0, 7, 12], [0, 1, 13]])
    with pytest.raises((RuntimeError, ValueError), match="every frame, got none in frame 1 of image 1; take"):
        which(anchors, (3, 2, 3), True)
    with pytest.raises((RuntimeError, ValueError), match="at least one token of every frame, got"):
        which(anchors[:, :2], (3, 2, 3), True)
    which(anchors, (3, 2, 3), False)
