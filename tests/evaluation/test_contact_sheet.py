"""The contact sheet of `jitaccel eval`, and its other output files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jitaccel.evaluation.eval_pictures import known_qualities, write_pictures
from jitaccel.evaluation.quality.choice import columns_of, sections
from jitaccel.evaluation.quality.contact import contact_sheet
from jitaccel.evaluation.quality.drawing import cut, text_width, wrap
from jitaccel.evaluation.quality.labels import Box
from jitaccel.evaluation.quality.pareto import arrange
from jitaccel.evaluation.quality.rows import by_method, control_of
from jitaccel.evaluation.quality.scorers import Scorer
from jitaccel.evaluation.quality.summary import summary
from tests.support.eval_rows import DEFAULT, default_rows, pixels_of, row

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
