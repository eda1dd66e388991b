"""Runs a few cases of each campaign, different ones each day; `make campaigns` runs many."""

from __future__ import annotations

import time

import pytest

from tests.campaigns.__main__ import table
from tests.campaigns.campaign import Counts, Result, Survivor, run, seed_of_today
from tests.campaigns.runner import SHARES, campaign

SECONDS = 40.0  # for all campaigns; a single case may exceed its share


@pytest.mark.parametrize("name", SHARES)
def test_nothing_survives(name: str) -> None:
    seed = seed_of_today()
    start = time.process_time()
    result = campaign(name, seed, SECONDS * SHARES[name], start=0)
    assert result.cases > 0 and time.process_time() >= start
    assert not result.survivors, f"seed {seed}:\n" + "\n".join(result.survivors)


def test_survivor_is_reported_with_what_makes_it_again() -> None:
    def case(rng: object, counts: Counts) -> None:
        counts.operations += 1
        raise Survivor("it lives")

    result = run("operations", case, 7, iter((3, 4)), lambda: False)
    assert result.cases == 2 and result.counts.operations == 2
    assert "it lives" in result.survivors[0]
    assert "python -m tests.campaigns --only operations --seed 7 --case 3" in result.survivors[0]


def test_case_is_the_same_whenever_it_is_made() -> None:
    numbers: list[float] = []
    for _ in range(2):
        run("faults", lambda rng, counts: numbers.append(rng.random()), 7, iter((5,)), lambda: False)
    assert numbers[0] == numbers[1]


def test_table_sums_up() -> None:
    one = Result(name="a", cases=2, seconds=60.0, counts=Counts(operations=3, faults=1), survivors=["x"])
    assert table([one, one]).splitlines()[-1] == "| all | 4 | 6 | 2 | 2 | 2.0 |"
