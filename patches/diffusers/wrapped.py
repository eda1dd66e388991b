"""Methods of a scheduler or pipeline that a handle has wrapped, on the instance alone."""

from __future__ import annotations

import functools
from typing import Any

from jitaccel.generation.handle import HANDLE, Handle, Patched

from ..foreign import Forward


def scheduler_handle(scheduler: object) -> Handle | None:
    """Returns the handle whose patch a scheduler carries, or None."""
    return getattr(vars(scheduler).get("set_timesteps"), HANDLE, None)


def wrap(original: Forward, wrapper: Forward, handle: Handle) -> Patched:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if not handle.is_active:
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    patched = Patched(method)
    setattr(patched, HANDLE, handle)
    return patched
