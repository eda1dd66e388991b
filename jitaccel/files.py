"""Atomic file writes: content goes to a temporary file in the same folder, which is then renamed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a hidden temporary path in the same folder, and moves it to `path` when the block succeeds.

    If the block fails, the temporary file is deleted and an existing file at `path` is untouched. A killed process
    leaves the temporary file behind.

    Args:
        path: The file to write. Its folder must exist. The temporary path has the same suffix.
    """
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically; text is encoded as UTF-8."""
    with whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_there(path: Path) -> bool:
    """Returns whether a path exists; False also where the system cannot check, as for a name that is too long."""
    try:
        return path.exists()
    except OSError:
        return False
