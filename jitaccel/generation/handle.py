"""The handle that `apply` returns: it owns every change made, and takes all of them back."""

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
HANDLE = "_jitaccel_handle"  # the attribute under which a replaced method knows its handle
_BEFORE = "_jitaccel_before"  # the attribute of an instance under which lies what was replaced on it


class Route(Protocol):
    """What a patch runs calls through; a handle asks it for statistics and tells it to forget a generation."""

    config: JiTConfig

    @property
    def history(self) -> History | None: ...

    def stats(self) -> Stats: ...

    def reset(self) -> None: ...


class Uncopied:
    """Stands on a patched instance, and goes into no copy of it: there it would run the original."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises TypeError; `copy.deepcopy` asks here, too."""
        raise TypeError(
            "jitaccel: what is copied or pickled must not be patched, since the copy would run the original's weights; "
            "remove() the handle, copy, and apply to each"
        )


class Patched(Uncopied):
    """A function in place of a method of one instance."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _release_nothing() -> None:
    """Nothing was built that has to be let go."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What a patch has checked and built for a target, of which nothing is changed yet.

    Attributes:
        route: What calls will run through.
        install: Makes the changes to a target through a handle, which undoes them. It must not hold the target.
        release: Lets go of what was built (compiled graphs); called when the changes are undone.
        check_idle: Raises where the changes must not be undone now, since another thread depends on them.
        replaces: Handles to remove first, besides the one of the same target.
        generate: Makes pictures of an empty prompt, (target, height, width, batch, further arguments), for a warm-up;
            None where only a loop of somebody's own makes any.
        decode: Makes pictures for a report, (target, tokens (1, N, D), grid, latents along a token's side) to
            (frames, H, W, 3) in [0, 1]; None where there is no autoencoder to ask.
    """

    route: Route
    install: Callable[[Any, Handle], None]
    release: Callable[[], None] = _release_nothing
    check_idle: Callable[[], None] = _release_nothing
    replaces: tuple[Handle, ...] = ()
    generate: Callable[[Any, int, int, int, Mapping[str, Any]], object] | None = None
    decode: Callable[[Any, Tensor, tuple[int, ...], int], Tensor] | None = None


class Handle:
    """What one `apply` changed. Use it as a context manager, or call `remove()`; removing twice is harmless.

    It keeps neither its target nor a part of it alive.

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
        """The handles that have to go when this one is installed, besides the one of the same target."""
        return self._installation.replaces

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

    def install(self) -> None:
        """Makes the changes. Those of an installation that fails half way are undone by `remove`."""
        target = self.target
        if target is None:
            raise RuntimeError("Handle.install: the target must be alive, got one that is gone; apply to another")
        self._installation.install(target, self)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name` on the instance alone; `remove` puts back what stood there, or its absence.

        Where somebody has put another value there since, that stays: it may call ours, which then passes calls on.
        """
        attributes = vars(owner)
        self.change(f"{type(owner).__name__}.{name}", _put_back, weakref.ref(owner), name, weakref.ref(value))
        # On the owner, so that a handle that is kept keeps nothing of it alive.
        attributes.setdefault(_BEFORE, {})[name] = attributes.get(name, MISSING)
        attributes[name] = value

    def change(self, what: str, undo: Callable[..., None], *args: Any) -> None:
        """Notes one change before it is made, and how it is undone: harmless where it was not made, or twice.

        Arguments must hold owners weakly.
        """
        self._undo.append(functools.partial(undo, *args))
        self._changes.append(what)

    def on_remove(self, undo: Callable[..., None], *args: Any) -> None:
        """Notes what `remove` has to call, the last noted first."""
        self._undo.append(functools.partial(undo, *args))

    def warmup(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_sizes: Sequence[int] = (1,),
        *,
        progress: bool = True,
        **call: Any,
    ) -> Stats:
        """Makes one picture of each size and batch, and drops it: compiles every stage before the first request.

        Args:
            sizes: (height, width) in pixels.
            batch_sizes: Images of each call.
            progress: Shows a bar.
            **call: Further arguments of the pipeline, as requests will have them: the length of prompts
                (`max_sequence_length`) and guidance make graphs of their own. The prompt is empty.

        Returns:
            The statistics.

        Raises:
            ConfigError: If what was patched is no pipeline, or one that takes no size: call it once yourself.
        """
        pipeline, generate = self.target, self._installation.generate
        if generate is None:
            raise ConfigError(
                f"Handle.warmup: what was patched must be a pipeline, got {self._kind}; run your own loop once instead"
            )
        if pipeline is None:
            raise ConfigError(
                f"Handle.warmup: the pipeline must be alive, got a {self._kind} that is gone; keep it in a "
                f"variable, for a handle does not"
            )
        todo = [(*size, batch) for size in checked_sizes(sizes) for batch in checked_batches(batch_sizes)]
        if progress:
            from tqdm import tqdm

            todo = tqdm(todo, desc="warm-up", unit="size")
        for height, width, batch in todo:
            generate(pipeline, height, width, batch, call)
        return self.stats()

    def stats(self) -> Stats:
        """Returns what the last generation did: tokens, operations and time of each step, and what ran and why."""
        return self.route.stats()

    def record(self, image: int | None = 0) -> Handle:
        """Keeps what a report shows of each generation from the next one on: one image's state at each step.

        Nothing is kept unless this is called. Copies of state and clean estimate are made in float16 on the CPU, 1 MiB
        a step for FLUX.1 at 1024x1024. The picture stays the same, bit for bit. Only the last generation is kept.

        Args:
            image: Which image of a batch, from 0; None stops recording and drops what was kept.

        Returns:
            This handle.

        Raises:
            ConfigError: For what is no index, and for a target that `on_unsupported="dense"` left unpatched.
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
            name: What the report calls it; without it the preset's name.
            prompt: What was asked for.
            previews: "vae" decodes each step by the pipeline's own autoencoder, "colours" shows the main directions of
                the latents as colours, which costs nothing; "auto" takes the autoencoder if there is one.
            frames: At most so many frames of a video.
            progress: Whether to show a progress bar.

        Raises:
            ConfigError: Where nothing was recorded, and for `previews="vae"` without an autoencoder.
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
        """Writes the last generation as one HTML file that needs nothing else: a slider over its steps.

        Call `record()` before the generation. docs/report.md shows how to put several next to each other.

        Args:
            path: The file to write, at most 5 MB.
            name: What the report calls the generation; without it the preset's name.
            prompt: What was asked for.
            previews: As in `playback`.
            progress: Whether to show a progress bar.

        Returns:
            The path.

        Raises:
            ConfigError: As `playback`, and where Pillow is missing.
        """
        from ..view.page import write_report

        return write_report(path, [self.playback(name, prompt=prompt, previews=previews, progress=progress)])

    def reset(self) -> None:
        """Forgets a generation that was left unfinished; a loop that knows no pipeline may call it before a new one."""
        self.route.reset()

    def remove(self) -> None:
        """Takes every change back, the last first.

        Raises RuntimeError, and undoes nothing, while another thread makes a picture with what is patched.

        An undo that fails does not keep the others from being done; its error is raised at the end. What has failed or
        was interrupted is done again by the next call.
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
    """Puts back into `vars` of an object what it held before; what was `MISSING` is taken out."""
    for name, value in before.items():
        if value is MISSING:
            attributes.pop(name, None)
        else:
            attributes[name] = value
