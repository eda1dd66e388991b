"""Pages of memory in the measurements of operators on the CPU."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept_memory() -> Iterator[None]:
    """Makes glibc keep freed memory in the process's heap within this context; does nothing with other C libraries.

    By default glibc returns large blocks to the system, and the output of each call consists of new pages.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # from malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:  # the values that glibc itself reaches after large blocks; once set, it no longer adapts them
        mallopt(mmap_max, 65_536)
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def page_faults(function: Callable[[], Any], calls: int = 5) -> float | None:
    """Returns the average number of page faults of a call; None on Windows, which does not report them."""
    if sys.platform == "win32":
        return None
    import resource

    function()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
