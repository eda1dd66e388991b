"""The registry of patched targets and their handles.

It holds targets by weak reference: an entry disappears with its target, and keeps no model alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handle import Handle

_HANDLES: dict[int, tuple[weakref.ref[Any], Handle]] = {}


def handle_of(target: Any) -> Handle | None:
    """Returns the handle that has patched `target`, or None if it is not patched.

    Args:
        target: The pipeline or model that was passed to `apply`; the same object, not a part of it.
    """
    found = _HANDLES.get(id(target))
    return found[1] if found is not None and found[0]() is target else None


def remove(target: Any) -> bool:
    """Removes what was applied to `target`, even if its handle was lost; returns whether anything was removed.

    Args:
        target: The pipeline or model that was passed to `apply`.
    """
    handle = handle_of(target)
    if handle is None:
        return False
    handle.remove()
    return True


def put_in_place(handle: Handle) -> None:
    """Installs a handle in place of the one that patched its target before.

    If that fails or is interrupted, its changes are undone and the earlier handle is installed again.
    """
    target = handle.target
    before = handle_of(target)
    replaced = [each for each in dict.fromkeys((before, *handle.replaces)) if each is not None and each is not handle]
    try:
        for each in replaced:
            each.remove()
        handle.install()
        note(handle)
    except BaseException:
        handle.remove()
        for each in reversed(replaced):
            if each.target is not None and not each.is_active:
                each.remove()  # finishes what was interrupted
                each.install()
                note(each)
        raise


def note(handle: Handle) -> None:
    """Registers an installed handle."""
    target = handle.target
    key = id(target)
    _HANDLES[key] = (weakref.ref(target, lambda gone: _forget_dead(key, gone)), handle)


def forget(handle: Handle) -> None:
    """Removes the entry of a handle that was removed, unless another handle has taken its place."""
    for key, (_, known) in [*_HANDLES.items()]:
        if known is handle:
            del _HANDLES[key]


def _forget_dead(key: int, gone: weakref.ref[Any]) -> None:
    found = _HANDLES.get(key)
    if found is not None and found[0] is gone:
        del _HANDLES[key]
