"""Several processes make one picture: the result of one process, or the same refusal on every rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from jitaccel import ConfigError
from jitaccel.generation.ranks import ALONE, begun_alike, eight_bytes
from jitaccel.patches import ranks as of_models
from jitaccel.patches.cutting import Adapter, Cut, rows
from jitaccel.patches.flux.kinds import token_multiple
from tests.support import ranks, tiny

CASES = (
    "subset",
    "subset, dpmpp_2m",
    "subset, true CFG",
    "subset, batch of two",
    "pooled",
    "pooled, true CFG, batch of two",
    "dense",
    "preset 7x",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has made."""
    return ranks.finished("pictures", tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has said."""
    return ranks.finished("refusals", tmp_path_factory.mktemp("refusals"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_picture_of_two_ranks_is_that_of_one_process(pictures: list[Any], mode: str, name: str) -> None:
    first, second = (found[mode, name] for found in pictures)
    assert torch.equal(first["divided"], second["divided"])
    assert torch.equal(first["alone"], second["alone"])
    assert first["divided"].isfinite().all()
    assert tiny.relative_error(first["divided"], first["alone"]) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(first["anchors"], second["anchors"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_each_rank_has_half_of_the_tokens_and_says_so(pictures: list[Any], mode: str, name: str) -> None:
    found = pictures[0][mode, name]
    assert found["tokens"] == found["tokens alone"]
    assert all(count % 2 == 0 for count in found["tokens"])
    assert found["rank_tokens"] == tuple(count // 2 for count in found["tokens"])
    branches = zip(found["rank_tokens"], found["calls"], strict=True)
    assert sum(found["seen"]) == len(found["divided"]) * sum(tokens * calls for tokens, calls in branches)
    assert found["ranks"] == (1, 2)
    alone, divided = found["text"]
    assert "ranks" not in alone and f"2 ranks: image tokens a rank {found['rank_tokens'][0]}" in divided


@pytest.mark.slow
def test_images_of_a_batch_have_anchors_of_their_own_on_ranks(pictures: list[Any]) -> None:
    anchors = pictures[0]["ulysses", "subset, batch of two"]["anchors"]
    assert any(not torch.equal(of_stage[0], of_stage[1]) for of_stage in anchors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("order", "ConfigError: jitaccel: apply must be called after enable_parallelism"),
        ("order, again", "ConfigError: jitaccel: apply must be called after enable_parallelism"),
        ("noise", "ConfigError: jitaccel: ranks must start from the same noise"),
        ("noise of one image", "ConfigError: jitaccel: ranks must start from the same noise"),
        ("settings", "got others on rank 1 than on rank 0"),
        ("pooled size", "a picture pooled by 2 must have a multiple of 2 tokens"),
        ("size", "the picture must have a multiple of 2 tokens, one part for each rank, got 121 (11x11)"),
        ("prompt", "prompts must have a multiple of 2 tokens, one part for each rank, got 7"),
        ("heads", "heads that ulysses_degree divides, got 3 heads and 2 ranks"),
        ("auto", "give every rank the same preset"),
        ("residuals", "controlnet_block_samples with context parallelism"),
    ],
)
def test_every_rank_says_the_same_of_what_is_refused(refusals: list[Any], name: str, says: str) -> None:
    first, second = (found[name] for found in refusals)
    assert says in first and first == second


@pytest.mark.slow
def test_rank_that_refuses_alone_tells_the_others(refusals: list[Any]) -> None:
    first, second = (found["one rank"] for found in refusals)
    assert "got an error on rank 1; see its message there" in first
    assert 'noise must be "fresh"' in second


@pytest.mark.slow
@pytest.mark.parametrize("name", ["applied again", "same noise", "at the end"])
def test_ranks_make_the_picture_after_a_refusal(refusals: list[Any], name: str) -> None:
    first, second = (found[f"picture, {name}"] for found in refusals)
    assert torch.equal(first, second)
    assert tiny.relative_error(first, refusals[0]["alone"]) < 1e-5


@pytest.mark.slow
def test_rank_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    other, failed = ranks.start("fault", tmp_path)
    assert failed.code == 1 and "ArithmeticError: the third forward fails here" in failed.output
    assert other.code == 1 and "ArithmeticError" not in other.output and "Error" in other.output
    assert other.seconds - failed.seconds < ranks.GROUP_S


def test_one_process_exchanges_nothing() -> None:
    def number(made: str) -> int:
        raise AssertionError("nobody to tell")

    assert begun_alike(ALONE, torch.device("cpu"), lambda: "made", number) == "made"


def test_number_of_eight_bytes_tells_values_apart_and_is_never_that_of_a_refusal() -> None:
    values = [(), (1,), (1, 2), ((1, 2),), ("1",), (1.0,)]
    numbers = [eight_bytes(*each) for each in values]
    assert numbers == [eight_bytes(*each) for each in values]
    assert len(set(numbers)) == len(values) and all(0 < number < 2**63 for number in numbers)


def _parallel(degree: int, heads: int = 24, **settings: Any) -> Any:
    """A model as `enable_parallelism` leaves it, as far as it is read."""
    mesh = SimpleNamespace(size=lambda: degree, get_group=lambda: "group")
    given = SimpleNamespace(ulysses_degree=degree, _flattened_mesh=mesh, **settings)
    return SimpleNamespace(
        _parallel_config=SimpleNamespace(context_parallel_config=given),
        config=SimpleNamespace(num_attention_heads=heads),
    )


def test_numbers_of_anchors_are_multiples_of_the_ranks_unless_they_may_differ() -> None:
    assert token_multiple(_parallel(4)) == 4
    assert token_multiple(_parallel(4, ulysses_anything=True)) == 1
    assert token_multiple(_parallel(4, ring_anything=True)) == 1
    assert token_multiple(nn.Linear(1, 1)) == 1
    nunchaku = type("NunchakuModel", (SimpleNamespace,), {})(**vars(_parallel(6)))
    assert token_multiple(nunchaku) == 768
    tensor_parallel = SimpleNamespace(_parallel_config=SimpleNamespace(context_parallel_config=None))
    assert token_multiple(tensor_parallel) == 1 and of_models.ranks_of(tensor_parallel) is ALONE
    assert of_models.ranks_of(_parallel(4)).size == 4


def test_models_that_ranks_cannot_run_are_refused_with_the_reason() -> None:
    assert of_models.rank_problems(_parallel(4), is_known=True) == []
    assert of_models.rank_problems(nn.Linear(1, 1), is_known=False) == []
    assert "context parallel" in of_models.rank_problems(_parallel(4), is_known=False)[0]
    assert "24 heads and 5 ranks" in of_models.rank_problems(_parallel(5), is_known=True)[0]
    assert of_models.rank_problems(_parallel(5, ulysses_anything=True), is_known=True) == []


def test_tokens_that_ranks_cannot_divide_are_named_all_at_once() -> None:
    def grid() -> tuple[int, int]:
        return 5, 5

    with pytest.raises(ConfigError) as raised:
        of_models.check_divided(4, tiny.SHORT, grid, 25, 7, 3)
    message = str(raised.value)
    assert "got 25 (5x5)" in message and "4x5 or 8x5" in message
    assert "prompts must have a multiple of 4 tokens" in message and "references must have" in message
    of_models.check_divided(4, tiny.SHORT, grid, 24, 8, 0)
    of_models.check_divided(1, tiny.SHORT, grid, 25, 7, 3)


def test_only_hooks_that_divide_tokens_outside_ours_are_the_wrong_order() -> None:
    module, ours = nn.Linear(1, 1), ModelHook()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(ModelHook(), "cp_input---")
    registry.register_hook(ours, "jitaccel")
    registry.register_hook(ModelHook(), "offloading")
    of_models.check_order(module, ours)
    of_models.check_order(nn.Linear(1, 1), ours)
    registry.register_hook(ModelHook(), "cp_input---proj")
    with pytest.raises(ConfigError, match=r"call jitaccel.apply again now"):
        of_models.check_order(module, ours)


def test_model_that_is_cut_refuses_ranks_that_come_after_the_patch() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    cut = Cut(model, Adapter(outputs={"0": rows()}))
    with cut.at(None):
        pass
    model._parallel_config = _parallel(2)._parallel_config
    with pytest.raises(ConfigError, match="apply must be called after enable_parallelism"), cut.at(None):
        pass
