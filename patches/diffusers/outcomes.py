"""Outcomes of the requests in a batch. A request that fails does not affect the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jitaccel.generation.batch import OnOutcome, Outcome, Request

from ..network import Result

OF_THE_CALLER = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)  # these end the whole batch


class Outcomes(dict[int, Outcome]):
    """Outcomes by request index; each is reported as soon as it is known."""

    def __init__(self, on_outcome: OnOutcome | None) -> None:
        super().__init__()
        self._on_outcome = on_outcome

    def __setitem__(self, index: int, outcome: Outcome) -> None:
        super().__setitem__(index, outcome)
        if self._on_outcome is not None:
            self._on_outcome(index, outcome)


def attempt(outcomes: dict[int, Outcome], index: int, request: Request, work: Callable[[], Result]) -> Result | None:
    """Returns the result of `work`. If it fails, stores the error as the outcome of its request and returns None."""
    try:
        return work()
    except OF_THE_CALLER:
        raise
    except BaseException as error:  # the other requests go on
        outcomes[index] = Outcome(request, as_exception(error))
        return None


def as_exception(error: BaseException) -> Exception:
    """Returns an error that `except Exception` catches, which panics of Rust code (tokenizers) are not."""
    if isinstance(error, Exception):
        return error
    what = f"{type(error).__name__}: {error}"
    wrapped = RuntimeError(f"generate_batch: the request must be runnable, got {what}; change its prompt")
    wrapped.__cause__ = error
    return wrapped
