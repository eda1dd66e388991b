"""Models other than FLUX.1 on several processes: the result of one process, or the same refusal on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import divided, ranks, tiny

pytestmark = pytest.mark.slow
PAIRS = [(mode, case) for case in divided.CASES for mode in divided.modes_of(case)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has made."""
    return ranks.finished("models", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has said."""
    return ranks.finished("model_refusals", tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize(("mode", "case"), PAIRS)
def test_picture_of_two_ranks_is_that_of_one_process(pictures: list[Any], mode: str, case: str) -> None:
    first, second = (found[mode, case] for found in pictures)
    assert torch.equal(first["divided"], second["divided"])
    assert first["divided"].isfinite().all()
    assert tiny.relative_error(first["divided"], first["alone"]) < 1e-5


@pytest.mark.parametrize(("mode", "case"), PAIRS)
def test_each_rank_has_half_of_the_tokens_and_says_so(pictures: list[Any], mode: str, case: str) -> None:
    found = pictures[0][mode, case]
    assert found["tokens"] == found["tokens alone"] and found["ranks"] == 2
    assert found["rank_tokens"] == tuple(count // 2 for count in found["tokens"])
    assert all(count % 2 == 0 for count in found["tokens"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("order, wan", "ConfigError: jitaccel: apply must be called after enable_parallelism"),
        ("order, qwen", "ConfigError: jitaccel: apply must be called after enable_parallelism"),
        ("prompt, qwen", "prompts must have a multiple of 2 tokens, one part for each rank, got 7"),
        ("untested, ltx", "got a parallel configuration; it is tested for FluxTransformer2DModel"),
        ("size, wan", "the picture must have a multiple of 2 tokens, one part for each rank, got 75 (3x5x5)"),
        ("noise, wan", "ConfigError: jitaccel: ranks must start from the same noise"),
        ("no plan, vace", "`cp_plan` must be provided"),
        ("untested, vace", "got a parallel configuration; it is tested for FluxTransformer2DModel"),
    ],
)
def test_every_rank_says_the_same_of_what_is_refused(refusals: list[Any], name: str, says: str) -> None:
    first, second = (found[name] for found in refusals)
    assert says in first and first == second


def test_ranks_make_the_picture_after_a_refusal(refusals: list[Any]) -> None:
    first, second = (found["picture, applied again"] for found in refusals)
    assert torch.equal(first, second) and first.isfinite().all()


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has made after both have failed."""
    return ranks.finished("model_faults", tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", divided.MAKERS)
def test_ranks_that_failed_together_make_the_next_picture(faults: list[Any], name: str) -> None:
    first, second = (found[name] for found in faults)
    assert first["said"] == second["said"] == "ArithmeticError: the third forward fails here"
    assert torch.equal(first["after"], first["expected"]) and torch.equal(second["after"], first["expected"])


@pytest.mark.parametrize("name", divided.MAKERS)
def test_rank_that_dies_in_a_step_ends_the_others_with_an_error(tmp_path: Path, name: str) -> None:
    other, failed = ranks.start(f"fault, {name}", tmp_path)
    assert failed.code == 1 and "ArithmeticError: the third forward fails here" in failed.output
    assert other.code == 1 and "ArithmeticError" not in other.output and "Error" in other.output
    assert other.seconds - failed.seconds < ranks.GROUP_S


def test_rank_that_raises_and_lives_on_leaves_the_others_waiting_no_longer_than_their_group_allows(
    tmp_path: Path,
) -> None:
    other, failed = ranks.finished("model_survivor", tmp_path)
    assert failed["said"] == "ArithmeticError: the third forward fails here"
    assert "imed out" in other["said"]
    assert other["seconds"] - failed["seconds"] < 2 * divided.SURVIVED_S
