"""Shows a handle or statistics in a notebook: the facts, a strip of the steps' tokens, and a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..method.grid import num_tokens_of
from .contents import costs_of, described, facts_of
from .templates import template

if TYPE_CHECKING:
    from ..generation.stats import Stats


def stats_html(stats: Stats) -> str:
    """Returns statistics as HTML with inline styles, because notebooks drop style sheets."""
    total = num_tokens_of(stats.grid)
    rows = []
    for step, cost in zip(stats.steps, costs_of(stats, stats.steps), strict=True):
        kind, _, factor = stats.shown(step.stage).partition(" ")
        rows.append(
            {
                "step": step,
                "kind": kind,
                "shown": described(kind, int(factor or 1)),
                "share": 100.0 * step.tokens / total,
                "cost": cost,
            }
        )
    return template("notebook.html.j2").render(facts=facts_of(stats), notes=stats.notes, rows=rows, total=total)


def handle_html(words: str, stats: Stats) -> str:
    """Returns a handle as HTML: its description, and the last generation if there was one."""
    return template("handle.html.j2").render(words=words, stats=stats_html(stats) if stats.generations else None)
