"""Measures speed, together with quality and with a control of the same cost.

Methodology. All methods of a case run in one process, with the same weights, noise and prompt. A warm-up runs every
token count once. Then the methods take turns, `--repeat` times, so that a slowdown of the machine affects all of them.
A time is the median of the repeats, with the 20th and 80th percentile. Denoising is timed from the first call of the
transformer to the end of the last step, in the pipeline's own loop. Text encoding and decoding are not included. On
CUDA, the clock waits for the device at both ends.

`control` is what a speed-up has to beat: the number of dense steps that 7x costs by FLOPs (attention and text
included), rounded to a whole number, with the same kind of noise levels and the same solver. `dense` is 50 steps of
the unpatched pipeline. If 50 steps would take minutes, fewer are timed and the time is scaled up; `timed_steps` in the
row says how many.

The first line shows machine, torch and commit. `--json` writes one line for each measurement, with units in the names
of the fields. Rows worth keeping are in `benchmarks/results/`, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jitaccel.cli import bench
from jitaccel.errors import CommandError
from jitaccel.loading import pick_device

from .compare import ratio_to, read_rows
from .listing import OF_CHECKOUT
from .registry import Case, Options, find_cases


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the requested cases: `python -m benchmarks`, or `jitaccel bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser)
    arguments = parser.parse_args(argv)
    return bench.list_cases(OF_CHECKOUT) if arguments.list else run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0; 1 if a time exceeds the limit of --fail-above; 2 if there is nothing to run or to compare with."""
    cases = find_cases()
    chosen = [c for c in cases if arguments.group in (None, c.group) and arguments.size in (None, c.size)]
    chosen = [c for c in chosen if arguments.group is not None or not c.is_long]
    only = arguments.only or ""
    chosen = [c for c in chosen if c.part_of(only) is not None]
    if not chosen:
        known = ", ".join(sorted({f"{case.group} --size {case.size}" for case in cases}))
        asked = " ".join(str(part) for part in (arguments.group, arguments.size, arguments.only) if part)
        return _refuse(f"group, size and --only must name a case, got {asked}; try {known}, or --list")
    try:
        device = pick_device(arguments.device)
        earlier = [] if arguments.compare is None else read_rows(arguments.compare)
        if arguments.fail_above is not None and arguments.compare is None:
            raise ValueError("--fail-above must come with --compare FILE, got it alone")
        if arguments.resume and arguments.json is None:
            raise ValueError("--resume must come with --json FILE, got it alone")
    except (CommandError, ValueError) as error:
        return _refuse(str(error))
    options = Options(device=device, repeat=arguments.repeat, seed=arguments.seed)

    from jitaccel.provenance import first_line

    print(first_line(device), flush=True)
    done = _done(arguments.json, device) if arguments.resume else set()
    started, ratios, left = time.monotonic(), [], 0
    for case in chosen:
        if (case.group, case.name) in done:
            print(f"\n{case.group}: {case.name}\nmeasured before", flush=True)
        elif arguments.within is not None and time.monotonic() - started > arguments.within:
            left += 1
        else:
            part = replace(options, only=case.part_of(only) or "")
            ratios += _run(case, part, arguments.json, earlier, arguments.resume)
    if left:
        print(f"\n{left} cases were not begun within {arguments.within:g} s; --resume continues with them")
    if arguments.compare is not None:
        most = f", up to {max(ratios):.3f}x" if ratios else "; none of them has the same case, settings and device"
        print(f"\n{len(ratios)} rows compared with {arguments.compare}{most}")
    slower = [ratio for ratio in ratios if arguments.fail_above is not None and ratio > arguments.fail_above]
    if slower:
        print(f"benchmarks: {len(slower)} times are above {arguments.fail_above}x of the earlier ones", file=sys.stderr)
    return 1 if slower else 0


def _done(path: Path, device: torch.device) -> set[tuple[str, str]]:
    """Returns group and name of each case that has a closing row in a file, from this device and commit."""
    from jitaccel.provenance import provenance

    if not path.exists():
        return set()
    origin = provenance(device)
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    here = [row for row in rows if all(row.get(name) == origin[name] for name in ("device", "commit"))]
    return {(row["benchmark"], row["case"]) for row in here if row.get("is_closing")}


def _refuse(reason: str) -> int:
    print(f"benchmarks: {reason}", file=sys.stderr)
    return 2


def _run(
    case: Case, options: Options, path: Path | None, earlier: Sequence[Mapping[str, Any]], closes: bool
) -> list[float]:
    """Prints a case's rows and adds them to the file; returns the ratios of their times to those of an earlier run."""
    from jitaccel.provenance import provenance

    print(f"\n{case.group}: {case.name}", flush=True)
    reason = case.why_not(options)
    if reason is not None:
        print(f"not measured: {reason}")
        return []
    ratios = []
    failed = False
    origin = provenance(options.device)
    for row in case.run(options):
        fields = {"benchmark": case.group, "case": case.name, **row.fields, **origin}
        ratio = ratio_to(fields, earlier)
        ratios += [] if ratio is None else [ratio]
        failed = failed or "error" in fields
        print(row.line + ("" if ratio is None else f"  [{ratio:.3f}x of earlier]"), flush=True)
        _add(path, fields)
    if closes and not failed:  # --resume looks for this row, because other rows may be from an interrupted case
        _add(path, {"benchmark": case.group, "case": case.name, "is_closing": True, **origin})
    return ratios


def _add(path: Path | None, fields: Mapping[str, Any]) -> None:
    """Appends a row to the file of JSON lines; does nothing without a file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    sys.exit(main())
