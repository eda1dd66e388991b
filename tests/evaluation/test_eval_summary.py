"""Summaries of the rows of `jitaccel eval`."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from jitaccel.evaluation.quality.metrics import frechet_distance
from jitaccel.evaluation.quality.rows import by_method, control_of, method_kind
from jitaccel.evaluation.quality.statistics import mean_of, share_of
from jitaccel.evaluation.quality.summary import summary
from tests.support.eval_rows import DEFAULT, default_rows, row


def test_summary_equals_direct_computations() -> None:
    rows = default_rows()
    rows += [row("unused", 0)]
    data = np.random.default_rng(1).standard_normal((30, 4))
    records = {record["method"]: record for record in summary(rows[::-1], DEFAULT, data=data)}
    assert [*records] == DEFAULT
    own = [each for each in rows if each["method"] == "7x"]
    reference = [each for each in rows if each["method"] == "dense:50"]
    seven = records["7x"]
    assert seven["cost_dense_steps"] == pytest.approx(6.5) and seven["gflop"] == pytest.approx(71.5)
    assert (seven["steps"], seven["prompts"], seven["reference"], seven["kind"]) == (11, 6, "dense:50", "sparse")
    assert (seven["token_steps"], seven["seconds"], seven["config"]) == (100, 0.5, own[0]["config"])
    assert (seven["seed"], seven["commit"], seven["device"]) == (3, "abc", "a device")
    assert not {"date", "prompt", "prompt_index", "shown", "features"} & seven.keys()  # they differ between rows
    shown = share_of(np.array([each["shown"] for each in own]), np.full(6, 5))
    psnr = mean_of(np.array([each["psnr_db"] for each in own]))
    for name, expected in (("attributes", shown), ("psnr_db", psnr)):
        assert seven["qualities"][name] == {"value": expected.value, "low": expected.low, "high": expected.high}
    features = [np.array([each["features"] for each in some]) for some in (own, reference)]
    assert seven["qualities"]["frechet"]["value"] == pytest.approx(frechet_distance(*features))
    assert seven["qualities"]["frechet_to_data"]["value"] == pytest.approx(frechet_distance(features[0], data))
    assert seven["qualities"].keys() == {"attributes", "psnr_db", "perceptual", "frechet", "frechet_to_data"}
    assert records["dense:50"]["qualities"].keys() == {"attributes", "frechet_to_data"}
    assert json.loads(json.dumps(seven, allow_nan=False)) == seven


def test_frechet_distance_to_the_reference_is_resampled_prompt_by_prompt() -> None:
    rows = [row(name, k) for name in ("dense:50", "7x") for k in range(6)]
    for each in rows:
        each["features"] = row("the same", each["prompt_index"])["features"]
    found = summary(rows, ["dense:50", "7x"])[1]["qualities"]["frechet"]
    assert found == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9)


def test_summary_takes_the_qualities_that_are_there() -> None:
    rows = [
        {"method": name, "steps": 4, "prompt_index": k, "gflop": 1.0, "imagereward": 0.1 * k, "odd": 0.5, "load_s": 1.5}
        for name in ("dense:4", "other")
        for k in range(3)
    ]
    rows[4]["odd"] = None
    rows[5]["imagereward"] = math.inf
    first, other = summary(rows, ["dense:4", "other"])
    assert first["qualities"].keys() == {"imagereward", "odd"} and first["seconds"] is None
    assert first["qualities"]["imagereward"]["value"] == pytest.approx(0.1)
    assert other["qualities"] == {"odd": {"value": 0.5, "low": 0.5, "high": 0.5}}  # infinite somewhere: left out


@pytest.mark.parametrize(
    ("rows", "methods", "words"),
    [
        ([row("dense:50", 0)], ["dense:50"], "summary: rows must hold 2 prompts or more, got 1"),
        ([row("dense:50", k) for k in (0, 1)], ["dense:50", "7x"], "got none of 7x; there are dense:50"),
        ([row("dense:50", 0), row("dense:50", 1), row("7x", 1)], ["dense:50", "7x"], r"got others of 7x \(\[0\]\)"),
        ([row("dense:50", k) for k in (0, 1, 1)], ["dense:50"], "got some of dense:50 twice"),
        ([row("dense:50", k) for k in (0, 1)], ["dense:50"] * 2, "methods must all be different"),
        ([], [], "methods must name at least one"),
    ],
)
def test_summary_says_what_is_wrong_with_rows(rows: list[Any], methods: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        summary(rows, methods)


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)none of 4x.*2 prompts.*some of dense:50 twice"):
        by_method([row("dense:50", 0)] * 2, ["dense:50", "4x"], asker="here")


def test_kinds_and_controls_of_methods() -> None:
    rows = default_rows(2)
    of = by_method(rows, DEFAULT, asker="test")
    kinds = {name: method_kind(some[0]) for name, some in of.items()}
    assert {name for name in kinds if kinds[name] == "sparse"} == {"7x", "4x"}
    assert {name for name in kinds if kinds[name] == "rival"} == {"half", "cache"}
    assert all(kinds[name] == "dense-beta" for name in kinds if name.startswith("beta"))
    assert all(kinds[name] == "dense-native" for name in kinds if name.startswith("dense"))
    assert method_kind(row("half", 0, config={"rival": "half", "densities": [1.0]})) == "rival"
    assert method_kind({"method": "dense"}) == "dense-native" and method_kind({"method": "unheard of"}) == "rival"
    assert control_of("7x", of) in ("beta:6", "beta:7") and control_of("4x", of) == "beta:11"
    assert control_of("7x", {name: of[name] for name in ("dense:50", "7x", "dense:7")}) == "dense:7"
    assert control_of("7x", {"7x": of["7x"]}) is None


def test_control_takes_the_steps_of_the_same_solver() -> None:
    solved = {"densities": [1.0], "schedule": "beta", "solver": "dpmpp_2m"}
    rows = [row("beta:6", 0), row("dpm:6", 0, config=solved), row("7x", 0)]
    fast = row("fast", 0, config={"densities": [0.3, 1.0], "schedule": "beta", "solver": "dpmpp_2m"}, gflop=66.0)
    of = {each["method"]: [each] for each in (*rows, fast)}
    assert method_kind(rows[1]) == method_kind({"method": "mine", "config": solved}) == "dense-dpm"
    assert control_of("7x", of) == "beta:6" and control_of("fast", of) == "dpm:6"
    assert control_of("fast", {name: of[name] for name in ("beta:6", "fast")}) == "beta:6"
