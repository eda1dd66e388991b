"""Errors of plans on fields whose optimal network is known in closed form: `python -m benchmarks exact`.

Nothing is timed. Costs are those of FLUX.1-dev, in operations. `benchmarks/lab/exact` describes the computation, and
docs/exact-lab.md the results. The search over plans takes minutes, so it only runs if the group is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from ..lab.exact import first_frame, questions, subset_questions
from ..registry import Case, Measurement, Options


def _run(question: Callable[[], Iterator[Measurement]], options: Options) -> Iterator[Measurement]:
    yield from question()


def _case(size: str, name: str, question: Callable[[], Iterator[Measurement]]) -> Case:
    run = functools.partial(_run, question)
    return Case(group="exact", size=size, name=name, run=run, why_not=lambda options: None, is_long=True)


CASES = (
    _case("64x64", "presets of the product", questions.product_presets),
    _case("64x64", "dense steps", questions.dense_steps),
    *(
        _case("64x64", f"pooled plans, {name}", functools.partial(questions.plans, way))
        for name, way in questions.WAYS.items()
    ),
    _case("others", "other sizes and spectra", questions.elsewhere),
    _case("others", "half size that knows another spectrum", questions.other_half_size),
    *(
        _case("others", f"half size in doubt, {words}", functools.partial(questions.doubtful_half_size, solver))
        for solver, words in questions.SOLVERS.items()
        if solver != "euler"
    ),
    _case("others", "video", questions.video),
    _case("others", "rows that were sampled before", questions.earlier_rows),
    _case("subsets", "the paper's 7x and its variants", subset_questions.subset_variants),
    _case("subsets", "activation where detail lies in places", questions.activation),
    _case("subsets", "subset or pooled steps", subset_questions.subset_or_pooled),
    _case("subsets", "first frame of a causal decoder", first_frame.first_frame),
    _case("subsets", "presets with subset stages, 64x64 tokens", subset_questions.subset_presets),
    _case("subsets", "the paper's 7x and its variants, 64x64 tokens", subset_questions.paper_variants),
    _case("subsets", "subset or pooled steps, 64x64 tokens", subset_questions.large_subset_or_pooled),
)
