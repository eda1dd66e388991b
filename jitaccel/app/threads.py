"""Work in a thread of its own, whose results are read one by one while it runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

THREAD = "jitaccel app"
"""The name of the thread."""

Item = TypeVar("Item")
_Message = tuple[Item | None, BaseException | None]
"""(an item, None), or (None, why there are no more); the work is done where both are None."""


class _GivenUpError(Exception):
    """Nobody reads the items any more; ends the work from inside."""


def yield_from_thread(work: Callable[[Callable[[Item], None]], None]) -> Iterator[Item]:
    """Yields what `work` hands over, as it does so; closing this ends the work at what it hands over next.

    Args:
        work: Takes the function to hand items over with. What it raises is raised here.
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
