"""A progress bar for work that takes minutes: exporting, and timing steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with the amount done and the total; the bar is on stderr."""
    from tqdm import tqdm

    with tqdm(desc=title, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
