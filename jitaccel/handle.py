"""The handle that `apply` returns: it owns every change made, and takes all of them back."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

from .config import JiTConfig
from .stats import Stats

_MISSING = object()


class Route(Protocol):
    """What a patch runs calls through; a handle asks it for statistics and tells it to forget a generation."""

    config: JiTConfig

    def stats(self) -> Stats: ...

    def reset(self) -> None: ...


class Handle:
    """What one `apply` changed. Use it as a context manager, or call `remove()`; removing twice is harmless."""

    def __init__(self, target: Any, route: Route) -> None:
        # Weak: what is patched holds the handle, and must not keep a pipeline alive that its user has let go.
        self._target = weakref.ref(target)
        self._kind = type(target).__name__
        self.route = route
        self._undo = ExitStack()
        self._changes: list[str] = []

    @property
    def target(self) -> Any:
        """The pipeline or model that was patched; None once it is gone."""
        return self._target()

    @property
    def config(self) -> JiTConfig:
        """What runs."""
        return self.route.config

    @property
    def is_active(self) -> bool:
        """Whether the changes are in place."""
        return bool(self._changes)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name` on the instance alone; `remove` puts back what stood there, or its absence."""
        self.change(f"{type(owner).__name__}.{name}")
        self.restore_attribute_on_remove(owner, name)
        vars(owner)[name] = value

    def restore_attribute_on_remove(self, owner: Any, name: str) -> None:
        """Notes what `vars(owner)` holds under `name` now, to be put back by `remove`."""
        self._undo.callback(_restore, vars(owner), name, vars(owner).get(name, _MISSING))

    def change(self, what: str, undo: Any = None, *args: Any) -> None:
        """Notes one change, and how it is undone."""
        self._changes.append(what)
        if undo is not None:
            self._undo.callback(undo, *args)

    def stats(self) -> Stats:
        """Returns what the last generation did: tokens, operations and time of each step, and what ran and why."""
        return self.route.stats()

    def reset(self) -> None:
        """Forgets a generation that was left unfinished; a loop that knows no pipeline may call it before a new one."""
        self.route.reset()

    def remove(self) -> None:
        """Takes every change back, the last first."""
        self.route.reset()
        self._changes.clear()
        self._undo.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        changes = ", ".join(self._changes) if self._changes else "removed"
        return f"<jitaccel.Handle of {self._kind}: {changes}>"


def _restore(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        attributes.pop(name, None)
    else:
        attributes[name] = value
