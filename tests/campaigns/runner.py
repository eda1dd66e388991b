"""Runs campaigns for a given time, divided among them; worker processes import this file."""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import time
import warnings

import torch

from tests.campaigns.campaign import Case, Result, run

SHARES = {
    "operations": 0.20, "faults": 0.30, "arguments": 0.20, "exports": 0.06, "operators": 0.06, "threads": 0.10,
    "kills": 0.08,
}  # fmt: skip
"""Share of the time for each campaign."""


def case_of(name: str) -> Case:
    """Returns the case function of a campaign."""
    case: Case = importlib.import_module(f"tests.campaigns.{name}").case
    return case


def campaign(name: str, seed: int, seconds: float, start: int = 0, stride: int = 1) -> Result:
    """Returns the result of a campaign that begins no case after `seconds` seconds."""
    case = case_of(name)  # before the clock starts, because importing takes as long as a small campaign
    end = time.monotonic() + seconds
    return run(name, case, seed, itertools.count(start, stride), lambda: time.monotonic() >= end)


def process(given: tuple[dict[str, float], int, int, int]) -> list[Result]:
    """Runs all campaigns in one process, every `stride`-th case of each."""
    seconds, seed, start, stride = given
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = []
    for name, each in seconds.items():
        found.append(campaign(name, seed, each, start, stride))
        print(found[-1], file=sys.stderr, flush=True)  # the results so far, in case the run is interrupted
    return found
