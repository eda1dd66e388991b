"""Measures speed, beside a quality figure and beside the control that costs the same.

Methodology. All methods of a case run in one process, on the same weights, noise and prompt. A warm-up runs every
token count once. Then the methods take turns, `--repeat` times over, so that a machine that slows down slows them
all. A time is the median of the repeats, beside the 20th and 80th percentile. Denoising is timed from the first
call of the transformer to the end of the last step, through the pipeline's own loop; text encoding and decoding are
left out. On CUDA the clock waits for the device at both ends.

`control` is what a speed-up has to beat: as many dense steps as 7x costs by FLOPs (attention and text counted), to
the nearest whole, on the same kind of noise levels. `dense` is 50 steps of the pipeline untouched. Where 50 steps
would take minutes, fewer are timed and multiplied; the row says how many (`timed_steps`).

The first line says machine, torch and commit; `--json` adds one line for each measurement, with the unit in each
field's name. Rows worth keeping live in `benchmarks/results/`, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jitaccel.cli.errors import CommandError
from jitaccel.cli.loading import pick_device

from .registry import Case, Options, find_cases


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases that are asked for; 0, or 2 where there is none."""
    arguments = _parser().parse_args(argv)
    cases = find_cases()
    if arguments.list:
        for case in cases:
            print(f"{case.group:10} {case.size:8} {case.name}")
        return 0
    chosen = [c for c in cases if arguments.group in (None, c.group) and arguments.size in (None, c.size)]
    if not chosen:
        known = ", ".join(sorted({f"{case.group} --size {case.size}" for case in cases}))
        return _refuse(f"group and size must name a case, got {arguments.group} {arguments.size}; try {known}")
    try:
        device = pick_device(arguments.device)
    except CommandError as error:
        return _refuse(str(error))
    options = Options(device=device, repeat=arguments.repeat, seed=arguments.seed)

    from jitaccel.provenance import first_line

    print(first_line(device), flush=True)
    for case in chosen:
        _run(case, options, arguments.json)
    return 0


def _refuse(reason: str) -> int:
    print(f"benchmarks: {reason}", file=sys.stderr)
    return 2


def _run(case: Case, options: Options, path: Path | None) -> None:
    from jitaccel.provenance import provenance

    print(f"\n{case.group}: {case.name}", flush=True)
    reason = case.why_not(options)
    if reason is not None:
        print(f"not measured: {reason}")
        return
    origin = provenance(options.device)
    for row in case.run(options):
        print(row.line, flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"benchmark": case.group, "case": case.name, **row.fields, **origin}) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", nargs="?", help="which group of cases, such as denoise; without it all")
    parser.add_argument("--size", help="which size of model, such as small, large, flux; without it all")
    parser.add_argument("--repeat", type=_positive, default=5, help="how often each method is timed (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random weights (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add one JSON line for each measurement to this file")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
