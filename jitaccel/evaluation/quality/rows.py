"""Rows of an evaluation, one for each method and prompt: checks, order, and the qualities they contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...method.config import JiTConfig

Row = Mapping[str, Any]
Rows = Sequence[Row]
ByMethod = Mapping[str, Rows]

_INF = float("inf")
_NOT_QUALITIES = frozenset(("gflop", "token_steps", "guidance"))
UNITS_OF_COST = ("_s", "_ms", "_mib", "_gib", "_w", "_j")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How a quality is shown: its value times `scale`. best: the ideal value, possibly infinite; None if unknown."""

    title: str
    best: float | None
    scale: float = 1.0


Known = Mapping[str, Quality]
QUALITIES: Known = {
    "attributes": Quality(title="attributes shown, %", best=_INF, scale=100.0),
    "imagereward": Quality(title="ImageReward", best=_INF),
    "hpsv2": Quality(title="HPSv2.1", best=_INF),
    "clip_score": Quality(title="CLIP score", best=_INF),
    "clip_iqa": Quality(title="CLIP-IQA", best=_INF),
    "frechet": Quality(title="Frechet distance to the reference", best=-_INF),
    "frechet_to_data": Quality(title="Frechet distance to drawn landscapes", best=-_INF),
    "psnr_db": Quality(title="PSNR to the reference, dB", best=_INF),
    "ssim": Quality(title="SSIM to the reference", best=_INF),
    "lpips": Quality(title="LPIPS to the reference", best=-_INF),
    "perceptual": Quality(title="perceptual distance to the reference", best=-_INF),
    "spectrum_db": Quality(title="fine detail against the reference, dB", best=0.0),
    "seam": Quality(title="seams between stages", best=1.0),
}


def quality_of(name: str, known: Known) -> Quality:
    """Returns how a quality is shown; for an unknown one, it is also unknown whether more is better."""
    return known.get(name, Quality(title=name.replace("_", " "), best=None))


def settings_as_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's settings, completed by the defaults of fields of JiTConfig added since it was written.

    Settings that are not a configuration (native steps, rivals) are unchanged.
    """
    given = dict(settings)
    if "densities" not in given or "rival" in given:
        return given
    return {**_defaults(), **given}


def _defaults() -> dict[str, Any]:
    """Returns the defaults as JSON values, with lists instead of tuples."""
    found = {field.name: field.default for field in fields(JiTConfig) if field.default is not MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def by_method(rows: Rows, methods: Sequence[str], *, asker: str) -> dict[str, Rows]:
    """Returns the rows of each method in the order of prompts. asker: the function named in errors.

    Raises ValueError listing every problem: methods named twice or without rows, fewer than 2 prompts, prompts that are
    repeated or missing for a method.
    """
    reasons = [] if methods else ["methods must name at least one, got none; name the reference first"]
    if len(set(methods)) < len(methods):
        reasons.append(f"methods must all be different, got {', '.join(methods)}; drop the repeated ones")
    of = {name: sorted((row for row in rows if row["method"] == name), key=_prompt) for name in methods}
    if missing := [name for name, some in of.items() if not some]:
        known = ", ".join(dict.fromkeys(str(row["method"]) for row in rows)) or "none"
        reasons.append(f"rows must hold every method, got none of {', '.join(missing)}; there are {known}")
    reference = [] if not methods else [_prompt(row) for row in of[methods[0]]]
    if reference and len(set(reference)) < 2:
        reasons.append(f"rows must hold 2 prompts or more, got {len(set(reference))}; an interval needs several")
    for name, some in of.items():
        prompts = [_prompt(row) for row in some]
        if len(set(prompts)) < len(prompts):
            reasons.append(f"rows must hold a prompt once for each method, got some of {name} twice; drop old rows")
        elif some and prompts != reference:
            odd = sorted(set(prompts) ^ set(reference))[:5]
            reasons.append(f"rows must hold the same prompts, got others of {name} ({odd}); make what is missing")
    if reasons:
        raise ValueError("\n".join(f"{asker}: {reason}" for reason in reasons))
    return dict(of)


def _prompt(row: Mapping[str, Any]) -> int:
    return int(row["prompt_index"])


def method_kind(row: Mapping[str, Any]) -> str:
    """Returns the kind of a row's method: for dense ones by levels and solver, otherwise "sparse" or "rival".

    "dense-native" uses the model's levels, "dense-beta" the presets' levels, and "dense-dpm" the presets' levels with
    DPM-Solver++(2M).
    """
    family = str(row["method"]).partition(":")[0].lower()
    config = row.get("config") or {}
    densities = config.get("densities")
    if "rival" in config or (densities is None and family not in ("dense", "beta", "dpm")):
        return "rival"
    if densities is not None and any(density != 1.0 for density in densities):
        return "sparse"
    if family in ("dense", "beta"):  # more informative than an explicit list of levels
        return "dense-native" if family == "dense" else "dense-beta"
    if family == "dpm" or config.get("solver", "euler") == "dpmpp_2m":
        return "dense-dpm"
    return "dense-native" if config.get("schedule", "native") == "native" else "dense-beta"


def control_of(name: str, of: ByMethod) -> str | None:
    """Returns the dense method of nearest cost to a sparse one, or None if there is none.

    Methods on the presets' levels are preferred to those on native ones, and among them those with the solver of the
    sparse method, if there are any.
    """
    kinds = {other: method_kind(rows[0]) for other, rows in of.items() if other != name}
    solver = (of[name][0].get("config") or {}).get("solver", "euler")
    on_levels = ("dense-beta", "dense-dpm") if solver == "euler" else ("dense-dpm", "dense-beta")
    for kind in (*on_levels, "dense-native"):
        controls = [other for other in kinds if kinds[other] == kind]
        if controls:
            return min(controls, key=lambda other: abs(mean(of[other], "gflop") - mean(of[name], "gflop")))
    return None


def qualities_of_rows(rows: Rows, known: Known) -> tuple[str, ...]:
    """Returns the qualities of single pictures that the rows have: known ones first, then others in their order.

    Any fraction counts, except guidance and costs (whose names end in a unit of time, memory or power).
    """
    found = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, float) and name not in _NOT_QUALITIES and not name.endswith(UNITS_OF_COST)
    )
    named = dict.fromkeys(name for row in rows for name in row if name in known and row[name] is not None)
    return (*(name for name in known if name in named), *(name for name in found if name not in known))


def column(rows: Rows, name: str) -> NDArray[Any]:
    """Returns a field of the rows that have it, as float64."""
    return np.array([row[name] for row in rows if row.get(name) is not None], np.float64)


def mean(rows: Rows, name: str) -> float:
    """Returns the mean of a field over the rows that have it."""
    return float(column(rows, name).mean())


def cost_dense_steps(rows: Rows, reference: Rows) -> float:
    """Returns the cost of a picture in steps of the reference."""
    return mean(rows, "gflop") / (mean(reference, "gflop") / float(reference[0]["steps"]))
