"""Files that are whole under their names: written next to their place, and moved there when all is in them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a hidden name in the same folder to write to, and moves what was written to `path` at the end.

    Where the writer fails, nothing of it stays, and what was at `path` before is still there. A process that is killed
    leaves the hidden file.

    Args:
        path: The file to be; its folder exists. Its suffix is that of the name given.
    """
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all; text in UTF-8."""
    with whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def is_there(path: Path) -> bool:
    """Returns whether a path stands for something; not where the system cannot even ask (a name that is too long)."""
    try:
        return path.exists()
    except OSError:
        return False
