"""Quality and cost: `python -m benchmarks quality` runs `jitaccel eval` with all methods of interest on 256 prompts.

It takes hours on a CPU, so it only runs if named, and it resumes where it stopped. Rows, table, Pareto plot and contact
sheet are written to out/quality. `python -m benchmarks.lab` measures what the parts of the method contribute.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path

from jitaccel.cli import eval

from ..registry import Case, Measurement, Options

_PRESETS = "4x,7x,10x,4x-paper,7x-paper"
_RIVALS = "firstblock:28:0.2,firstblock:28:0.4,taylorseer:28:4,taylorseer-lite:28:4,half:11:4"
METHODS = {
    "methods": ",".join(
        [
            "dense:50",
            *(f"dense:{steps}" for steps in (4, 5, 6, 7, 8, 10, 12, 14, 20, 28)),
            *(f"beta:{steps}" for steps in (4, 5, 6, 7, 8, 10, 12, 14, 20, 28)),
            *(f"dpm:{steps}" for steps in (4, 5, 6, 7, 8, 10, 12)),
            _PRESETS,
            _RIVALS,
        ]
    ),
    "presets": f"dense:50,dense:7,beta:6,beta:7,beta:11,dpm:4,dpm:5,dpm:6,dpm:7,dpm:12,{_PRESETS}",
}


def _run(methods: str, options: Options, prompts: int = 256, out: Path = Path("out/quality")) -> Iterator[Measurement]:
    parser = argparse.ArgumentParser()
    eval.add_arguments(parser)
    given = ["--methods", methods, "--prompts", str(prompts), "--seed", str(options.seed), "--out", str(out)]
    eval.run(parser.parse_args([*given, "--device", str(options.device)]))
    for line in (out / "table.jsonl").read_text().splitlines():
        record = json.loads(line)
        shown = ", ".join(f"{name} {each['value']:.3g}" for name, each in record["qualities"].items())
        line = f"{record['method']}: {record['cost_dense_steps']:.2f} dense steps, {shown}"
        yield Measurement(line=line, fields={**record, "benchmark": "quality"})


def _why_not(options: Options) -> str | None:
    return None


CASES = tuple(
    Case(group="quality", size=size, name=size, run=functools.partial(_run, methods), why_not=_why_not, is_long=True)
    for size, methods in METHODS.items()
)
