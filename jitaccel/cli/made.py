"""What `generate` writes: a picture or a clip, and which tokens each stage computed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError
from ..loading import makes_videos
from .options import size_like
from .outputs import check_file, save_picture

if TYPE_CHECKING:
    from ..generation.stats import Stats

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
CLIPS = (".mp4", ".mkv", ".mov", ".webm", ".gif")  # those of evaluation/clips.py, which imports Pillow
_FPS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of videos and token pictures."""
    parser.add_argument("--frames", type=int, help="of a video model: number of frames; without it the pipeline's own")
    parser.add_argument(
        "--fps", type=float, help=f"of a video model: frames a second; without it the pipeline's own, or {_FPS}"
    )
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


def size_of(pipe: Any, asked: tuple[int, int] | None, picture: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Returns (height, width) in pixels of a picture or video; None: the pipeline's own default is taken.

    Args:
        pipe: The pipeline.
        asked: What is asked for, or None.
        picture: (height, width) of the one that is given, which the default takes its shape from.

    Raises:
        CommandError: For sides that are not whole tokens.
    """
    from ..loading import size_unit

    if asked is None:
        own = _own_size(pipe, from_picture=picture is not None)
        return own if own is None or picture is None else size_like(picture, own[0] * own[1], size_unit(pipe))
    unit = size_unit(pipe)
    if any(side < unit or side % unit for side in asked):
        raise CommandError(f"--size must be multiples of {unit} pixels for this model, got {asked[0]}x{asked[1]}")
    return asked


def _own_size(pipe: Any, *, from_picture: bool) -> tuple[int, int] | None:
    """Returns the default (height, width) of a pipeline, or None if only its call knows.

    from_picture: whether it is given a picture.
    """
    known = _parameters(type(pipe))
    if not makes_videos(type(pipe)):
        side = getattr(getattr(pipe.vae, "config", None), "sample_size", None)
        if isinstance(side, int):
            return side, side
        if from_picture and "strength" in known:  # whose call would stretch the picture to a square
            side = getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 0)
            return (side, side) if side else None
        return None
    sides = [known[name].default if name in known else None for name in ("height", "width")]
    height, width = (side if isinstance(side, int) else None for side in sides)
    return (height, width) if from_picture and height is not None and width is not None else None


def check_class(pipeline: type, arguments: argparse.Namespace) -> None:
    """Raises CommandError if pipelines of a class cannot make the requested output, or do not accept an argument."""
    from ..patches import is_subclass_of

    kind, is_video, known = pipeline.__name__, makes_videos(pipeline), _parameters(pipeline)
    if is_subclass_of(pipeline, "diffusers", "QwenImageLayeredPipeline"):
        raise CommandError(
            f"--model must make one picture or clip, got a {kind}, which makes layers; call it in Python"
        )
    from ..patches.diffusers.sound import makes_sound

    if makes_sound(pipeline) and arguments.out.suffix.lower() == ".gif":
        check_file(arguments.out.with_suffix(".wav"), "--out", (".wav",), overwrite=arguments.overwrite)
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
        if value is not None and parameter not in known:
            raise CommandError(f"{name} must be left out for {kind}, whose calls have no {parameter}, got {value:g}")
    if arguments.negative_prompt is not None and arguments.true_cfg is None and "true_cfg_scale" in known:
        raise CommandError("--negative-prompt must come with --true-cfg above 1, got it alone; it would do nothing")
    if arguments.negative_prompt is not None and "negative_prompt" not in known:
        raise CommandError(f"--negative-prompt must be left out for {kind}, whose calls have none")


def call_of(pipe: Any, arguments: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call: those of `given` that it accepts, and those of a video."""
    known = _parameters(type(pipe))
    video: dict[str, Any] = {}
    if makes_videos(type(pipe)):
        video = {"num_frames": arguments.frames, "frame_rate": arguments.fps, "output_type": "np"}
    return {name: value for name, value in {**given, **video}.items() if name in known and value is not None}


def _fps(pipe: Any, arguments: argparse.Namespace) -> float:
    """Returns the frames per second of a clip: the requested number, or the pipeline's default."""
    rate = _parameters(type(pipe)).get("frame_rate")
    return float(arguments.fps or (_FPS if rate is None else rate.default))


def save(pipe: Any, made: Any, arguments: argparse.Namespace, stats: Stats | None) -> str:
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
    from ..patches.diffusers.sound import sound_of

    frames, fps, sound = made.frames[0], _fps(pipe, arguments), sound_of(pipe, made)
    heard = clips.write_clip(frames, arguments.out, fps, sound)
    if stats is not None and arguments.tokens is not None:
        if arguments.tokens.suffix.lower() in CLIPS:
            clips.write_clip(clips.token_frames(frames, stats), arguments.tokens, fps)
        else:
            save_picture(clips.token_sheet(frames, stats), arguments.tokens, "--tokens")
    said = f"{frames.shape[2]}x{frames.shape[1]}, {len(frames)} frames, {len(frames) / fps:.1f} s at {fps:g} fps"
    if sound is None:
        return said
    where = "" if heard == arguments.out else f" in {heard}"
    return f"{said}, sound of {sound.samples.shape[-1] / sound.rate:.1f} s at {sound.rate} Hz{where}"


def _sheet(picture: Any, stats: Stats) -> Any:
    """Returns a picture as each stage showed it to the network, side by side."""
    import numpy as np

    from ..evaluation.clips import stage_labels
    from ..evaluation.pictures import grid_picture, show_stage

    pixels = np.asarray(picture.convert("RGB"))
    shown = [show_stage(pixels, stats, stage) for stage in range(len(stats.anchors))]
    return grid_picture([shown], stage_labels(stats), [""])


def _parameters(kind: type) -> Mapping[str, Any]:
    """Returns what calls of a class of pipelines take, by name."""
    from ..patches.diffusers.asked import parameters_of  # here, because torch takes seconds to import

    return parameters_of(kind)
