"""docs/models.md is what `python -m benchmarks.models` writes."""

from __future__ import annotations

import pytest

from benchmarks.model_rows import ROWS, Row
from benchmarks.models import PAGE, cost_line, counted, dense_steps, flux_line, model_line, page, size_line
from jitaccel.method.grid import num_tokens_of
from jitaccel.patches.flux.kinds import KINDS
from jitaccel.patches.models import MODELS
from jitaccel.patches.models.refused import REFUSED

QUICK = [row for row in ROWS if row.name in ("Stable Diffusion 3 medium", "HunyuanVideo-1.5", "Wan 2.1 T2V 1.3B")]


def test_page_lists_every_model_and_every_refused_one() -> None:
    text = PAGE.read_text()
    assert all(line in text for line in (*map(flux_line, KINDS), *map(model_line, MODELS)))
    assert all(f"| `{name}` | {reason} |" in text for name, reason in REFUSED.items())


@pytest.mark.parametrize("row", QUICK, ids=lambda row: f"{row.name}, {row.size}")
def test_lines_of_a_model_are_those_counted_now(row: Row) -> None:
    text = PAGE.read_text()
    assert size_line(row) in text and cost_line(row) in text


def test_dense_step_is_that_of_the_operations_of_wan() -> None:
    """Wan's network by hand: self- and cross-attention, feed-forward, and the preparation of text and time."""
    row = next(row for row in ROWS if row.name == "Wan 2.1 T2V 1.3B")
    tokens, text, width, layers, hidden = num_tokens_of(row.grid), 512, 1536, 30, 8960
    block = 2 * tokens * (4 * width**2 + 2 * width**2 + 2 * hidden * width) + 2 * text * 2 * width**2
    block += 4 * tokens * width * (tokens + text)
    assert counted(row).of(tokens) == pytest.approx(layers * block, rel=2e-3)
    # 11 steps, of which 4 are on 32 % and 3 on 60 % of the tokens; attention alone would save more.
    assert 4 * 0.32**2 + 3 * 0.6**2 + 4 < dense_steps(row, "7x-paper") < 4 * 0.32 + 3 * 0.6 + 4


@pytest.mark.weekly
def test_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text() == page()
