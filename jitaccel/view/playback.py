"""The pictures of a recorded generation: the noisy state and the predicted picture of each step, and the final one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..method.presets import PRESETS
from .colours import Axes, false_colours, main_axes

if TYPE_CHECKING:
    from ..generation.stats import Stats, StepStats
    from ..generation.tape import Frame, Tape

Previews = Literal["auto", "vae", "colours"]
FrameBytes = NDArray[np.uint8]
Decode = Callable[[Tensor, tuple[int, ...], int], Tensor]
"""(tokens (1, N, D), grid, latents along a token's side) -> frames (T, H, W, 3) in [0, 1]."""

_STILL_PX, _FRAME_PX, _FINAL_PX = 512, 256, 1024  # longest sides: step, video frame, final picture


@dataclass(frozen=True, eq=False, kw_only=True)
class Moment:
    """One step: its statistics and its pictures, (frames, h, w, 3) uint8."""

    stats: StepStats
    noisy: FrameBytes
    clean: FrameBytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Playback:
    """A generation that can be shown step by step; made by `Handle.playback`.

    Attributes:
        name: Name in the report.
        prompt: The prompt, or None.
        stats: The statistics of the generation.
        image: Index in its batch of the image shown.
        moments: The steps, in order.
        final: The finished picture (frames, h, w, 3) uint8.
        has_true_colours: Whether an autoencoder made the pictures; otherwise they show directions of the latents as
            colours.
    """

    name: str
    prompt: str | None
    stats: Stats
    image: int
    moments: tuple[Moment, ...]
    final: FrameBytes
    has_true_colours: bool


def make_playback(
    tape: Tape,
    stats: Stats,
    *,
    decode: Decode | None,
    name: str | None = None,
    prompt: str | None = None,
    previews: Previews = "auto",
    most_frames: int = 12,
    progress: bool = True,
    predicted: Mapping[int, FrameBytes] | None = None,
) -> Playback:
    """Returns the pictures of a recorded tape.

    Args:
        tape: The recording; it has at least one step.
        stats: Statistics of the same generation.
        decode: Makes pictures of tokens; None if there is no autoencoder.
        name: Name in the report; None for the preset's name.
        prompt: The prompt, or None.
        previews: "vae" uses `decode`, "colours" shows directions of the latents as colours, "auto" uses `decode` if it
            is given.
        most_frames: Maximum number of frames of a video.
        progress: Whether to show a progress bar.
        predicted: Predicted pictures that `predicted_picture` has already made, by the index of their step.

    Raises:
        ConfigError: For unknown previews, for "vae" if `decode` is None, and for fewer than one frame.
    """
    if previews not in ("auto", "vae", "colours"):
        raise ConfigError(f"playback: previews must be 'auto', 'vae' or 'colours', got {previews!r}")
    if previews == "vae" and decode is None:
        raise ConfigError(
            "playback: previews='vae' must have a pipeline with an autoencoder, got none; use previews='colours'"
        )
    if most_frames < 1:
        raise ConfigError(f"playback: frames must be at least 1, got {most_frames}")
    assert tape.final is not None
    is_decoded = decode is not None and previews != "colours"
    show = _shown_by(decode if is_decoded else None, tape, most_frames)
    by_index = {step.index: step for step in stats.steps}
    kept = [frame for frame in tape.frames if frame.step.index in by_index]
    made = predicted if is_decoded and predicted is not None else {}

    def moment(frame: Frame) -> Moment:
        index = frame.step.index
        clean = made[index] if index in made else show(frame.clean)
        return Moment(stats=by_index[index], noisy=show(frame.state), clean=clean)

    moments = tuple(moment(frame) for frame in _counted(kept, progress and is_decoded))
    return Playback(
        name=name or name_of_config(stats),
        prompt=prompt,
        stats=stats,
        image=tape.image,
        moments=moments,
        final=show(tape.final, True),
        has_true_colours=is_decoded,
    )


def predicted_picture(tape: Tape, decode: Decode, most_frames: int = 12) -> FrameBytes:
    """Returns the picture (frames, h, w, 3) predicted by the last step of a tape; the generation may still be running.

    Args:
        tape: The recording; it has at least one step.
        decode: Makes pictures of tokens.
        most_frames: Maximum number of frames of a video.
    """
    return _shown_by(decode, tape, most_frames)(tape.frames[-1].clean)


def name_of_config(stats: Stats) -> str:
    """Returns the name of the preset that ran, with its step count if that was changed; otherwise "custom"."""
    own = {"steps": stats.config.steps, "schedule": stats.config.schedule}
    for name, preset in PRESETS.items():
        if preset == stats.config:
            return name
        if {**preset.to_dict(), **own} == stats.config.to_dict():
            return f"{name}, {len(stats.steps)} steps"
    return "custom"


def _counted(frames: list[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return frames
    from tqdm import tqdm

    return tqdm(frames, desc="report", unit="step")


def _shown_by(decode: Decode | None, tape: Tape, most_frames: int) -> Callable[..., FrameBytes]:
    """Returns a function from tokens (N, D) to pixels; its second argument marks the finished picture."""
    axes: Axes | None = None
    if decode is None:
        assert tape.final is not None
        axes = main_axes(tape.final.float())

    def show(tokens: Tensor, is_final: bool = False) -> FrameBytes:
        if decode is None:
            assert axes is not None
            frames = false_colours(tokens.float(), axes, tape.grid)
        else:
            frames = decode(tokens.float()[None], tape.grid, tape.patch)
        frames = frames[_spread(len(frames), most_frames)]
        longest = _FRAME_PX if len(frames) > 1 else _FINAL_PX if is_final else _STILL_PX
        return _to_bytes(_shrunk(frames, longest))

    return show


def _spread(count: int, most: int) -> list[int]:
    """Returns at most `most` indices out of `count`, evenly spread, including the first and the last."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]


def _shrunk(frames: Tensor, longest: int) -> Tensor:
    """Returns frames (T, H, W, 3) reduced so that the longer side is at most `longest`."""
    height, width = frames.shape[1:3]
    scale = longest / max(height, width)
    if scale >= 1.0:
        return frames
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    channels_first = frames.permute(0, 3, 1, 2)
    small = F.interpolate(channels_first, size, mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1)


def _to_bytes(frames: Tensor) -> FrameBytes:
    """Returns frames in [0, 1] as uint8; NaN, as a broken generation may contain, becomes black."""
    return (frames.nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()
