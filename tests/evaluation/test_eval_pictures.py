"""The Pareto picture, the contact sheet and the records of `jitaccel eval`, on made rows."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from jitaccel.evaluation.eval_pictures import known_qualities, write_pictures  # noqa: E402
from jitaccel.evaluation.quality.choice import columns_of, sections  # noqa: E402
from jitaccel.evaluation.quality.contact import contact_sheet  # noqa: E402
from jitaccel.evaluation.quality.drawing import COLOURS, PAPER, Scale, cut, text_width, wrap  # noqa: E402
from jitaccel.evaluation.quality.labels import Box, place_labels  # noqa: E402
from jitaccel.evaluation.quality.metrics import frechet_distance  # noqa: E402
from jitaccel.evaluation.quality.pareto import Panel, arrange, front, pareto_picture  # noqa: E402
from jitaccel.evaluation.quality.rows import QUALITIES, by_method, control_of, method_kind, quality_of  # noqa: E402
from jitaccel.evaluation.quality.scorers import Scorer  # noqa: E402
from jitaccel.evaluation.quality.statistics import mean_of, share_of  # noqa: E402
from jitaccel.evaluation.quality.summary import summary  # noqa: E402

DEFAULT = [
    "dense:50", "dense:7", "beta:6", "beta:4", "beta:3", "dense:5", "7x", "4x", "beta:5", "beta:7", "beta:11",
    "dense:4", "dense:10", "dense:14", "dense:20", "dense:28", "half", "cache",
]  # fmt: skip
COSTS = {"7x": 6.5, "4x": 10.96, "half": 13.0, "cache": 25.0}


def row(method: str, prompt: int, shown: int = 3, perceptual: float = 0.1, **fields: Any) -> dict[str, Any]:
    family, _, steps = method.partition(":")
    rng = np.random.default_rng([prompt, *method.encode()])
    config = {
        "dense": {"densities": [1.0], "schedule": "native"},
        "beta": {"densities": [1.0], "schedule": "beta"},
        "7x": {"densities": [0.3, 1.0], "schedule": "beta"},
        "4x": {"densities": [0.4, 1.0], "schedule": "beta"},
    }.get(family, {"rival": family})
    beside = {} if method == "dense:50" else {"psnr_db": float(rng.uniform(15, 30)), "perceptual": perceptual}
    return {
        "benchmark": "quality", "method": method, "steps": int(steps or 11), "config": config, "prompt_index": prompt,
        "prompt": f"prompt {prompt}", "claimed": 5, "shown": shown, **beside, "seam": None, "denoise_s": 0.5,
        "features": rng.standard_normal(4).tolist(), "gflop": 11.0 * COSTS.get(method, float(steps or 1)),
        "token_steps": 100, "seed": 3, "commit": "abc", "device": "a device", "date": f"2026-11-{prompt % 2 + 1:02d}",
        **fields,
    }  # fmt: skip


def record(method: str, kind: str, cost: float, value: float, low: float, high: float, name: str = "psnr_db") -> Any:
    quality = {name: {"value": value, "low": low, "high": high}}
    return {
        "method": method, "kind": kind, "cost_dense_steps": cost, "reference": "dense:50", "prompts": 9,
        "qualities": quality,
    }  # fmt: skip


def pixels_of(picture: Any, colour: tuple[int, int, int], box: Box) -> np.ndarray[Any, Any]:
    """Returns x and y of the pixels of exactly this colour inside a box, (n, 2)."""
    pixels = np.asarray(picture)
    y, x = np.nonzero((pixels == colour).all(axis=2))
    inside = (x >= box.left) & (x <= box.right) & (y >= box.top) & (y <= box.bottom)
    return np.stack([x[inside], y[inside]], axis=1)


def default_rows(prompts: int = 6) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [row(name, k, int(rng.integers(0, 6)), float(rng.uniform(0, 1))) for name in DEFAULT for k in range(prompts)]


# ------------------------------------------------------------------------------------------------------------ summary


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
        ([row("dense:50", k) for k in (0, 1)], ["dense:50"] * 2, "methods must be different ones"),
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


# ------------------------------------------------------------------------------------------------------- Pareto picture


def test_dearer_and_better_points_lie_further_right_and_higher() -> None:
    records = [
        record("dense:50", "dense-native", 50.0, 30.0, 29.0, 31.0),
        record("beta:6", "dense-beta", 6.0, 25.0, 24.0, 26.0),
        record("7x", "sparse", 6.5, 20.0, 19.0, 21.0),
        record("half", "rival", 13.0, 28.0, 27.0, 29.0),
    ]
    picture, panel = pareto_picture(records), arrange(records)[0]
    middles = {}
    for each in records:
        found = pixels_of(picture, COLOURS[each["kind"]], panel.frame)
        assert len(found) > 30  # a marker's area
        middles[each["method"]] = (found.min(axis=0) + found.max(axis=0)) / 2
    order = [middles[name][0] for name in ("beta:6", "7x", "half", "dense:50")]
    assert order == sorted(order) and len({*order}) == 4
    heights = [middles[name][1] for name in ("7x", "beta:6", "half", "dense:50")]
    assert heights == sorted(heights, reverse=True)
    logs = {name: math.log(cost) for name, cost in (("beta:6", 6.0), ("half", 13.0), ("dense:50", 50.0))}
    slope = (middles["dense:50"][0] - middles["half"][0]) / (logs["dense:50"] - logs["half"])
    other = (middles["half"][0] - middles["beta:6"][0]) / (logs["half"] - logs["beta:6"])
    assert slope == pytest.approx(other, rel=0.02)


def test_ends_of_an_interval_are_at_their_numbers() -> None:
    records = [record("half", "rival", 10.0, 20.0, 12.0, 40.0), record("cache", "rival", 30.0, 20.0, 19.0, 21.0)]
    picture, panel = pareto_picture(records), arrange(records)[0]
    bar = tuple(round(255 - (255 - each) * 0.7) for each in COLOURS["rival"])
    mark = panel.marks[0]
    near = Box(mark.at[0] - 5, panel.frame.top, mark.at[0] + 5, panel.frame.bottom)
    found = pixels_of(picture, (bar[0], bar[1], bar[2]), near)[:, 1]
    for end, value in ((found.max(), 12.0), (found.min(), 40.0)):
        share = (value - panel.y.low) / (panel.y.high - panel.y.low)
        expected = panel.frame.bottom - share * (panel.frame.bottom - panel.frame.top)
        assert end == pytest.approx(expected, abs=1.5)
    assert panel.y.low < 12.0 and panel.y.high > 40.0


def test_methods_of_one_cost_stand_side_by_side_in_order() -> None:
    records = [
        record("dense:7", "dense-native", 7.0, 1.0, 0.5, 1.5),
        record("beta:7", "dense-beta", 7.0, 1.0, 0.5, 1.5),
    ]
    records += [record("4x", "sparse", 6.99, 1.0, 0.5, 1.5), record("dense:50", "dense-native", 50.0, 1.0, 0.5, 1.5)]
    panel = arrange(records)[0]
    x = {mark.name: mark.at[0] for mark in panel.marks}
    assert x["4x"] < x["dense:7"] < x["beta:7"] < x["dense:50"]
    assert x["beta:7"] - x["dense:7"] == pytest.approx(10.0) == x["dense:7"] - x["4x"]
    assert x["dense:7"] == pytest.approx(panel.x(7.0), abs=1.0)


def default_panels() -> list[Panel]:
    rng = np.random.default_rng(2)
    rows = [
        row(name, k, int(rng.integers(0, 6)), 0.1 + 0.1 * float(rng.uniform()), spectrum_db=float(rng.normal()))
        for name in DEFAULT
        for k in range(6)
    ]
    return arrange(summary(rows, DEFAULT))


def test_labels_of_the_default_list_cover_neither_each_other_nor_leave_their_panel() -> None:
    panels = default_panels()
    assert len(panels) == 5 and len(panels[0].labels) == len(DEFAULT)
    for panel in panels:
        assert all(one.shared_px(other) == 0.0 for one, other in combinations(panel.labels, 2))
        assert all(panel.frame.holds(label) for label in panel.labels)
        for mark, label in zip(panel.marks, panel.labels, strict=True):
            assert label.right - label.left >= text_width(mark.name)
    frames = [panel.frame for panel in panels]
    assert all(one.shared_px(other) == 0.0 for one, other in combinations(frames, 2))


def test_labels_keep_off_what_is_drawn_where_there_is_room() -> None:
    points = [(100.0, 100.0), (104.0, 100.0), (108.0, 100.0)]
    things = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    boxes = place_labels(points, [(40.0, 16.0)] * 3, things, Box(0, 0, 300, 300))
    assert all(box.shared_px(thing) == 0.0 for box in boxes for thing in things)
    assert all(math.dist(box.middle, point) < 60 for box, point in zip(boxes, points, strict=True))
    alone = ([(100.0, 100.0)], [(40.0, 16.0)])
    (free,) = place_labels(*alone, [], Box(0, 0, 300, 300))
    (driven,) = place_labels(*alone, [free], Box(0, 0, 300, 300))
    assert driven.shared_px(free) == 0.0  # it goes elsewhere where something is drawn
    crowded = place_labels(points, [(40.0, 16.0)] * 3, things, Box(80, 90, 130, 108))
    assert len(crowded) == 3  # no room for three: they overlap, but are there


def test_front_holds_the_sparse_methods_that_none_beats() -> None:
    def made(name: str, values: dict[str, tuple[float, float]], kind: str = "sparse") -> list[Any]:
        return [record(method, kind, cost, v, v, v, name) for method, (cost, v) in values.items()]

    def best(name: str, values: dict[str, tuple[float, float]]) -> list[str]:
        return front(made(name, values), name, quality_of(name, QUALITIES))

    some = {"a": (3.0, 10.0), "b": (5.0, 9.0), "c": (5.0, 12.0), "d": (8.0, 12.0), "e": (9.0, 13.0)}
    assert best("psnr_db", some) == ["a", "c", "e"]
    assert best("frechet", some) == ["a", "b"]
    near = {"a": (3.0, -2.0), "b": (4.0, 1.0), "c": (5.0, 3.0), "d": (6.0, -0.5)}
    assert best("spectrum_db", near) == ["a", "b", "d"]  # nearest to 0 is best
    assert best("unheard_of", some) == []
    dense = made("psnr_db", {"z": (1.0, 99.0)}, "dense-native")
    panel = arrange([*dense, *made("psnr_db", some)])[0]
    assert {mark.name for mark in panel.marks if mark.is_hollow} == {"b", "d"}
    assert panel.steps[0] == panel.marks[1].at and panel.steps[-1][0] == panel.frame.right


def test_front_and_hollow_marks_are_seen() -> None:
    records = [record("a", "sparse", 3.0, 10.0, 9.0, 11.0), record("b", "sparse", 30.0, 5.0, 4.0, 6.0)]
    picture, panel = pareto_picture(records), arrange(records)[0]
    full, hollow = (np.asarray(picture)[round(mark.at[1]), round(mark.at[0])] for mark in panel.marks)
    assert (*full,) == COLOURS["sparse"] and (*hollow,) == PAPER
    pale = tuple(round(255 - (255 - each) * 0.4) for each in COLOURS["sparse"])
    steps = pixels_of(picture, (pale[0], pale[1], pale[2]), panel.frame)
    assert steps[:, 0].max() >= panel.frame.right - 2
    assert np.median(steps[:, 1]) == pytest.approx(panel.marks[0].at[1], abs=2)


def test_scales_have_round_ticks() -> None:
    assert Scale(low=2.7, high=56.0, start=0, end=100, is_log=True).ticks() == [3, 5, 7, 10, 20, 30, 50]
    assert Scale(low=0.9, high=1200.0, start=0, end=100, is_log=True).ticks() == pytest.approx(
        [1, 3, 10, 30, 100, 300, 1000]
    )
    assert Scale(low=4.1, high=4.9, start=0, end=100, is_log=True).ticks() == pytest.approx(
        [4.1, 4.2, 4.3, 4.4, 4.5, 4.6, 4.7, 4.8, 4.9]
    )
    assert Scale(low=-0.1, high=1.05, start=0, end=100).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    scale = Scale(low=1.0, high=100.0, start=50, end=250, is_log=True)
    assert [scale(each) for each in (1.0, 10.0, 100.0)] == pytest.approx([50, 150, 250])


def test_pareto_picture_takes_named_qualities_and_refuses_others() -> None:
    records = summary(default_rows(3), DEFAULT)
    assert [panel.quality.title for panel in arrange(records, ["psnr_db"])] == ["PSNR to the reference, dB"]
    both, single = pareto_picture(records, ["psnr_db", "attributes"]), pareto_picture(records, ["psnr_db"])
    assert both.width > 1.8 * single.width and both.mode == "RGB"
    for wrong in (["psnr"], []):
        with pytest.raises(ValueError, match=r"pareto_picture: qualities must be of the records \(attributes, "):
            pareto_picture(records, wrong)


# -------------------------------------------------------------------------------------------------------- contact sheet

SHEET = ["dense:50", "7x", "beta:6", "beta:11"]


def sheet_rows() -> list[dict[str, Any]]:
    """Prompts 0 to 5: 7x is best at 2, worst at 4, all differ most at 1, and beta:11 is farthest away at 5."""
    shown = {
        "dense:50": (3, 5, 3, 3, 3, 3),
        "7x": (3, 2, 5, 3, 0, 3),
        "beta:6": (3, 3, 1, 3, 4, 3),
        "beta:11": (3, 0, 3, 3, 4, 3),
    }
    return [
        row(name, k, shown[name][k], 0.9 if (name, k) == ("beta:11", 5) else 0.01 * k)
        for k in range(6)
        for name in SHEET
    ]


def test_sections_hold_the_prompts_they_speak_of() -> None:
    spread, far, best, worst = sections(sheet_rows(), SHEET, 1)
    assert "differ most" in spread.heading and spread.prompts == (1,) and spread.notes == ("spread 100 points",)
    assert "farthest from the reference" in far.heading and far.prompts == (5,) and "0.90" in far.notes[0]
    assert best.heading.startswith("7x at its best against beta:6") and best.prompts == (2,)
    assert worst.heading.startswith("7x at its worst against beta:6") and worst.prompts == (4,)
    assert best.notes == ("+80 points against beta:6",) and worst.notes == ("-80 points against beta:6",)
    many = sections(sheet_rows(), SHEET, 99)
    assert [len(section.prompts) for section in many] == [6, 6, 3, 3]
    assert many[0].prompts[:3] == (1, 4, 2)  # spreads of 5, 4 (farther away) and 4
    assert not {*many[2].prompts} & {*many[3].prompts}


def test_sections_without_scores_go_by_distance() -> None:
    rows = sheet_rows()
    for each in rows:
        del each["shown"], each["claimed"]
    for name, distance in (("7x", 0.5), ("beta:6", 0.1)):
        next(each for each in rows if (each["method"], each["prompt_index"]) == (name, 3))["perceptual"] = distance
    far, best, worst = sections(rows, SHEET, 1)
    assert far.prompts == (5,) and worst.prompts == (3,) and best.prompts != (3,)
    assert worst.notes == ("perceptual distance +0.40 against beta:6",)
    rewarded = [{**each, "imagereward": 1.0 * each["prompt_index"] * (each["method"] == "7x")} for each in rows]
    assert "ImageReward" in sections(rewarded, SHEET, 1)[0].heading
    assert sections(rewarded, SHEET, 1)[2].prompts == (5,)


def test_sections_of_rows_with_little_in_them() -> None:
    bare = [
        {name: each[name] for name in ("method", "steps", "config", "prompt_index", "gflop")} for each in sheet_rows()
    ]
    (first,) = sections(bare, SHEET, 2)
    assert first.prompts == (0, 1) and "no scores" in first.heading
    similar = [{**each, "ssim": 1.0 - 0.1 * each["prompt_index"]} for each in bare if each["method"] != "dense:50"]
    found = sections(similar + [each for each in bare if each["method"] == "dense:50"], SHEET, 1)
    assert found[0].prompts == (5,) and found[0].notes == ("largest 1 - SSIM 0.50",)
    (only,) = sections([each for each in sheet_rows() if each["method"] == "7x"], ["7x"], 9)
    assert only.prompts == (0, 1, 2, 3, 4, 5)


def test_columns_are_the_reference_the_sparse_and_their_controls_first() -> None:
    shown = columns_of(default_rows(2), DEFAULT)
    assert shown[0] == "dense:50" and len(shown) == 8 and {"7x", "4x", "beta:11"} <= {*shown}
    assert control_of("7x", by_method(default_rows(2), DEFAULT, asker="test")) in shown
    assert shown == sorted(shown, key=DEFAULT.index)


def test_contact_sheet_shows_the_pictures_asked_for() -> None:
    asked: list[tuple[str, int]] = []

    def picture_of(method: str, prompt: int) -> Any:
        asked.append((method, prompt))
        return Image.new("RGB", (64, 48), (250, 20 + prompt, 200 + SHEET.index(method)))

    sheet = contact_sheet(sheet_rows(), SHEET, picture_of, 1)
    assert asked == [(name, k) for k in (1, 5, 2, 4) for name in SHEET]
    whole = Box(0, 0, *sheet.size)
    boxes = {(name, k): pixels_of(sheet, (250, 20 + k, 200 + SHEET.index(name)), whole) for name, k in asked}
    assert all(len(found) == 208 * 156 for found in boxes.values())  # as wide as a column, in their proportions
    left = [boxes[name, 1][:, 0].min() for name in SHEET]
    top = [boxes["7x", k][:, 1].min() for k in (1, 5, 2, 4)]
    assert left == sorted(left) and top == sorted(top) and len({*left}) == len({*top}) == 4
    assert max(boxes["7x", 4][:, 1]) < sheet.height


def test_contact_sheet_refuses_too_little() -> None:
    with pytest.raises(ValueError, match="contact_sheet: count must be 1 or more, got 0"):
        sections(sheet_rows(), SHEET, 0)
    with pytest.raises(ValueError, match="contact_sheet: rows must hold 2 prompts or more, got 1"):
        contact_sheet([row(name, 0) for name in SHEET], SHEET, lambda *_: Image.new("RGB", (8, 8)))


def test_texts_are_wrapped_and_cut() -> None:
    text = "a small cyan plain star at the bottom of a picture " * 4
    lines = wrap(text, 150)
    assert " ".join(lines) == text.strip() and all(text_width(line) <= 150 for line in lines) and len(lines) > 4
    assert text_width(cut("x" * 99, 80)) <= 80 and cut("short", 80) == "short" and wrap("", 80) == []
    assert wrap("x" * 99, 80) == [cut("x" * 99, 80)]


def test_metrics_of_ones_own_are_shown_as_their_scorers_say(tmp_path: Path) -> None:
    own = Scorer(name="lab:ugliness_s", score=lambda *_: [], judges_prompt=True, higher_is_better=False, title="ugly")
    rows = [row(name, k, guidance=3.5) for name in SHEET for k in range(3)]
    for each in rows:
        del each["shown"], each["claimed"], each["features"]
        each["lab:ugliness_s"] = 0.5 + (each["method"] == "7x") * (0.1, -0.2, 0.3)[each["prompt_index"]]
    known = known_qualities([own])
    records = summary(rows, SHEET, known=known)
    assert "lab:ugliness_s" in records[0]["qualities"] and records[0]["guidance"] == 3.5
    assert "guidance" not in records[0]["qualities"]
    panel = arrange(records, known=known)[-1]
    assert (panel.quality.title, panel.quality.best) == ("ugly", -math.inf)
    spread, _, best, worst = sections(rows, SHEET, 1, known)
    assert "ugly" in spread.heading and spread.prompts == worst.prompts == (2,) and best.prompts == (1,)
    paths = write_pictures(rows, records, tmp_path, lambda *_: Image.new("RGB", (8, 8)), known=known)
    assert len(paths) == 3 and "ugliness" in paths[0].read_text()


def test_files_are_written_for_one_dense_method_too(tmp_path: Path) -> None:
    rows = [row("dense:50", k) for k in range(2)]
    paths = write_pictures(rows, summary(rows, ["dense:50"]), tmp_path, lambda *_: Image.new("RGB", (8, 8)))
    assert [path.name for path in paths] == ["table.jsonl", "pareto.png", "contact.png"]
    assert json.loads(paths[0].read_text())["method"] == "dense:50"
    assert all(Image.open(path).width > 300 for path in paths[1:])
    for each in rows:
        del each["shown"], each["features"]
    paths = write_pictures(rows, summary(rows, ["dense:50"]), tmp_path, lambda *_: Image.new("RGB", (8, 8)))
    assert [path.name for path in paths] == ["table.jsonl", "contact.png"]  # nothing to draw against cost
