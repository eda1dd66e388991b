"""Runs campaigns, and writes one table: `python -m tests.campaigns`, or `make campaigns`."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.campaigns.campaign import Case, Result, run, seed_of_today

SHARES = {
    "operations": 0.22, "faults": 0.30, "arguments": 0.20, "exports": 0.06, "operators": 0.06, "threads": 0.10,
    "kills": 0.06,
}  # fmt: skip
"""Of the time, by campaign."""
OUT = Path("benchmarks") / "results"


def case_of(name: str) -> Case:
    """Returns the cases of a campaign."""
    import importlib

    case: Case = importlib.import_module(f"tests.campaigns.{name}").case
    return case


def campaign(name: str, seed: int, seconds: float, start: int = 0, stride: int = 1) -> Result:
    """Returns what came of a campaign that begins no case after so many seconds."""
    end = time.monotonic() + seconds
    return run(name, case_of(name), seed, itertools.count(start, stride), lambda: time.monotonic() >= end)


def table(results: Sequence[Result]) -> str:
    """Returns the results in Markdown."""
    lines = ["| campaign | cases | operations | faults | survivors | minutes |", "|---|---|---|---|---|---|"]
    for each in results:
        cells = (each.cases, each.counts.operations, each.counts.faults, len(each.survivors))
        lines.append(f"| {each.name} | {' | '.join(f'{cell:,}' for cell in cells)} | {each.seconds / 60:.1f} |")
    sums = [
        sum(values)
        for values in zip(
            *((r.cases, r.counts.operations, r.counts.faults, len(r.survivors)) for r in results), strict=True
        )
    ]
    lines.append(f"| all | {' | '.join(f'{value:,}' for value in sums)} | {sum(r.seconds for r in results) / 60:.1f} |")
    return "\n".join(lines)


def _merged(parts: Sequence[Result]) -> Result:
    merged = Result(name=parts[0].name)
    for part in parts:
        merged.cases += part.cases
        merged.seconds += part.seconds
        merged.counts.operations += part.counts.operations
        merged.counts.faults += part.counts.faults
        merged.survivors += part.survivors
    return merged


def _process(given: tuple[dict[str, float], int, int, int]) -> list[Result]:
    """Runs all campaigns in one process, every `stride`-th case of each."""
    seconds, seed, start, stride = given
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return [campaign(name, seed, each, start, stride) for name, each in seconds.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where something survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("--minutes", type=float, default=55.0, help="of all campaigns together, on each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=[*SHARES], action="append", help="campaigns to run; without it all")
    parser.add_argument("--seed", type=int, default=seed_of_today())
    parser.add_argument("--case", type=int, help="this case of --only alone")
    parser.add_argument("--out", type=Path, help=f"JSON lines; without it a file in {OUT}, of whole runs alone")
    options = parser.parse_args(argv)
    names = options.only or [*SHARES]
    if options.case is not None:
        for name in names:
            result = run(name, case_of(name), options.seed, iter((options.case,)), lambda: False)
            print(result)
        return int(bool(result.survivors))
    from jitaccel.provenance import first_line, provenance

    print(first_line(), f"seed {options.seed}", sep="\n", flush=True)
    whole = sum(SHARES[name] for name in names)
    seconds = {name: 60.0 * options.minutes * SHARES[name] / whole for name in names}
    jobs = [(seconds, options.seed, start, options.processes) for start in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        parts = pool.map(_process, jobs)
    results = [_merged(each) for each in zip(*parts, strict=True)]
    print(table(results))
    for result in results:
        for survivor in result.survivors:
            print(f"{result.name}: {survivor}")
    _write(options.out, results, {**provenance(), "seed": options.seed}, is_whole=options.only is None)
    return int(any(result.survivors for result in results))


def _write(out: Path | None, results: Sequence[Result], origin: dict[str, Any], is_whole: bool) -> None:
    path = out or (OUT / f"campaigns-cpu-{origin['date']}.jsonl" if is_whole else None)
    if path is None:
        return
    rows = [{"benchmark": "campaigns", **_row(result), **origin} for result in results]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {path}")


def _row(result: Result) -> dict[str, Any]:
    counts = asdict(result.counts)
    return {
        "campaign": result.name,
        "cases": result.cases,
        **counts,
        "survivors": result.survivors,
        "cases_s": result.seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
