"""Runs work in a separate thread, and reads its results one by one while it runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

THREAD = "jitaccel app"
"""The name of the thread."""

Item = TypeVar("Item")
_Message = tuple[Item | None, BaseException | None]
"""(an item, None), or (None, the error that ended the work); both are None when the work is done."""


class _GivenUpError(Exception):
    """Ends the work from inside, because its items are no longer read."""


def yield_from_thread(work: Callable[[Callable[[Item], None]], None]) -> Iterator[Item]:
    """Yields the items that `work` hands over as they come; closing this generator ends the work at its next item.

    Args:
        work: Receives the function to hand items over with. Its exceptions are raised here.
    """
    messages: queue.SimpleQueue[_Message[Item]] = queue.SimpleQueue()
    given_up = threading.Event()

    def hand_over(item: Item) -> None:
        if given_up.is_set():
            raise _GivenUpError
        messages.put((item, None))

    def run() -> None:
        try:
            work(hand_over)
            messages.put((None, None))
        except BaseException as error:  # raised again in the thread that reads
            messages.put((None, error))

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    try:
        while (message := messages.get())[0] is not None:
            yield message[0]
    finally:
        given_up.set()
        thread.join()
    if message[1] is not None:
        raise message[1]
