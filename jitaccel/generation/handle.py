"""The handle that `apply` returns. It owns every change to the target and can undo them all."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..errors import ConfigError
from ..method.config import JiTConfig
from . import registry
from .stats import Stats
from .warm_sizes import checked_batches, checked_sizes

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from torch import Tensor

    from ..speed.auto import Choice
    from ..view.playback import Playback, Previews
    from .route import History

MISSING = object()
HANDLE = "_jitaccel_handle"  # the attribute that links a replaced method to its handle
_BEFORE = "_jitaccel_before"  # the attribute of a patched instance that stores the original values


class Route(Protocol):
    """What a patch runs calls through; the handle reads its statistics and resets it."""

    config: JiTConfig

    @property
    def history(self) -> History | None: ...

    def stats(self) -> Stats: ...

    def reset(self) -> None: ...


class Uncopied:
    """Part of a patched instance that refuses to be copied, because the copy would run the original's weights."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises TypeError; `copy.deepcopy` calls this too."""
        raise TypeError(
            "jitaccel: a model must not be patched when it is copied or pickled, because the copy would run the "
            "original's weights; remove() the handle, copy, and apply to each"
        )


class Patched(Uncopied):
    """A function that replaces a method of one instance."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _release_nothing() -> None:
    """Does nothing; nothing was built that has to be released."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What a patch has checked and built for a target, before any change is made.

    Attributes:
        route: The object that calls will run through.
        install: Makes the changes to a target through a handle, which undoes them. Must not hold a reference to the
            target.
        release: Frees what was built (compiled graphs); called when the changes are undone.
        check_idle: Raises if the changes cannot be undone now because another thread depends on them.
        replaces: Handles to remove first, besides the one of the same target.
        generate: Makes pictures of an empty prompt for a warm-up: (target, height, width, batch, further arguments).
            None for a target that runs in the user's own loop.
        decode: Makes pictures for a report: (target, tokens (1, N, D), grid, latents along a token's side) to (frames,
            H, W, 3) in [0, 1]. None if the target has no autoencoder.
    """

    route: Route
    install: Callable[[Any, Handle], None]
    release: Callable[[], None] = _release_nothing
    check_idle: Callable[[], None] = _release_nothing
    replaces: tuple[Handle, ...] = ()
    generate: Callable[[Any, int, int, int, Mapping[str, Any]], object] | None = None
    decode: Callable[[Any, Tensor, tuple[int, ...], int], Tensor] | None = None


class Handle:
    """The changes made by one `apply`. Use it as a context manager or call `remove()`; removing twice is harmless.

    The handle does not keep its target, or parts of it, alive.

    Attributes:
        choice: What `preset="auto"` picked, and why; None for other presets.
    """

    def __init__(self, target: Any, installation: Installation) -> None:
        self._target = weakref.ref(target)
        self._kind = type(target).__name__
        self._installation = installation
        self.route = installation.route
        self.choice: Choice | None = None
        self._undo: list[Callable[[], None]] = []
        self._changes: list[str] = []

    @property
    def replaces(self) -> tuple[Handle, ...]:
        """The handles to remove when this one is installed, besides the one of the same target."""
        return self._installation.replaces

    @property
    def target(self) -> Any:
        """The patched pipeline or model; None once it has been garbage-collected."""
        return self._target()

    @property
    def config(self) -> JiTConfig:
        """The configuration."""
        return self.route.config

    @property
    def is_active(self) -> bool:
        """Whether the changes are in place."""
        return bool(self._changes)

    def install(self) -> None:
        """Makes the changes. If this fails half way, `remove` undoes what was done."""
        target = self.target
        if target is None:
            raise RuntimeError("Handle.install: the target must be alive, got one that is gone; apply to another")
        self._installation.install(target, self)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name` on this instance only; `remove` restores the earlier value, or its absence.

        A value that other code has set there since then is left in place: it may call ours, which then passes calls
        through.
        """
        attributes = vars(owner)
        self.change(f"{type(owner).__name__}.{name}", _put_back, weakref.ref(owner), name, weakref.ref(value))
        # Stored on the owner, so that a handle that outlives it keeps nothing of it alive.
        attributes.setdefault(_BEFORE, {})[name] = attributes.get(name, MISSING)
        attributes[name] = value

    def change(self, what: str, undo: Callable[..., None], *args: Any) -> None:
        """Records a change before it is made. Its undo must be harmless if the change was not made, or if run twice.

        Arguments must hold owners by weak reference.
        """
        self._undo.append(functools.partial(undo, *args))
        self._changes.append(what)

    def on_remove(self, undo: Callable[..., None], *args: Any) -> None:
        """Registers a function that `remove` calls; the one registered last is called first."""
        self._undo.append(functools.partial(undo, *args))

    def warmup(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_sizes: Sequence[int] = (1,),
        *,
        progress: bool = True,
        **call: Any,
    ) -> Stats:
        """Makes and discards one picture of each size and batch, which compiles every stage before the first request.

        Args:
            sizes: (height, width) in pixels.
            batch_sizes: Images per call.
            progress: Whether to show a progress bar.
            **call: Further arguments of the pipeline, as later requests will pass them: a different prompt length
                (`max_sequence_length`) or guidance needs its own graphs. The prompt is empty.

        Returns:
            The statistics.

        Raises:
            ConfigError: If the target is not a pipeline, or is one that takes no size; call such a target once instead.
        """
        pipeline, generate = self.target, self._installation.generate
        if generate is None:
            raise ConfigError(
                f"Handle.warmup: the target must be a pipeline, got {self._kind}; run your own loop once instead"
            )
        if pipeline is None:
            raise ConfigError(
                f"Handle.warmup: the pipeline must be alive, got a {self._kind} that is gone; keep it in a "
                f"variable, because a handle does not keep it alive"
            )
        todo = [(*size, batch) for size in checked_sizes(sizes) for batch in checked_batches(batch_sizes)]
        if progress:
            from tqdm import tqdm

            todo = tqdm(todo, desc="warm-up", unit="size")
        for height, width, batch in todo:
            generate(pipeline, height, width, batch, call)
        return self.stats()

    def stats(self) -> Stats:
        """Returns statistics of the last generation: tokens, operations and time of each step, and what ran and why."""
        return self.route.stats()

    def record(self, image: int | None = 0) -> Handle:
        """Stores what a report needs of each generation from the next one on: one image's state at each step.

        Nothing is stored unless this is called. State and clean estimate are copied in float16 to the CPU, 1 MiB per
        step for FLUX.1 at 1024x1024. The picture is the same bit for bit. Only the last generation is kept.

        Args:
            image: Index of the image in the batch, from 0. None stops recording and discards what was stored.

        Returns:
            This handle.

        Raises:
            ConfigError: For an invalid index, and for a target that `on_unsupported="dense"` left unpatched.
        """
        if image is not None and (not isinstance(image, int) or isinstance(image, bool) or image < 0):
            raise ConfigError(f"Handle.record: image must be an index from 0, or None, got {image!r}")
        history = self.route.history
        if history is None:
            raise ConfigError(
                f"Handle.record: the target must be patched, got a {self._kind} that runs dense, untouched; "
                f"handle.stats() says why"
            )
        history.record(image)
        return self

    def playback(
        self,
        name: str | None = None,
        *,
        prompt: str | None = None,
        previews: Previews = "auto",
        frames: int = 12,
        progress: bool = True,
    ) -> Playback:
        """Returns the pictures of each step of the last generation, for `jitaccel.view.write_report`.

        Args:
            name: Name in the report; defaults to the preset's name.
            prompt: The prompt to show.
            previews: "vae" decodes each step with the pipeline's autoencoder. "colours" shows the main directions of
                the latents as colours, which costs nothing. "auto" uses the autoencoder if there is one.
            frames: Maximum number of video frames.
            progress: Whether to show a progress bar.

        Raises:
            ConfigError: If nothing was recorded, and for `previews="vae"` without an autoencoder.
        """
        from ..view.playback import make_playback

        history, target = self.route.history, self.target
        if history is None or history.tape is None or not history.tape.frames:
            raise ConfigError(
                "Handle.report: a generation must have been recorded, got none; call handle.record() before it"
            )
        decode = self._installation.decode if getattr(target, "vae", None) is not None else None
        return make_playback(
            history.tape,
            self.stats(),
            decode=None if decode is None else functools.partial(decode, target),
            name=name,
            prompt=prompt,
            previews=previews,
            most_frames=frames,
            progress=progress,
        )

    def report(
        self,
        path: str | PathLike[str],
        *,
        name: str | None = None,
        prompt: str | None = None,
        previews: Previews = "auto",
        progress: bool = True,
    ) -> Path:
        """Writes the last generation as one self-contained HTML file with a slider over its steps.

        Call `record()` before the generation. docs/report.md shows how to compare several generations in one report.

        Args:
            path: The file to write, at most 5 MB.
            name: Name in the report; defaults to the preset's name.
            prompt: The prompt to show.
            previews: As in `playback`.
            progress: Whether to show a progress bar.

        Returns:
            The path.

        Raises:
            ConfigError: As `playback`, and if Pillow is missing.
        """
        from ..view.page import write_report

        return write_report(path, [self.playback(name, prompt=prompt, previews=previews, progress=progress)])

    def reset(self) -> None:
        """Discards an unfinished generation. A loop without a pipeline may call this before it starts a new one."""
        self.route.reset()

    def remove(self) -> None:
        """Undoes every change, the last one first.

        If one undo fails, the others still run and its error is raised at the end; the next call retries what failed or
        was interrupted.

        Raises:
            RuntimeError: If another thread is generating with the target; then nothing is undone.
        """
        self._installation.check_idle()
        self._changes.clear()
        failed: list[Callable[[], None]] = []
        error: Exception | None = None
        try:
            while self._undo:
                try:
                    self._undo[-1]()
                except Exception as caught:
                    failed.append(self._undo[-1])
                    error = error or caught
                self._undo.pop()
        finally:
            self._undo += reversed(failed)
        self._installation.release()
        self.route.reset()
        if error is not None:
            raise error
        registry.forget(self)

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

    def _repr_html_(self) -> str:
        from ..view.notebook import handle_html

        return handle_html(repr(self), self.stats())


def _put_back(owner: weakref.ref[Any], name: str, ours: weakref.ref[Any]) -> None:
    instance = owner()
    if instance is None:
        return
    attributes = vars(instance)
    kept = attributes.get(_BEFORE, {})
    if name in kept:
        if attributes.get(name, MISSING) is ours():
            restore_attributes(attributes, {name: kept[name]})
        del kept[name]
    if not kept:
        attributes.pop(_BEFORE, None)


def restore_attributes(attributes: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Restores the values that `vars` of an object held before; those that were `MISSING` are deleted."""
    for name, value in before.items():
        if value is MISSING:
            attributes.pop(name, None)
        else:
            attributes[name] = value
