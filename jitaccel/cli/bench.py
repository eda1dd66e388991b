"""Measure speed on this machine: operators, denoising, packing, compiled stages, start-up."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments, which `python -m benchmarks` uses too."""
    parser.add_argument("group", nargs="?", help="auto, denoise, kernels, ... (--list); if omitted, all but long ones")
    parser.add_argument("--size", help="model size, such as small, large, flux; if omitted, all")
    parser.add_argument("--only", metavar="TEXT", help="only cases, or operators, whose name contains this text")
    parser.add_argument("--repeat", type=_positive, default=5, help="how often each method is timed")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and random weights")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA if present")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line per measurement to this file")
    parser.add_argument("--resume", action="store_true", help="skip cases that are complete in --json's file")
    parser.add_argument("--within", type=_ratio, metavar="SECONDS", help="start no new case after this many seconds")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="JSON lines of an earlier run to compare with")
    parser.add_argument(
        "--fail-above", type=_ratio, metavar="RATIO", help="exit with 1 if a time is above RATIO times --compare's"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and stop")


def run(arguments: argparse.Namespace) -> int:
    """Runs the requested cases; returns 0, 1 if one is slower than --fail-above allows, or 2 for bad input."""
    if arguments.list:
        return list_cases()
    # Imported by name, because in a checkout type checkers would see the same folder twice, also as `benchmarks`.
    return int(importlib.import_module("jitaccel.benchmarks.__main__").run(arguments))


def list_cases(more: Sequence[Sequence[str]] = ()) -> int:
    """Prints group, size and name of each case and of `more`, without importing torch."""
    listing = importlib.import_module("jitaccel.benchmarks.listing")
    for group, size, name in (*listing.CASES, *more):
        print(f"{group:10} {size:8} {name}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _ratio(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, such as 1.1, got {text}")
    return number
