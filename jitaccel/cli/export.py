"""Write a pipeline's accelerated stages as files for deployment, one artefact per stage."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import CommandError
from ..method.presets import PRESETS, resolve
from . import options
from .limits import check_numbers
from .outputs import check_name
from .progress import bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    options.add_model_options(parser, offload=False)
    parser.add_argument("--preset", default="7x", help=f"one of {', '.join(PRESETS)}")
    options.add_size_option(parser)
    parser.add_argument("--format", default="aoti", choices=("aoti", "torchscript"), help="native code, or TorchScript")
    parser.add_argument("--batch-size", type=int, default=1, help="images of every later call")
    options.add_length_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and prints what it contains."""
    config = resolve(options.checked_preset(arguments.preset))
    check_numbers(arguments)
    _check_out(arguments.out)
    text_tokens = options.length_of(arguments)

    import jitaccel

    from ..loading import picture_side

    size = options.size_of(arguments, config)
    pipe = options.load(arguments)
    start = time.perf_counter()
    with bar("writing stages") as progress:
        folder = jitaccel.export(
            pipe,
            arguments.out,
            config,
            size=size or (picture_side(pipe),) * 2,
            format=arguments.format,
            batch_size=arguments.batch_size,
            text_tokens=text_tokens,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}, {seconds:.1f} s")
    return 0


def _check_out(out: Path) -> None:
    """Raises CommandError for a folder that cannot be created, before a model is loaded."""
    check_name(out)
    if out.exists():
        raise CommandError(f"--out must not exist, got {str(out)!r}; give another name, or remove it")
