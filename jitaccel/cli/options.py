"""Options that several commands share, spelled and checked in one way."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError, suggestion
from ..files import is_there
from ..method.config import JiTConfig
from ..method.presets import PRESETS

if TYPE_CHECKING:
    from ..loading import PictureSizes

MOST_TEXT_TOKENS = 512  # that FluxPipeline takes, and its default
_MOST_TOKENS = 65_536  # 4096x4096 pixels on FLUX.1; more is a typing error before it is a picture


def add_model_options(parser: argparse.ArgumentParser, *, offload: bool) -> None:
    """Adds which pipeline is loaded, and how."""
    from ..loading import DTYPES, OFFLOADS

    parser.add_argument("--model", help="diffusers pipeline: folder or hub id; without it the embedded model")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument(
        "--pickle", action="store_true", help="load weights that are not safetensors; this runs code stored in them"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA if present")
    if offload:
        parser.add_argument(
            "--offload",
            default="none",
            choices=OFFLOADS,
            help="where weights wait: none: all on the device; model: only the component that works is there; "
            "sequential: only the layer that works, which needs the least memory and is slow",
        )


def add_size_option(parser: argparse.ArgumentParser) -> None:
    """Adds the size of pictures."""
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels; without it the model's own")


def add_length_option(parser: argparse.ArgumentParser) -> None:
    """Adds the length of prompts, under the name that diffusers' pipelines give it."""
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help=f"prompt length with padding; without it {MOST_TEXT_TOKENS} (embedded: 48)",
    )


def length_of(arguments: argparse.Namespace) -> int:
    """Returns the length of prompts, which `limits.check_numbers` has checked."""
    from ..loading import EMBEDDED_TEXT_TOKENS

    length: int | None = arguments.max_sequence_length
    if length is None:
        return EMBEDDED_TEXT_TOKENS if arguments.model is None else MOST_TEXT_TOKENS
    return length


def checked_preset(name: str, *others: str, option: str = "--preset") -> str:
    """Returns the name of a preset or one of `others`. Raises CommandError, with the name most like it, for another."""
    allowed = (*PRESETS, *others)
    if name not in allowed:
        listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise CommandError(f"{option} must be {listed}, got {name!r}; {suggestion(name, allowed)}")
    return name


def parse_size(text: str) -> tuple[int, int]:
    """Returns (height, width) in pixels of "1024x768", or of "1024" for a square. Raises CommandError for others."""
    match = re.fullmatch(r"(-?[0-9]{1,9})(?:[x×](-?[0-9]{1,9}))?", text.strip().lower())
    if match is None:
        raise CommandError(f"--size must be HxW in pixels, got {text!r}; for example 1024x1024")
    return int(match[1]), int(match[2] or match[1])


def size_of(
    arguments: argparse.Namespace, config: JiTConfig | None, picture: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Returns the (height, width) asked for or the model's own, before any weights are loaded.

    Args:
        arguments: With `size` and `model`.
        config: Whose stages must all get a token; None for a pipeline without acceleration.
        picture: (height, width) of the one that is given, which the model's own size takes its shape from.

    Returns:
        None where nothing is asked for and the model does not say.

    Raises:
        CommandError: For a size that the model does not make, with the nearest that it makes; for a device that is
            not here and offloading on the CPU, before the hub is asked.
    """
    from ..loading import check_offload, pick_device, picture_sizes, require_diffusers

    require_diffusers()
    check_offload(getattr(arguments, "offload", "none"), pick_device(arguments.device))
    asked = None if arguments.size is None else parse_size(arguments.size)
    sizes = picture_sizes(arguments.model)
    if sizes is None:
        return asked
    own = (sizes.side, sizes.side) if picture is None else size_like(picture, sizes.side**2, sizes.unit)
    size = asked or own
    check_size(size, sizes, config)
    return size


def size_like(picture: tuple[int, int], area: int, unit: int) -> tuple[int, int]:
    """Returns the (height, width) in pixels of what is made of a picture: its own, at most `area` of its shape.

    Args:
        picture: (height, width) of it.
        area: Pixels.
        unit: What both sides are multiples of.
    """
    height, width = picture
    shrink = min(1.0, (area / (height * width)) ** 0.5)
    rows, columns = (max(1, round(side * shrink / unit)) for side in (height, width))
    return rows * unit, columns * unit


def check_size(size: tuple[int, int], sizes: PictureSizes, config: JiTConfig | None = None) -> None:
    """Raises CommandError for a size that a model does not make, with the nearest that it makes."""
    nearest = _nearest(size, sizes.unit, config)
    if nearest == size:
        return
    rule, (height, width) = f"a multiple of {sizes.unit} pixels on both sides", size
    if min(size) > 0 and height * width > _MOST_TOKENS * sizes.unit**2:
        side = math.isqrt(_MOST_TOKENS) * sizes.unit
        rule = f"at most {side}x{side} pixels in all"
    elif min(size) > 0 and not height % sizes.unit and not width % sizes.unit:
        rule = f"at least {nearest[0]}x{nearest[1]} for this preset"
    elif min(size) < 1:
        rule = f"{rule}, above 0"
    raise CommandError(
        f"--size must be {rule}, got {height}x{width}; the nearest for this model is {nearest[0]}x{nearest[1]}"
    )


def _nearest(size: tuple[int, int], unit: int, config: JiTConfig | None) -> tuple[int, int]:
    """Returns the size nearest to `size` that a model and the stages of a configuration can have."""
    rows, columns = (max(1, (side + unit // 2) // unit) for side in size)
    if config is not None and rows * columns * config.densities[0] < 1.0:
        least = math.ceil(math.sqrt(1.0 / config.densities[0]))
        rows, columns = max(rows, least), max(columns, least)
    if rows * columns > _MOST_TOKENS:
        shrink = math.sqrt(_MOST_TOKENS / (rows * columns))
        rows, columns = (min(_MOST_TOKENS, max(1, int(side * shrink))) for side in (rows, columns))
    return rows * unit, columns * unit


def load(arguments: argparse.Namespace, kind: type | None = None) -> Any:
    """Returns the pipeline of the options above, and says on stderr what its weights will take on a CPU.

    kind: class of pipelines to load, where it is not the one that the model names.
    """
    from ..loading import load_pipeline, pick_device

    offload = getattr(arguments, "offload", "none")
    is_hub = arguments.model is not None and not is_there(Path(arguments.model).expanduser())
    if is_hub and arguments.dtype == "auto" and pick_device(arguments.device).type == "cpu":
        print(
            f"jitaccel {arguments.command}: {arguments.model} is loaded on the CPU in float32; "
            f"--dtype bfloat16 takes half the memory",
            file=sys.stderr,
        )
    given = {name: value for name in ("controlnet",) if (value := getattr(arguments, name, None)) is not None}
    if kind is not None:
        given["kind"] = kind
    return load_pipeline(arguments.model, arguments.dtype, arguments.device, offload, pickle=arguments.pickle, **given)
