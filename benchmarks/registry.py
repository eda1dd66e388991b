"""What a benchmark case is, and where cases are found: modules of `benchmarks/cases` and `benchmarks/checkout`.

Each that has cases has a tuple `CASES`. `checkout` is there in a checkout alone.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import cases


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks of every case. `only`: text in the names of the parts to measure."""

    device: torch.device
    repeat: int
    seed: int
    only: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: a line for people, and fields for a file, the unit in each name."""

    line: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure. `why_not` says why it cannot be measured here, or None.

    is_long: it takes hours, and runs only where its group is named. parts: names of what it measures one after
    another, if it can measure some of them.
    """

    group: str
    size: str
    name: str
    run: Callable[[Options], Iterator[Measurement]]
    why_not: Callable[[Options], str | None]
    is_long: bool = False
    parts: tuple[str, ...] = ()

    def part_of(self, text: str) -> str | None:
        """Returns what a text asks for: "" for the whole case, the text for some of its parts, None for nothing."""
        if text in self.name:
            return ""
        return text if any(text in part for part in self.parts) else None


def find_cases() -> tuple[Case, ...]:
    """Returns the cases of every module that has some, by the modules' names."""
    found: list[Case] = []
    for package in (cases, *_of_checkout()):
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
            found += getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CASES", ())
    return tuple(found)


def _of_checkout() -> list[ModuleType]:
    """Returns the package of cases that are not installed, where this is run as `python -m benchmarks`."""
    is_here = __package__ == "benchmarks" and importlib.util.find_spec("benchmarks.checkout") is not None
    return [importlib.import_module("benchmarks.checkout")] if is_here else []


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Returns median, 20th and 80th percentile, interpolated."""
    values = torch.tensor(seconds, dtype=torch.float64)
    median, low, high = torch.quantile(values, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return median, low, high
