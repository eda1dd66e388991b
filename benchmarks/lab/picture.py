"""Plots quality against cost of controls, rivals and presets: `python -m benchmarks.lab.picture docs/quality.png`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitaccel.evaluation.quality.pareto import pareto_picture
from jitaccel.method.presets import PRESETS

from ..table import RESULTS, read_results
from .report import BENCHMARK

QUALITIES = ("attributes", "frechet", "perceptual", "spectrum_db")
_CASES = ("controls", "rivals")


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the records to plot, each method once, with the reference first."""
    of_lab = [row for row in rows if row["benchmark"] == BENCHMARK]
    found = {row["method"]: row for row in of_lab if row["case"] in _CASES or row["method"] in PRESETS}
    return sorted(found.values(), key=lambda row: row["method"] != row["reference"])


def main(argv: Sequence[str] | None = None) -> int:
    """Plots committed results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON lines")
    options = parser.parse_args(argv)
    records = shown(read_results(options.results))
    if not records:
        parser.error(f"--results must hold rows of the lab, got none in {options.results}; make them: benchmarks.lab")
    pareto_picture(records, QUALITIES).save(options.file, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
