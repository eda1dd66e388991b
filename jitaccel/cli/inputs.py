"""Inputs of `generate` besides prompt and size: pictures, a mask, and other arguments of the pipeline's call."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError, suggestion

if TYPE_CHECKING:
    from PIL import Image

_PICTURES = {"image": "--image", "mask_image": "--mask", "control_image": "--control-image"}
_OWN = {  # arguments of a call that are not for --option, and what gives them instead
    **_PICTURES,
    "strength": "--strength",
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "height": "--size",
    "width": "--size",
    "num_frames": "--frames",
    "frame_rate": "--fps",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "max_sequence_length": "--max-sequence-length",
    "generator": "--seed",
    "num_images_per_prompt": "a run of each seed",
    "num_videos_per_prompt": "a run of each seed",
    "output_type": "the suffix of --out",
    "return_dict": "--out",
    "callback_on_step_end": "Python",
    "callback_on_step_end_tensor_inputs": "Python",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of inputs."""
    parser.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        type=Path,
        help="picture to edit or animate; repeat it for models that take several (FLUX.2)",
    )
    parser.add_argument("--mask", metavar="FILE", type=Path, help="mask of --image: white is repainted, black is kept")
    parser.add_argument(
        "--control-image", metavar="FILE", type=Path, help="edges, depth or pose, for ControlNet and Control models"
    )
    parser.add_argument("--strength", type=float, help="how much to change --image, above 0 and at most 1")
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="another argument of the pipeline's call; VALUE is JSON, or @FILE for a picture (repeat it for a list)",
    )
    parser.add_argument("--controlnet", metavar="MODEL", help="ControlNet to add: folder or hub id")
    parser.add_argument(
        "--pipeline",
        metavar="CLASS",
        help="class of diffusers to load the model with; without it the model's own, or for --image, --mask and "
        "--controlnet the one that diffusers' AutoPipeline takes",
    )


def read(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call that a command gives, by name, with pictures read from their files.

    Raises:
        CommandError: With everything that cannot be read.
    """
    problems: list[str] = []
    files: dict[str, list[Path]] = {}
    for name, option in _PICTURES.items():
        value = getattr(arguments, option[2:].replace("-", "_"))
        if value is not None:
            files[name] = value if isinstance(value, list) else [value]
    call: dict[str, Any] = {}
    for text in arguments.option or ():
        name, _, value = text.partition("=")
        if problem := _option_problem(text, {*call} if value.startswith("@") else {*call, *files}):
            problems.append(problem)
        elif value.startswith("@"):
            files.setdefault(name, []).append(Path(value[1:]))
        else:
            call[name] = _value(value)
    for each in ("mask", "strength"):
        if (value := getattr(arguments, each)) is not None and arguments.image is None:
            problems.append(f"--{each} must come with --image, got {str(value)!r} alone; give both")
    if arguments.strength is not None:
        call["strength"] = arguments.strength
        if not 0.0 < arguments.strength <= 1.0:
            problems.append(f"--strength must be above 0 and at most 1, got {arguments.strength:g}")
    for name, paths in files.items():
        try:
            pictures = [_picture(path, _PICTURES.get(name, f"--option {name}")) for path in paths]
        except CommandError as error:
            problems.append(str(error))
        else:
            call[name] = pictures if len(pictures) > 1 else pictures[0]
    if problems:
        raise CommandError("\n".join(problems))
    return call


def _option_problem(text: str, taken: Collection[str]) -> str | None:
    """Returns the problem with the text of an --option, or None if there is none.

    taken: Names given before.
    """
    name, equals, value = text.partition("=")
    shown = repr(text[:80])
    if not equals or not name.isidentifier():
        return f"--option must be NAME=VALUE, got {shown}; for example --option clip_skip=1"
    if name in _OWN:
        return f"--option must not name {name}, got {shown}; use {_OWN[name]}"
    if _is_tensor(name):
        return f"--option must be JSON or a picture, got {shown}, a tensor; give it in Python"
    if name in taken:
        return f"--option must give {name} once, got {shown} as well; leave one out"
    try:
        if not value.startswith("@"):
            _value(value)
    except (ValueError, RecursionError):
        example = f"--option '{name}=\"text\"'"
        return f"--option must have a value in JSON, got {shown}; texts have quotes: {example}"
    return None


def _value(text: str) -> Any:
    return json.loads(text, parse_constant=_no_number)


def _no_number(text: str) -> object:
    raise ValueError(text)


def _picture(path: Path, option: str) -> Image.Image:
    """Returns a picture as diffusers loads it: turned as its EXIF says, in RGB."""
    from ..loading import require_diffusers

    require_diffusers()
    from diffusers.utils import load_image
    from PIL import Image, UnidentifiedImageError

    shown = str(path)[:80]
    try:
        if not path.expanduser().is_file():
            reason = "a folder" if path.expanduser().is_dir() else "no such file"
            raise CommandError(f"{option} must be a picture file, got {shown!r}: {reason}")
        with Image.open(path.expanduser()) as opened:
            found: Image.Image = load_image(opened)
        return found
    except UnidentifiedImageError as error:
        raise CommandError(f"{option} must be a picture that Pillow reads, got {shown!r}; convert it to PNG") from error
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"{option} must be a picture that can be read, got {shown!r}: {reason}") from error


def class_of(named: type | None, arguments: argparse.Namespace, given: Mapping[str, Any]) -> type | None:
    """Returns the class of pipelines to load, before any weights are.

    Args:
        named: The class that the model names; None where it is none of diffusers.
        arguments: Of the command.
        given: What `read` returned.

    Raises:
        CommandError: For a name that is no class of pipelines, and a ControlNet that the model has no class for.
    """
    import diffusers

    from ..patches.diffusers.tasks import FAMILIES, class_for

    if arguments.pipeline is not None:
        kind = getattr(diffusers, arguments.pipeline, None)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            return kind
        fitting = [family for family in FAMILIES if named is not None and named.__name__ in family] or FAMILIES
        names = [name for family in fitting for name in family]
        raise CommandError(
            f"--pipeline must be a class of pipelines of diffusers, got {arguments.pipeline[:80]!r}; "
            f"{suggestion(arguments.pipeline, names, f'take one of {_listed(names)}')}"
        )
    if named is None:
        return None
    kind = class_for(named, given, controlnet=arguments.controlnet is not None)
    if arguments.controlnet is not None and "controlnet" not in _parts(kind):
        raise CommandError(
            f"--controlnet must be left out for {named.__name__}, for which diffusers has no pipeline with one, got "
            f"{arguments.controlnet}; or name it with --pipeline"
        )
    return kind


def _parts(kind: type) -> Iterable[str]:
    import inspect

    return inspect.signature(kind).parameters


def check_call(kind: type, given: Mapping[str, Any]) -> None:
    """Raises CommandError with every argument that a class of pipelines does not take, and every picture it needs."""
    from ..patches.diffusers.tasks import accepted, alternatives, needed, takes_several

    known, name = accepted(kind), kind.__name__
    problems = [
        f"{_OWN[each]} must be given for {name}, got none; its calls need {each}"
        for each in needed(kind)
        if each not in given
    ]
    unknown = [each for each in given if each not in known]
    others = alternatives(kind, given) if unknown else []
    for each in unknown:
        option = _OWN.get(each)
        if option is not None:
            adds = ", add a ControlNet with --controlnet" if each == "control_image" else ""
            advice = f"use a model made for it{adds}{_with_pipeline(others)}"
            problems.append(
                f"{option} must be left out for {name}, whose calls take no {each}; of other inputs they take "
                f"{_listed(_inputs(known))}; {advice}"
            )
        else:
            advice = suggestion(each, _inputs(known), f"leave it out{_with_pipeline(others)}")
            problems.append(
                f"--option must name an argument that calls of {name} take, got {each!r}; they take "
                f"{_listed(_inputs(known))}; {advice}"
            )
    images = given.get("image")
    if isinstance(images, list) and "image" in known and not takes_several(kind):
        problems.append(f"--image must be given once for {name}, got {len(images)} files; leave out all but one")
    if problems:
        raise CommandError("\n".join(problems))


def _inputs(known: Sequence[str]) -> list[str]:
    """Returns the arguments of a call that are inputs or can be given by --option."""
    return [name for name in known if not _is_tensor(name) and (name not in _OWN or name in (*_PICTURES, "strength"))]


def _is_tensor(name: str) -> bool:
    """Returns whether an argument of a call holds tensors, which a command line cannot give."""
    return "embeds" in name or "latents" in name or name.endswith("attention_mask")


def _with_pipeline(names: Sequence[str]) -> str:
    return f", or --pipeline {' or '.join(names)} where its weights are made for that" if names else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def shape_of(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns (height, width) of the first input picture, or None if there is none."""
    picture = given.get("image", given.get("control_image"))
    if isinstance(picture, list):
        picture = picture[0]
    return None if picture is None else (picture.height, picture.width)
