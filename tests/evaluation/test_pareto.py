"""The plot of quality against cost."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from jitaccel.evaluation.quality.drawing import COLOURS, PAPER, Scale, text_width
from jitaccel.evaluation.quality.labels import Box, place_labels
from jitaccel.evaluation.quality.pareto import Panel, arrange, front, pareto_picture
from jitaccel.evaluation.quality.rows import QUALITIES, quality_of
from jitaccel.evaluation.quality.summary import summary
from tests.support.eval_rows import DEFAULT, default_rows, pixels_of, record, row


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
    assert driven.shared_px(free) == 0.0  # it moves if something is drawn there
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
