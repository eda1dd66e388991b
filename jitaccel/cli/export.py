"""Write a pipeline's accelerated stages as files for deployment, one artefact a stage."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from ..errors import CommandError
from ..method.presets import PRESETS, resolve

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
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA where there is one")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and says what it holds."""
    size = None if arguments.size is None else _size(arguments.size)
    config = resolve(arguments.preset)
    _check_numbers(arguments)

    import jitaccel

    from ..loading import EMBEDDED_TEXT_TOKENS, load_pipeline, picture_side

    pipe = load_pipeline(arguments.model, arguments.dtype, arguments.device)
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


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Raises CommandError for what can be told before a model is loaded."""
    if arguments.out.exists():
        raise CommandError(f"--out must not exist, got {str(arguments.out)!r}; give another name, or remove it")
    if arguments.batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    if arguments.text_tokens is not None and not 1 <= arguments.text_tokens <= _MOST_TEXT_TOKENS:
        raise CommandError(f"--text-tokens must be in 1..{_MOST_TEXT_TOKENS}, got {arguments.text_tokens}")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise CommandError(f"--size must be HEIGHTxWIDTH in pixels, got {text!r}; for example 1024x1024")
    return int(match[1]), int(match[2])
