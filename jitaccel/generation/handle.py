"""The handle that `apply` returns: it owns every change made, and takes all of them back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import ConfigError
from ..method.config import JiTConfig
from .stats import Stats

if TYPE_CHECKING:
    from ..speed.auto import Choice

MISSING = object()
HANDLE = "_jitaccel_handle"  # the attribute under which what is patched knows its handle


class Route(Protocol):
    """What a patch runs calls through; a handle asks it for statistics and tells it to forget a generation."""

    config: JiTConfig

    def stats(self) -> Stats: ...

    def reset(self) -> None: ...


class Patched:
    """A function in place of a method of one instance, which a copy of the instance must not take along.

    It would run what it was copied from.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise refuse_copy()


def refuse_copy() -> TypeError:
    """Returns the error of copying what is patched."""
    return TypeError(
        "jitaccel: what is copied must not be patched, since the copy would run the original's weights; remove() the "
        "handle, copy, and apply to each"
    )


class Handle:
    """What one `apply` changed. Use it as a context manager, or call `remove()`; removing twice is harmless.

    choice: what `preset="auto"` picked, and why; None for other presets.
    """

    def __init__(self, target: Any, route: Route) -> None:
        # Weak: what is patched holds the handle, and must not keep a pipeline alive that its user has let go.
        self._target = weakref.ref(target)
        self._kind = type(target).__name__
        self.route = route
        self.choice: Choice | None = None
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
        """Sets `owner.name` on the instance alone; `remove` puts back what stood there, or its absence.

        Where somebody has put another value there since, that stays: it may call ours, which then passes calls on.
        """
        self.change(f"{type(owner).__name__}.{name}")
        self.on_remove(_put_back, vars(owner), name, value, vars(owner).get(name, MISSING))
        vars(owner)[name] = value

    def on_remove(self, undo: Callable[..., None], *args: Any) -> None:
        """Notes what `remove` has to call, the last noted first."""
        self._undo.callback(undo, *args)

    def change(self, what: str, undo: Any = None, *args: Any) -> None:
        """Notes one change, and how it is undone."""
        self._changes.append(what)
        if undo is not None:
            self._undo.callback(undo, *args)

    def warmup(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_sizes: Sequence[int] = (1,),
        *,
        progress: bool = True,
        **call: Any,
    ) -> Stats:
        """Makes one picture of each size and batch, and drops it: compiles every stage before the first request.

        sizes: (height, width) in pixels. call: further arguments of the pipeline, as requests will have them: the
            length of prompts (`max_sequence_length`) and guidance make graphs of their own. The prompt is empty.
        Returns the statistics. Raises ConfigError where what was patched is no pipeline: call your own loop once.
        """
        pipeline = self.target
        if not hasattr(pipeline, "encode_prompt"):
            raise ConfigError(
                f"Handle.warmup: what was patched must be a pipeline, got {self._kind}; run your own loop once instead"
            )
        todo = [(height, width, batch) for height, width in sizes for batch in batch_sizes]
        if progress:
            from tqdm import tqdm

            todo = tqdm(todo, desc="warm-up", unit="size")
        for height, width, batch in todo:
            settings = {"prompt": "", "num_images_per_prompt": batch, "output_type": "latent", **call}
            generator = torch.Generator().manual_seed(0)
            pipeline(height=height, width=width, generator=generator, **settings)
        return self.stats()

    def stats(self) -> Stats:
        """Returns what the last generation did: tokens, operations and time of each step, and what ran and why."""
        return self.route.stats()

    def reset(self) -> None:
        """Forgets a generation that was left unfinished; a loop that knows no pipeline may call it before a new one."""
        self.route.reset()

    def remove(self) -> None:
        """Takes every change back, the last first."""
        self._changes.clear()
        self._undo.close()
        self.route.reset()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        changes = ", ".join(self._changes) if self._changes else "removed"
        auto = "" if self.choice is None else f"; auto: {self.choice}"
        return f"<jitaccel.Handle of {self._kind}: {changes}{auto}>"


def _put_back(attributes: dict[str, Any], name: str, ours: Any, before: Any) -> None:
    if attributes.get(name, MISSING) is ours:
        restore_attributes(attributes, {name: before})


def restore_attributes(attributes: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Puts back into `vars` of an object what it held before; what was `MISSING` is taken out."""
    for name, value in before.items():
        if value is MISSING:
            attributes.pop(name, None)
        else:
            attributes[name] = value
