"""Options that several commands share, with common spelling and checks."""

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

MOST_TEXT_TOKENS = 512  # the limit and default of FluxPipeline
_MOST_TOKENS = 65_536  # 4096x4096 pixels on FLUX.1; more is more likely a typing error than a picture


def add_model_options(parser: argparse.ArgumentParser, *, offload: bool) -> None:
    """Adds the options that select a pipeline and how to load it."""
    from ..loading import DTYPES, OFFLOADS

    parser.add_argument("--model", help="diffusers pipeline: folder or hub id; if omitted, the embedded model")
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
            help="where weights wait: none: all on the device; model: only the active component is on the device; "
            "sequential: only the active layer is, which needs the least memory and is slow",
        )


def add_size_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the size of pictures."""
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels; if omitted, the model's size")


def add_length_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the length of prompts, named as in diffusers' pipelines."""
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help=f"prompt length including padding; if omitted, {MOST_TEXT_TOKENS} (embedded: 48)",
    )


def length_of(arguments: argparse.Namespace) -> int:
    """Returns the length of prompts; `limits.check_numbers` has checked it."""
    from ..loading import EMBEDDED_TEXT_TOKENS

    length: int | None = arguments.max_sequence_length
    if length is None:
        return EMBEDDED_TEXT_TOKENS if arguments.model is None else MOST_TEXT_TOKENS
    return length


def checked_preset(name: str, *others: str, option: str = "--preset") -> str:
    """Returns the name of a preset or one of `others`. Raises CommandError for others, suggesting a similar name."""
    allowed = (*PRESETS, *others)
    if name not in allowed:
        listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise CommandError(f"{option} must be {listed}, got {name!r}; {suggestion(name, allowed)}")
    return name


def parse_size(text: str) -> tuple[int, int]:
    """Returns (height, width) in pixels for "1024x768", or for "1024", a square. Raises CommandError for other text."""
    match = re.fullmatch(r"(-?[0-9]{1,9})(?:[x×](-?[0-9]{1,9}))?", text.strip().lower())
    if match is None:
        raise CommandError(f"--size must be HxW in pixels, got {text!r}; for example 1024x1024")
    return int(match[1]), int(match[2] or match[1])


def size_of(
    arguments: argparse.Namespace, config: JiTConfig | None, picture: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Returns the requested (height, width), or the model's default, before any weights are loaded.

    Args:
        arguments: Has `size` and `model`.
        config: Its stages must all get a token; None for a pipeline without acceleration.
        picture: (height, width) of the input picture, if any; the default takes its shape.

    Returns:
        The size, or None if none is requested and the model's default is unknown.

    Raises:
        CommandError: For a size that the model cannot make, naming the nearest possible one; and, before the hub is
            contacted, for an unavailable device and for offloading on the CPU.
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
    """Returns the picture's own size, scaled down to `area` if it is larger, in whole units.

    Args:
        picture: (height, width) in pixels.
        area: Largest number of pixels.
        unit: Both sides of the result are multiples of it.
    """
    height, width = picture
    shrink = min(1.0, (area / (height * width)) ** 0.5)
    rows, columns = (max(1, round(side * shrink / unit)) for side in (height, width))
    return rows * unit, columns * unit


def check_size(size: tuple[int, int], sizes: PictureSizes, config: JiTConfig | None = None) -> None:
    """Raises CommandError for a size that a model cannot make, naming the nearest possible one."""
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
    """Returns the size nearest to `size` that works for a model and the stages of a configuration."""
    rows, columns = (max(1, (side + unit // 2) // unit) for side in size)
    if config is not None and rows * columns * config.densities[0] < 1.0:
        least = math.ceil(math.sqrt(1.0 / config.densities[0]))
        rows, columns = max(rows, least), max(columns, least)
    if rows * columns > _MOST_TOKENS:
        shrink = math.sqrt(_MOST_TOKENS / (rows * columns))
        rows, columns = (min(_MOST_TOKENS, max(1, int(side * shrink))) for side in (rows, columns))
    return rows * unit, columns * unit


def load(arguments: argparse.Namespace, kind: type | None = None) -> Any:
    """Returns the selected pipeline; warns on stderr about the memory its weights take on a CPU.

    kind: Class of pipelines to load; None for the one that the model names.
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
