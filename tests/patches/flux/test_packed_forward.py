"""A packed forward of FLUX.1 gives each segment the model's result for it alone."""

from __future__ import annotations

import pytest
import torch

from tests.support import tiny
from tests.support.packed import conditions, packed
from tests.support.tiny import GRID, TEXT_TOKENS, ids, relative_error, start

CASES = {
    "one": ((TEXT_TOKENS,), (GRID,)),
    "same": ((TEXT_TOKENS,) * 3, (GRID,) * 3),
    "sizes": ((TEXT_TOKENS,) * 2, ((3, 4), GRID)),
    "texts": ((3, TEXT_TOKENS, 1), (GRID,) * 3),
    "all": ((3, TEXT_TOKENS, 1), ((4, 4), (2, 9), GRID)),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_segment_gets_what_the_model_gives_it_alone(case: str) -> None:
    lengths, grids = CASES[case]
    model = tiny.transformer(num_layers=2, num_single_layers=2)
    each = conditions(lengths, torch.float32)
    states = [start(k, grid) for k, grid in enumerate(grids)]
    answers = packed(model, states, [ids(grid) for grid in grids], each)
    for answer, state, grid, condition in zip(answers, states, grids, each, strict=True):
        alone = model(hidden_states=state, img_ids=ids(grid), return_dict=False, **condition)[0]
        assert relative_error(answer, alone[0]) < 1e-5


@torch.no_grad()
def test_one_segment_gets_the_models_own_bits() -> None:
    model, each = tiny.transformer(num_layers=2, num_single_layers=2), conditions((TEXT_TOKENS,), torch.float32)
    alone = model(hidden_states=start(), img_ids=ids(), return_dict=False, **each[0])[0]
    assert torch.equal(packed(model, [start()], [ids()], each)[0], alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_good_as_the_models_own(dtype: torch.dtype) -> None:
    lengths, grids = CASES["all"]
    model = tiny.transformer(num_layers=2, num_single_layers=2).to(dtype)
    exact = tiny.transformer(num_layers=2, num_single_layers=2)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    each = conditions(lengths, dtype)
    states = [start(k, grid).to(dtype) for k, grid in enumerate(grids)]
    answers = packed(model, states, [ids(grid) for grid in grids], each)
    for answer, state, grid, condition in zip(answers, states, grids, each, strict=True):
        own = model(hidden_states=state, img_ids=ids(grid), return_dict=False, **condition)[0][0]
        doubles = {name: value.double() for name, value in condition.items()}
        truth = exact(hidden_states=state.double(), img_ids=ids(grid), return_dict=False, **doubles)[0][0]
        rms = [float((x.double() - truth).square().mean().sqrt()) for x in (answer, own)]
        assert rms[0] <= 2 * rms[1]


@torch.no_grad()
def test_nothing_passes_from_one_segment_to_another() -> None:
    lengths, grids = CASES["all"]
    model = tiny.transformer()
    each, states = conditions(lengths, torch.float32), [start(k, grid) for k, grid in enumerate(grids)]
    image_ids = [ids(grid) for grid in grids]
    before = packed(model, states, image_ids, each)
    states[1] = states[1].fill_(float("nan"))
    after = packed(model, states, image_ids, each)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2]) and after[1].isnan().all()


def test_gradients_reach_the_weights() -> None:
    model = tiny.transformer()
    answer = packed(model, [start()], [ids()], conditions((TEXT_TOKENS,), torch.float32))[0]
    answer.square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
