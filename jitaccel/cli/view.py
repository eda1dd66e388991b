"""Write a report: one prompt with several presets, as an HTML page with a slider over the steps."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from ..errors import CommandError
from ..method.presets import PRESETS
from . import options
from .limits import check_numbers
from .outputs import check_file

_SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--prompt", required=True, help="what to show")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--presets", default="dense,7x", help=f"names separated by commas: {', '.join(PRESETS)}")
    options.add_model_options(parser, offload=True)
    options.add_size_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise, the same for all presets")
    options.add_length_option(parser)
    parser.add_argument(
        "--previews",
        default="auto",
        choices=("auto", "vae", "colours"),
        help="vae: decode each step with the autoencoder; colours: main directions of the latents, at no cost",
    )


def run(arguments: argparse.Namespace) -> int:
    """Makes the pictures and writes the page."""
    presets = _presets(arguments.presets)
    check_report(arguments.out, arguments.overwrite, "--out")
    check_numbers(arguments)

    from tqdm import tqdm

    from ..app.making import Wanted, make_each, steps_of
    from ..loading import picture_side
    from ..view import write_report

    size = None
    for preset in presets:
        size = options.size_of(arguments, PRESETS[preset])
    pipe = options.load(arguments)
    pipe.set_progress_bar_config(disable=True)
    height, width = size or (picture_side(pipe),) * 2
    wanted = Wanted(
        prompt=arguments.prompt,
        height=height,
        width=width,
        seed=arguments.seed,
        text_tokens=options.length_of(arguments),
    )
    playbacks = []
    with tqdm(total=sum(map(steps_of, presets)), unit="step") as bar:

        def count(preset: str, done: int, steps: int) -> None:
            bar.set_description(preset)
            bar.update()

        for made in make_each(pipe, presets, wanted, on_step=count, previews=arguments.previews, progress=True):
            playbacks.append(made.playback)
            bar.write(f"{made.preset}: {made.playback.stats.dense_steps:.2f} dense steps, {made.seconds:.2f} s")
    path = write_report(arguments.out, playbacks)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")
    if arguments.open:
        webbrowser.open(path.absolute().as_uri())
    return 0


def check_report(path: Path, overwrite: bool, option: str) -> None:
    """Raises CommandError, before any computation, for a report that cannot be written."""
    check_file(path, option, _SUFFIXES, overwrite=overwrite)


def _presets(names: str) -> list[str]:
    """Returns the names between commas. Raises CommandError for an unknown, repeated or missing name."""
    presets = [name.strip() for name in names.split(",") if name.strip()]
    if not presets or len(set(presets)) < len(presets):
        raise CommandError(f"--presets must name each preset once, got {names!r}; for example dense,7x")
    for name in presets:
        options.checked_preset(name, option="--presets")
    return presets
