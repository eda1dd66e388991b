"""Defines a campaign: numbered cases, counts, and survivors."""

from __future__ import annotations

import datetime
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

SEED = "JITACCEL_CAMPAIGN_SEED"
_MOST_BYTES = 4 << 30  # memory limit of a case, because absurd sizes must not exhaust the machine
_HANGS_AFTER_S = 120  # one case; on a busy machine the slowest takes a few seconds


class Survivor(AssertionError):
    """A defect found by a campaign, such as a wrong picture, an error without a name, or a half-written file."""

    def __init__(self, what: str) -> None:
        super().__init__(ascii(what)[1:-1])  # halves of surrogate pairs cannot be printed


class _Hangs(BaseException):
    """Raised if a case takes too long; not an Exception, so that no `except Exception` catches it."""


@dataclass(kw_only=True)
class Counts:
    """Counts of operations, and of faults (exceptions, damage, malformed values, kills)."""

    operations: int = 0
    faults: int = 0


Case = Callable[[random.Random, Counts], None]


@dataclass(kw_only=True)
class Result:
    """The result of a campaign. `survivors` has a line for each, with the command that repeats the case."""

    name: str
    cases: int = 0
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    survivors: list[str] = field(default_factory=list)


def seed_of_today() -> int:
    """Returns the seed from the environment, or one made of today's date, such as 20261129."""
    return int(os.environ.get(SEED) or datetime.date.today().strftime("%Y%m%d"))


def run(name: str, case: Case, seed: int, numbers: Iterator[int], until: Callable[[], bool]) -> Result:
    """Runs the cases with these numbers until `until` returns true, and returns the result."""
    result, start = Result(name=name), time.perf_counter()
    for number in numbers:
        if until():
            break
        result.cases += 1
        try:
            with _no_longer_than(_HANGS_AFTER_S), _no_larger_by(_MOST_BYTES):
                case(random.Random(f"{seed}/{name}/{number}"), result.counts)
        except (Exception, _Hangs) as error:
            again = f"python -m tests.campaigns --only {name} --seed {seed} --case {number}"
            where = "" if isinstance(error, Survivor) else f" at {traceback.format_exc().strip().splitlines()[-3:]}"
            result.survivors.append(f"{type(error).__name__}: {error}{where}; again: {again}"[:2000])
    result.seconds = time.perf_counter() - start
    return result


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise _Hangs(f"a case must end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _no_larger_by(size: int) -> Iterator[None]:
    """Limits the process's memory, except with AddressSanitizer, whose shadow memory alone is larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if "asan" not in os.environ.get("LD_PRELOAD", "") and statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
