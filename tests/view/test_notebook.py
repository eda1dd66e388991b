"""Handles and statistics as shown in notebooks."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import jitaccel
from tests.support import tiny
from tests.support.reports import CONFIGS
from tests.support.tiny import SHORT, generate


def _ran(config: Any) -> Any:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, config) as handle:
        generate(pipe)
        return handle.stats()


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_have_a_bar_and_a_row_for_each_step(name: str) -> None:
    stats = _ran(CONFIGS[name])
    page = stats._repr_html_()
    heights = [float(height) for height in re.findall(r"height: ([\d.]+)%", page)]
    assert heights == pytest.approx([100.0 * step.tokens / tiny.NUM_TOKENS for step in stats.steps], abs=0.06)
    rows = re.findall(r"<tr><td[^>]*>(\d+)</td>", page)
    assert rows == [str(step.index + 1) for step in stats.steps]
    assert f"{stats.dense_steps:.2f} dense steps" in page


def test_statistics_say_what_each_stage_showed() -> None:
    assert "a picture of half the size" in _ran(CONFIGS["pooled"])._repr_html_()
    page = _ran(SHORT)._repr_html_()
    assert "some of the tokens" in page and "every token" in page


def test_notes_are_escaped() -> None:
    stats = dataclasses.replace(_ran(SHORT), notes=("<script>alert(1)</script>",))
    assert "&lt;script&gt;" in stats._repr_html_()
    assert "<script>" not in stats._repr_html_()


def test_handle_shows_its_changes_and_its_last_generation() -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        before = handle._repr_html_()
        assert "&lt;jitaccel.Handle of FluxPipeline" in before
        assert "<table" not in before
        generate(pipe)
        assert "<table" in handle._repr_html_()


def test_statistics_without_a_generation_have_no_table() -> None:
    stats = jitaccel.apply(tiny.pipeline(), SHORT).stats()
    assert "<table" not in stats._repr_html_()
    assert stats.codebase in stats._repr_html_()
