"""Turns rows of quality into text for the docs: the evaluation, the lab's questions, and a card for each preset."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jitaccel.evaluation.quality.rows import settings_as_now
from jitaccel.method.config import JiTConfig
from jitaccel.method.presets import DENSE_STEPS, PRESETS
from jitaccel.patches.flux.flops import FLUX_DEV, FLUX_DEV_TEXT_TOKENS, flux_dev_flops, flux_flops
from jitaccel.speed.control import equivalent_dense_steps
from jitaccel.speed.overview import FEWER_STEPS, overview, stages

from .lab.report import BENCHMARK, cell, tables
from .lab.search import BENCHMARK as SEARCH

Fields = Mapping[str, Any]
_FLUX = functools.partial(flux_flops, FLUX_DEV)
_PRODUCT = "presets of the product"  # a question of the exact laboratory
_GRID = (64, 64)  # FLUX.1-dev at 1024x1024


def lab(rows: Sequence[Fields]) -> str:
    """Returns a table for each of the lab's questions."""
    return tables([row for row in rows if row["benchmark"] == BENCHMARK])


def search(rows: Sequence[Fields]) -> str:
    """Returns a table of the last round of each search on training prompts, best candidate first."""
    found: dict[str, list[Fields]] = {}
    for row in rows:
        if row["benchmark"] == SEARCH:
            found.setdefault(row["case"], []).append(row)
    return "\n".join(_search(case, of) for case, of in found.items())


def _search(case: str, rows: Sequence[Fields]) -> str:
    last = max(row["round"] for row in rows)
    of = sorted((row for row in rows if row["round"] == last), key=lambda row: row["rank"])
    lines = [["candidate", *(title for _, title, _, _ in _SHOWN)], ["---"] * (1 + len(_SHOWN))]
    for row in of:
        lines.append([row["method"], *(_cell(row["qualities"].get(key), *form) for key, _, *form in _SHOWN)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    count, first = len({row["method"] for row in rows}), of[0]
    origin = f"best {len(of)} of {count}, {first['prompts']} training prompts, {first['date']}, {first['commit']}"
    return f"**{case}** ({origin})\n\n{table}"


def overview_table(rows: Sequence[Fields]) -> str:
    """Returns a table with steps, network input and cost of each preset. It depends on the presets, not on the rows."""
    head = ["preset", "steps", "what the network sees", "cost in dense steps", "vs 50 steps", "vs 28 steps"]
    lines = [head, ["---"] * len(head)]
    for row in overview(_GRID, flux_dev_flops):
        ratios = [f"{ratio:.1f}x" for ratio in row.speedups]
        lines.append([f"`{row.name}`", str(row.steps), row.shown, f"{row.cost:.1f}", *ratios])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def presets(rows: Sequence[Fields]) -> str:
    """Returns a card for each sparse preset: its method, its cost, its quality, and a control of the same cost."""
    found = {row["method"]: row for row in rows if row["benchmark"] == BENCHMARK}
    found |= {row["method"]: row for row in _evaluated(rows, _SIDE_PX)}
    names = [name for name, config in PRESETS.items() if config.num_stages > 1]
    exact = {row["target"]: row for row in rows if row.get("case") == _PRODUCT and "target" in row}
    return "\n".join(_card(name, PRESETS[name], found, exact.get(name)) for name in names)


def quality(rows: Sequence[Fields]) -> str:
    """Returns the results of `jitaccel eval` on the embedded model, a table for each picture size and prompt count.

    The embedded model's main size comes first, then the others by size; higher prompt counts come first.
    """
    found: dict[tuple[int, int], list[Fields]] = {}
    for row in _evaluated(rows):
        found.setdefault((row["pixels"][0], row["prompts"]), []).append(row)
    order = sorted(found, key=lambda kind: (kind[0] != _SIDE_PX, kind[0], -kind[1]))
    return "\n".join(_quality(side, found[side, prompts]) for side, prompts in order)


def _evaluated(rows: Sequence[Fields], side: int | None = None) -> list[Fields]:
    """Returns the rows of the embedded model for square pictures, of one side length or of all."""
    of = [row for row in rows if row["benchmark"] == "quality summary" and row["model"] == "embedded"]
    return [row for row in of if side in (None, row["pixels"][0])]


def _quality(side: int, rows: Sequence[Fields]) -> str:
    """Returns the table for a size. Raises ValueError if rows come from different weights and are not comparable."""
    if len({row["weights"] for row in rows}) > 1:
        raise ValueError(f"rows of {side} pixels must be of the same weights; commit those of one model")
    lines = [["method", "cost in dense steps", *(title for _, title, _, _ in _COLUMNS), "more than", "p"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [_cell(row["qualities"].get(key), scale, digits) for key, _, scale, digits in _COLUMNS]
        pairs = row.get("paired", {}).items()
        more = [f"`{other}` by {cell(each, 100.0, 1)}" for other, each in pairs]
        chance = [f"{each['p']:.3f}" if each["p"] >= 0.001 else "< 0.001" for _, each in pairs]
        cost = f"{row['cost_dense_steps']:.2f}"
        lines.append([f"`{row['method']}`", cost, *cells, ", ".join(more), ", ".join(chance)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    first, commits = rows[0], ", ".join(dict.fromkeys(row.get("commit", "several commits") for row in rows))
    origin = f"{first['prompts']} held-out prompts, {first['device']}, {first['dtype']}, {first['date']}, {commits}"
    size = f"{side}x{side} pixels, {side // 8}x{side // 8} tokens"
    return f"{size} ({origin}; weights {first['weights'][:12]}):\n\n{table}"


def _cell(estimate: Mapping[str, float] | None, scale: float, digits: int) -> str:
    """Returns an estimate with its interval; a Frechet distance without, as its interval lies to one side of it."""
    if estimate is not None and not estimate["low"] <= estimate["value"] <= estimate["high"]:
        return f"{scale * estimate['value']:.{digits}f}"
    return cell(estimate, scale, digits)


def _method_of(config: JiTConfig) -> str:
    """Returns sentences on what a configuration does between stages."""
    is_subset = any(density < 1.0 and config.pooling_of(stage) == 1 for stage, density in enumerate(config.densities))
    if not is_subset:
        return f"At the change no token is moved and no noise is drawn. {_SOLVED[config.solver]}"
    lifted, moved = _LIFTED[config.lifter], _MOVED[config.micro_flow]
    return f"Lifts the {lifted}; new tokens are {moved}. {_SOLVED[config.solver]}"


def _exact(row: Fields | None) -> list[str]:
    """Returns the result of the exact laboratory for a preset."""
    if row is None:
        return []
    keys = ("relative_mse", "ratio_to_dense")
    errors, ratios = (" / ".join(f"{each:.2g}" for each in row[key].values()) for key in keys)
    return [
        f"Exact laboratory (64x64 tokens, spectra 2.0 / 2.6): error {errors}, which is {ratios} times the error of "
        f"dense steps of the same cost, whose levels were searched in the same way ([exact-lab.md](exact-lab.md)).\n"
    ]


def _card(name: str, config: JiTConfig, found: Mapping[str, Fields], exact: Fields | None) -> str:
    flux = equivalent_dense_steps(config, math.prod(_GRID), FLUX_DEV_TEXT_TOKENS, _FLUX)
    lines = [
        f"### `{name}`\n",
        f"{config.steps} steps: {', then '.join(stages(config))}. {_method_of(config)}\n",
        f"On FLUX.1-dev at 1024x1024 it costs as many FLOPs as {flux:.2f} dense steps, attention and 512 text tokens "
        f"included: {DENSE_STEPS / flux:.2f}x fewer than {DENSE_STEPS} steps, {FEWER_STEPS / flux:.2f}x fewer than "
        f"{FEWER_STEPS}. Quality on FLUX.1-dev is not measured.\n",
        *_exact(exact),
    ]
    row = found.get(name)
    known = {} if row is None else settings_as_now(row["config"])
    if row is None or known != {**known, **config.to_dict()}:
        return "\n".join([*lines, "Not measured on the embedded model.\n"])
    return "\n".join([*lines, _measured(row, _control(row, found), found.get("dense:50"))])


_LIFTED = {"velocity": "velocity", "clean": "clean estimate"}
_MOVED = {
    "exact": "moved all the way (exact micro-flow)",
    "released": "moved a third of the way (released blend)",
    "none": "not moved",
}
_SOLVED = {"euler": "The solver is Euler.", "dpmpp_2m": "The solver is DPM-Solver++(2M)."}
_SHOWN = (
    ("attributes", "attributes shown, %", 100.0, 1),
    ("frechet", "Frechet to 50 dense steps", 1.0, 2),
    ("perceptual", "perceptual distance to them", 1.0, 3),
    ("spectrum_db", "detail, dB", 1.0, 2),
)
_COLUMNS = (*_SHOWN[:2], ("frechet_to_data", "Frechet to drawings", 1.0, 2), *_SHOWN[2:])
_SIDE_PX = 256  # the embedded model's main size


def _control(row: Fields, found: Mapping[str, Fields]) -> Fields | None:
    """Returns the dense method with the presets' levels and the same solver whose cost is nearest."""
    family = "beta:" if row["config"].get("solver", "euler") == "euler" else "dpm:"
    controls = [other for name, other in found.items() if name.startswith(family)]
    return min(controls, key=lambda other: abs(other["gflop"] - row["gflop"]), default=None)


def _measured(row: Fields, *others: Fields | None) -> str:
    shown = [row, *(other for other in others if other is not None)]
    lines = [["embedded model, 32x32 tokens", "cost in dense steps", *(title for _, title, _, _ in _SHOWN)]]
    lines.append(["---"] * len(lines[0]))
    for each in shown:
        cells = [cell(each["qualities"].get(key), scale, digits) for key, _, scale, digits in _SHOWN]
        lines.append([f"`{each['method']}`", f"{each['cost_dense_steps']:.2f}", *cells])
    origin = (
        f"{row['prompts']} held-out prompts, {row['date']}, {row['device']}, {row.get('commit', 'several commits')}"
    )
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{origin}; weights {str(row['weights'])[:12]}.\n"
