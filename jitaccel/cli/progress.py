"""A progress bar for what takes minutes: export, and the timing of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with how much is done and how much there is; the bar is on stderr."""
    from tqdm import tqdm

    with tqdm(desc=title, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
