"""Write a pipeline's accelerated stages as files for deployment, one artefact a stage."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from ..errors import CommandError
from ..method.presets import PRESETS, resolve
from .arguments import add_pickle
from .limits import check_numbers, check_size
from .outputs import check_file

_MOST_TEXT_TOKENS = 512  # that FluxPipeline takes, and its default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from ..loading import DTYPES

    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--model", help="diffusers FLUX.1 folder or hub id; without it the embedded model")
    parser.add_argument("--preset", default="7x", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; without it the model's own")
    parser.add_argument("--format", default="aoti", choices=("aoti", "torchscript"), help="native code, or TorchScript")
    parser.add_argument("--batch-size", type=int, default=1, help="images of every later call")
    parser.add_argument("--text-tokens", type=int, help="prompt length with padding; without it 512 (embedded: 48)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA, float32 elsewhere")
    add_pickle(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA where there is one")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and says what it holds."""
    size = None if arguments.size is None else _size(arguments.size)
    config = resolve(arguments.preset)
    check_numbers(arguments)
    _check_out(arguments.out)

    import jitaccel

    from ..loading import EMBEDDED_TEXT_TOKENS, load_pipeline, picture_side

    pipe = load_pipeline(arguments.model, arguments.dtype, arguments.device, pickle=arguments.pickle)
    side = picture_side(pipe)
    text_tokens = arguments.text_tokens or (EMBEDDED_TEXT_TOKENS if arguments.model is None else _MOST_TEXT_TOKENS)
    start = time.perf_counter()
    folder = jitaccel.export(
        pipe,
        arguments.out,
        config,
        size=size or (side, side),
        format=arguments.format,
        batch_size=arguments.batch_size,
        text_tokens=text_tokens,
    )
    seconds = time.perf_counter() - start
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}, {seconds:.1f} s")
    return 0


def _check_out(out: Path) -> None:
    """Raises CommandError for a folder that cannot be made, before a model is loaded."""
    check_file(out)
    if out.exists():
        raise CommandError(f"--out must not exist, got {str(out)!r}; give another name, or remove it")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise CommandError(f"--size must be HEIGHTxWIDTH in pixels, got {text!r}; for example 1024x1024")
    size = int(match[1]), int(match[2])
    check_size(size)
    return size
