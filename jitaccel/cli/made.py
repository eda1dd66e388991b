"""What `generate` writes: a picture or a clip, and which tokens each stage computed."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError
from ..loading import makes_videos
from .outputs import check_file, save_picture

if TYPE_CHECKING:
    from ..generation.stats import Stats

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
CLIPS = (".mp4", ".mkv", ".mov", ".webm", ".gif")  # those of evaluation/clips.py, which imports Pillow
_FPS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of videos and token pictures."""
    parser.add_argument("--frames", type=int, help="of a video model: number of frames; without it the pipeline's own")
    parser.add_argument("--fps", type=float, help=f"of a video model: frames a second of the clip; {_FPS} without it")
    parser.add_argument(
        "--tokens",
        type=Path,
        help="file to write as well, which shows the tokens that each stage computed: a picture (of a video: some "
        "frames side by side), or of a video a clip",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises CommandError, before anything is loaded, for files that cannot be written and numbers out of range."""
    for name, path in (("--out", arguments.out), ("--tokens", arguments.tokens)):
        if path is not None:
            _check_file(name, path, arguments.overwrite)
    if arguments.tokens is not None and arguments.preset == "none":
        raise CommandError("--tokens must come with a preset, got --preset none, which computes every token")
    if arguments.frames is not None and arguments.frames < 1:
        raise CommandError(f"--frames must be at least 1, got {arguments.frames}")
    if arguments.fps is not None and not 1 <= arguments.fps <= 120:
        raise CommandError(f"--fps must be in 1..120, got {arguments.fps:g}")


def _check_file(name: str, path: Path, overwrite: bool) -> None:
    check_file(path, name, (*PICTURES, *CLIPS), overwrite=overwrite)
    if path.suffix.lower() in CLIPS:
        from ..loading import require_diffusers

        require_diffusers()
        from ..evaluation.clips import require_encoder

        require_encoder(path)


def size_of(pipe: Any, asked: tuple[int, int] | None) -> tuple[int, int] | None:
    """Returns (height, width) in pixels of a picture or video; None: the pipeline's own default is taken.

    Raises:
        CommandError: For sides that are not whole tokens.
    """
    from ..loading import size_unit

    if asked is None:
        side = getattr(pipe.vae.config, "sample_size", None)
        return (side, side) if isinstance(side, int) and not makes_videos(pipe) else None
    unit = size_unit(pipe)
    if any(side < unit or side % unit for side in asked):
        raise CommandError(f"--size must be multiples of {unit} pixels for this model, got {asked[0]}x{asked[1]}")
    return asked


def check_pipeline(pipe: Any, arguments: argparse.Namespace) -> None:
    """Raises CommandError if a pipeline cannot make the requested output, or does not accept an argument."""
    kind, is_video = type(pipe).__name__, makes_videos(pipe)
    is_clip = arguments.out.suffix.lower() in CLIPS
    if is_video and not is_clip:
        raise CommandError(f"--out must end in one of {', '.join(CLIPS)} for {kind}, got {str(arguments.out)!r}")
    if not is_video:
        given = [name for name in ("frames", "fps") if getattr(arguments, name) is not None]
        if given:
            raise CommandError(f"--{given[0]} must come with a video model, got a {kind}, which makes pictures")
        for name, path in (("--out", arguments.out), ("--tokens", arguments.tokens)):
            if path is not None and path.suffix.lower() in CLIPS:
                raise CommandError(f"{name} must end in one of {', '.join(PICTURES)} for {kind}, got {str(path)!r}")
    for name, parameter in (("--true-cfg", "true_cfg_scale"), ("--guidance", "guidance_scale")):
        value = arguments.true_cfg if name == "--true-cfg" else arguments.guidance
        if value is not None and parameter not in _parameters(pipe):
            raise CommandError(f"{name} must be left out for {kind}, whose calls have no {parameter}, got {value:g}")


def call_of(pipe: Any, arguments: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call: those of `given` that it accepts, and those of a video."""
    video = {"num_frames": arguments.frames, "output_type": "np"} if makes_videos(pipe) else {}
    known = _parameters(pipe)
    return {name: value for name, value in {**given, **video}.items() if name in known and value is not None}


def save(made: Any, arguments: argparse.Namespace, stats: Stats | None) -> str:
    """Writes the pipeline's output and, if requested, its tokens; returns its size in words."""
    from ..evaluation import clips

    for path in (arguments.out, arguments.tokens):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if not hasattr(made, "frames"):
        picture = made.images[0]
        save_picture(picture, arguments.out)
        if stats is not None and arguments.tokens is not None:
            save_picture(_sheet(picture, stats), arguments.tokens, "--tokens")
        return f"{picture.width}x{picture.height}"
    frames, fps = made.frames[0], arguments.fps or _FPS
    clips.write_clip(frames, arguments.out, fps)
    if stats is not None and arguments.tokens is not None:
        if arguments.tokens.suffix.lower() in CLIPS:
            clips.write_clip(clips.token_frames(frames, stats), arguments.tokens, fps)
        else:
            save_picture(clips.token_sheet(frames, stats), arguments.tokens, "--tokens")
    return f"{frames.shape[2]}x{frames.shape[1]}, {len(frames)} frames, {len(frames) / fps:.1f} s at {fps:g} fps"


def _sheet(picture: Any, stats: Stats) -> Any:
    """Returns a picture as each stage showed it to the network, side by side."""
    import numpy as np

    from ..evaluation.clips import stage_labels
    from ..evaluation.pictures import grid_picture, show_stage

    pixels = np.asarray(picture.convert("RGB"))
    shown = [show_stage(pixels, stats, stage) for stage in range(len(stats.anchors))]
    return grid_picture([shown], stage_labels(stats), [""])


def _parameters(pipe: Any) -> Mapping[str, Any]:
    return inspect.signature(type(pipe).__call__).parameters
