"""What becomes of each request of a batch: one that fails leaves the others alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jitaccel.generation.batch import OnOutcome, Outcome, Request

from ..network import Result

OF_THE_CALLER = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)  # who wants all of it to end


class Outcomes(dict[int, Outcome]):
    """Outcomes by the index of their request; each is told once it is known."""

    def __init__(self, on_outcome: OnOutcome | None) -> None:
        super().__init__()
        self._on_outcome = on_outcome

    def __setitem__(self, index: int, outcome: Outcome) -> None:
        super().__setitem__(index, outcome)
        if self._on_outcome is not None:
            self._on_outcome(index, outcome)


def attempt(outcomes: dict[int, Outcome], index: int, request: Request, work: Callable[[], Result]) -> Result | None:
    """Returns what `work` returns; where it fails, its request has its outcome."""
    try:
        return work()
    except OF_THE_CALLER:
        raise
    except BaseException as error:  # the other requests go on
        outcomes[index] = Outcome(request, as_exception(error))
        return None


def as_exception(error: BaseException) -> Exception:
    """Returns an error that `except Exception` catches: what panics in Rust (tokenizers) is none."""
    if isinstance(error, Exception):
        return error
    what = f"{type(error).__name__}: {error}"
    wrapped = RuntimeError(f"generate_batch: the request must be one that can be run, got {what}; change its prompt")
    wrapped.__cause__ = error
    return wrapped
