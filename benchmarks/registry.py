"""Defines benchmark cases and finds them in the modules of `benchmarks/cases` and `benchmarks/checkout`.

Every module with cases has a tuple `CASES`. `checkout` only exists in a checkout.
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
    """Options of the command line that apply to every case. `only` selects parts whose names contain this text."""

    device: torch.device
    repeat: int
    seed: int
    only: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: a line to print, and fields for a file with the unit in each name."""

    line: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        group: The group it belongs to.
        size: Its size within the group.
        name: Its name, which identifies its rows.
        run: Measures it and yields rows.
        why_not: Returns why it cannot be measured here; None if it can.
        is_long: Whether it takes hours, so that it only runs if its group is named.
        parts: Names of parts that can be measured separately.
    """

    group: str
    size: str
    name: str
    run: Callable[[Options], Iterator[Measurement]]
    why_not: Callable[[Options], str | None]
    is_long: bool = False
    parts: tuple[str, ...] = ()

    def part_of(self, text: str) -> str | None:
        """Returns what a text selects: "" for the whole case, the text itself for some parts, None for nothing."""
        if text in self.name:
            return ""
        return text if any(text in part for part in self.parts) else None


def find_cases() -> tuple[Case, ...]:
    """Returns the cases of all modules, ordered by module name."""
    found: list[Case] = []
    for package in (cases, *_of_checkout()):
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
            found += getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CASES", ())
    return tuple(found)


def _of_checkout() -> list[ModuleType]:
    """Returns the package of cases that are not installed; empty unless run as `python -m benchmarks`."""
    is_here = __package__ == "benchmarks" and importlib.util.find_spec("benchmarks.checkout") is not None
    return [importlib.import_module("benchmarks.checkout")] if is_here else []


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, the 20th and the 80th percentile, interpolated."""
    values = torch.tensor(seconds, dtype=torch.float64)
    median, low, high = torch.quantile(values, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return median, low, high
