"""Write a report: one prompt by several presets, as an HTML page with a slider over the steps."""

from __future__ import annotations

import argparse
import re
import webbrowser
from pathlib import Path

from ..errors import CommandError
from ..method.presets import PRESETS, resolve

_MOST_TEXT_TOKENS = 512  # that FluxPipeline takes, and its default
_SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from ..loading import DTYPES

    parser.add_argument("--prompt", required=True, help="what to show")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--presets", default="dense,7x", help=f"names with commas between them: {', '.join(PRESETS)}")
    parser.add_argument("--model", help="diffusers FLUX.1 folder or hub id; without it the embedded model")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; without it the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for all presets")
    parser.add_argument(
        "--max-sequence-length", type=int, help="prompt length with padding; without it 512 (embedded: 48)"
    )
    parser.add_argument(
        "--previews",
        default="auto",
        choices=("auto", "vae", "colours"),
        help="vae: the pipeline's autoencoder decodes each step; colours: directions of the latents, at no cost",
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA where there is one")


def run(arguments: argparse.Namespace) -> int:
    """Makes the pictures and writes the page."""
    presets = _presets(arguments.presets)
    size = None if arguments.size is None else _size(arguments.size)
    check_report(arguments.out, arguments.overwrite, "--out")
    length = arguments.max_sequence_length
    if length is not None and not 1 <= length <= _MOST_TEXT_TOKENS:
        raise CommandError(f"--max-sequence-length must be in 1..{_MOST_TEXT_TOKENS}, got {length}")
    if not 0 <= arguments.seed < 2**63:
        raise CommandError(f"--seed must be in 0..2**63 - 1, got {arguments.seed}")

    from tqdm import tqdm

    from ..app.making import Wanted, make_each, steps_of
    from ..loading import EMBEDDED_TEXT_TOKENS, load_pipeline, picture_side
    from ..view import write_report

    pipe = load_pipeline(arguments.model, arguments.dtype, arguments.device)
    pipe.set_progress_bar_config(disable=True)
    side, unit = picture_side(pipe), 2 * pipe.vae_scale_factor
    height, width = size or (side, side)
    if height < unit or width < unit or height % unit or width % unit:
        raise CommandError(f"--size must be multiples of {unit} pixels for this model, got {height}x{width}")
    wanted = Wanted(
        prompt=arguments.prompt,
        height=height,
        width=width,
        seed=arguments.seed,
        text_tokens=length or (EMBEDDED_TEXT_TOKENS if arguments.model is None else _MOST_TEXT_TOKENS),
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
    """Raises CommandError for a report that could not be written, before any compute."""
    if path.suffix.lower() not in _SUFFIXES:
        raise CommandError(f"{option} must end in {' or '.join(_SUFFIXES)}, got {str(path)!r}")
    if path.is_dir():
        raise CommandError(f"{option} must be a file, got the folder {str(path)!r}")
    if path.exists() and not overwrite:
        raise CommandError(f"{option} must not exist, got {str(path)!r}; give another name, or --overwrite")


def _presets(names: str) -> list[str]:
    """Returns the names between commas. Raises ConfigError for an unknown one, CommandError for none or twice."""
    presets = [name.strip() for name in names.split(",") if name.strip()]
    if not presets or len(set(presets)) < len(presets):
        raise CommandError(f"--presets must name each preset once, got {names!r}; for example dense,7x")
    for name in presets:
        resolve(name)
    return presets


def _size(text: str) -> tuple[int, int]:
    if (match := re.fullmatch(r"(\d+)x(\d+)", text)) is None:
        raise CommandError(f"--size must be HEIGHTxWIDTH in pixels, got {text!r}; for example 1024x1024")
    return int(match[1]), int(match[2])
