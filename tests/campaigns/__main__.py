"""Runs campaigns and writes one table: `python -m tests.campaigns`, or `make campaigns`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.campaigns import sanitizers
from tests.campaigns.campaign import Result, run, seed_of_today
from tests.campaigns.runner import SHARES, case_of, process

_SANITIZED = 0.05  # share of the time, used after all other campaigns
OUT = Path("benchmarks") / "results"


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there are survivors, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("--minutes", type=float, default=55.0, help="time of all campaigns together, in each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=[*SHARES], action="append", help="campaigns to run; all by default")
    parser.add_argument("--seed", type=int, default=seed_of_today())
    parser.add_argument("--case", type=int, help="run only this case of --only")
    parser.add_argument("--out", type=Path, help=f"JSON lines; by default a file in {OUT}, for whole runs only")
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
    if options.processes == 1:
        parts = [process(jobs[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            parts = pool.map(process, jobs)
    results = [_merged(each) for each in zip(*parts, strict=True)]
    if options.only is None and (found := sanitizers.run(options.seed, options.minutes * _SANITIZED)) is not None:
        results.append(found)
    print(table(results))
    for result in results:
        for survivor in result.survivors:
            print(ascii(f"{result.name}: {survivor}")[1:-1])
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
