"""Results of an evaluation, one record for each method: costs, and each quality with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import frechet_distance
from .rows import (
    QUALITIES,
    UNITS_OF_COST,
    Known,
    Rows,
    by_method,
    column,
    cost_dense_steps,
    mean,
    method_kind,
    qualities_of_rows,
)
from .statistics import Estimate, bootstrap, mean_of, share_of

Record = dict[str, Any]
_FRECHET_RESAMPLES = 200  # each needs a matrix decomposition
_OF_ONE_ROW = frozenset(
    ("benchmark", "method", "steps", "config", "prompt_index", "prompt", "picture", "claimed", "shown", "features")
)
_COSTS = frozenset(("gflop", "token_steps", "denoise_s"))


def summary(
    rows: Rows, methods: Sequence[str], *, data: NDArray[Any] | None = None, known: Known = QUALITIES
) -> list[Record]:
    """Returns one record of JSON values for each method, in their order.

    Costs are means per picture; cost_dense_steps counts them in steps of the reference. Each quality has `value`, and
    `low` and `high`, the ends of its 95 % bootstrap interval over prompts. Qualities are those in the rows;
    `attributes`, the share shown of those claimed; and `frechet`, the distance of features to the reference's, both
    resampled together. A quality that is not finite for some picture is left out, because its mean would not be finite.
    Fields that all rows share (commit, device, seed and the like) come last.

    Args:
        rows: The rows of every method for the same prompts.
        methods: Names, the reference first.
        data: (P, F), features for `frechet_to_data`.
        known: Fields that count as qualities whatever they contain; any other fraction counts too.

    Raises:
        ValueError: If the rows do not have the same 2 or more prompts for every method.
    """
    of = by_method(rows, methods, asker="summary")
    reference = of[methods[0]]
    common = _common([row for some in of.values() for row in some], known)
    return [_record(of[name], reference, _estimates(of[name], reference, data, known)) | common for name in methods]


def _record(rows: Rows, reference: Rows, qualities: Mapping[str, Estimate]) -> Record:
    first = rows[0]
    return {
        "benchmark": "quality summary",
        "method": first["method"],
        "kind": method_kind(first),
        "reference": reference[0]["method"],
        "steps": first["steps"],
        "config": first.get("config"),
        "prompts": len(rows),
        "cost_dense_steps": cost_dense_steps(rows, reference),
        "gflop": mean(rows, "gflop"),
        "token_steps": mean(rows, "token_steps") if _has(rows, "token_steps") else None,
        "seconds": mean(rows, "denoise_s") if _has(rows, "denoise_s") else None,
        "qualities": {
            name: {"value": each.value, "low": each.low, "high": each.high} for name, each in qualities.items()
        },
    }


def _estimates(rows: Rows, reference: Rows, data: NDArray[Any] | None, known: Known) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    if all(_has([row], "claimed") and _has([row], "shown") for row in rows):
        found["attributes"] = share_of(column(rows, "shown"), column(rows, "claimed"))
    if _has(rows, "features"):
        features = _features(rows)
        if rows is not reference and _has(reference, "features"):
            found["frechet"] = _frechet(features, _features(reference), is_paired=True)
        if data is not None:
            found["frechet_to_data"] = _frechet(features, data, is_paired=False)
    for name in qualities_of_rows(rows, known):
        values = column(rows, name)
        if np.isfinite(values).all():
            found[name] = mean_of(values)
    return found


def _frechet(features: NDArray[Any], other: NDArray[Any], *, is_paired: bool) -> Estimate:
    def distance(chosen: NDArray[Any]) -> float:
        return frechet_distance(features[chosen], other[chosen] if is_paired else other)

    return bootstrap(len(features), distance, resamples=_FRECHET_RESAMPLES)


def _features(rows: Rows) -> NDArray[Any]:
    return np.array([row["features"] for row in rows], np.float64)


def _has(rows: Rows, name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _common(rows: Rows, known: Known) -> Record:
    """Returns the fields other than costs and qualities that have the same value in all rows, such as the commit."""
    first = rows[0]
    measured = {*_OF_ONE_ROW, *_COSTS, *qualities_of_rows(rows, known), *known}
    return {
        name: value
        for name, value in first.items()
        if name not in measured and not name.endswith(UNITS_OF_COST) and all(row.get(name) == value for row in rows)
    }
