"""Errors of plans on fields whose best network is known in closed form: `python -m benchmarks exact`.

Nothing is timed. Costs are those of FLUX.1-dev by its operations; `benchmarks/lab/exact` says what is computed, and
docs/exact-lab.md what came out. The search over plans takes minutes, and so runs only where the group is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from ..lab.exact import questions
from ..registry import Case, Options, Row


def _run(question: Callable[[], Iterator[Row]], options: Options) -> Iterator[Row]:
    yield from question()


def _case(size: str, name: str, question: Callable[[], Iterator[Row]]) -> Case:
    run = functools.partial(_run, question)
    return Case(group="exact", size=size, name=name, run=run, why_not=lambda options: None, is_long=True)


CASES = (
    _case("64x64", "dense steps", questions.dense_steps),
    *(
        _case("64x64", f"pooled plans, {name}", functools.partial(questions.plans, way))
        for name, way in questions.WAYS.items()
    ),
    _case("others", "other sizes and spectra", questions.elsewhere),
    _case("others", "rows that were sampled before", questions.earlier_rows),
)
