"""SGLang's own FLUX.1 on two processes: the result of one process, or the same refusal on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ranks, sglang_ranks, tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has made."""
    return ranks.finished("sglang", tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has said."""
    return ranks.finished("sglang_refusals", tmp_path_factory.mktemp("sglang_refusals"))


@pytest.mark.parametrize("name", sglang_ranks.CASES)
def test_picture_of_two_ranks_is_that_of_one_process(pictures: list[Any], name: str) -> None:
    first, second = (found[name] for found in pictures)
    assert torch.equal(first["divided"], second["divided"])
    assert first["divided"].isfinite().all()
    assert tiny.relative_error(first["divided"], first["alone"]) < 1e-5


@pytest.mark.parametrize("name", sglang_ranks.CASES)
def test_each_rank_has_its_part_of_the_tokens_and_of_the_state(pictures: list[Any], name: str) -> None:
    for found in (each[name] for each in pictures):
        assert set(found["tokens"]) == {count // found["ranks"] for count in found["counts"]}
        assert set(found["parts"]) == {tiny.NUM_TOKENS // found["ranks"]}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "size",
            "UnsupportedModelError: jitaccel: the picture must have a multiple of 2 tokens, one part for each rank",
        ),
        ("pooled size", "a picture pooled by 2 must have a multiple of 2 tokens"),
        ("settings", "ConfigError: jitaccel: ranks must start from the same noise, with the same settings"),
        ("one rank", "got others on rank 1 than on rank 0"),
        ("noise", "ConfigError: jitaccel: ranks must start from the same noise"),
        ("not finite", "NonFiniteVelocityError: "),
    ],
)
def test_every_rank_says_the_same_of_what_is_refused(refusals: list[Any], name: str, says: str) -> None:
    first, second = (found[name] for found in refusals)
    assert says in first and first == second
    assert name == "not finite" or all(found[f"forwards, {name}"] == 0 for found in refusals)


def test_rank_that_cannot_begin_tells_the_others(refusals: list[Any]) -> None:
    first, second = (found["one rank fails"] for found in refusals)
    assert "got an error on rank 1; see its message there" in first and "has no attribute 'rollout'" in second


def test_size_that_ranks_cannot_divide_runs_dense(refusals: list[Any]) -> None:
    first, second = (found["dense, odd size"] for found in refusals)
    assert torch.equal(first, second) and first.shape[1] == 121
    assert refusals[0]["forwards, dense"] == 6  # the request's own number of steps


def test_ranks_make_the_picture_after_what_was_refused_or_failed(pictures: list[Any], refusals: list[Any]) -> None:
    assert all(torch.equal(found["picture"], pictures[0]["subset"]["divided"]) for found in refusals)


def test_rank_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    other, failed = ranks.start("sglang_fault", tmp_path)
    assert failed.code == 1 and "ArithmeticError: the third forward fails here" in failed.output
    assert other.code == 1 and "ArithmeticError" not in other.output and "Error" in other.output
    assert other.seconds - failed.seconds < ranks.GROUP_S


def test_rank_that_raises_and_lives_on_leaves_the_others_waiting_no_longer_than_their_group_allows(
    tmp_path: Path,
) -> None:
    other, failed = ranks.finished("sglang_survivor", tmp_path)
    assert failed["said"] == "ArithmeticError: the third forward fails here"
    assert "Timed out" in other["said"]
    assert other["seconds"] - failed["seconds"] < 2 * sglang_ranks.GROUP_S
