"""Generate one picture or video from a prompt, accelerated."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import CommandError, ConfigError
from ..method.config import JiTConfig
from ..method.presets import PRESETS, resolve
from . import inputs, made, options
from .limits import check_numbers
from .progress import bar
from .view import check_report

_UNTOUCHED = "none"
_AUTO = "auto"
_UNASKED = ("ftfy",)  # packages that pipelines of diffusers call without a word where they are missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--prompt", required=True, help="what to show")
    parser.add_argument("--out", type=Path, required=True, help="picture or clip to write, with its folder")
    parser.add_argument("--overwrite", action="store_true", help="replace --out and --tokens if they exist")
    options.add_model_options(parser, offload=True)
    presets = ", ".join((*PRESETS, _AUTO, _UNTOUCHED))
    parser.add_argument(
        "--preset",
        default="7x",
        help=f"one of {presets} ({_AUTO}: what reaches a target, measured first; {_UNTOUCHED}: the pipeline untouched)",
    )
    parser.add_argument("--target-speedup", type=float, help=f"of --preset {_AUTO}: against 50 dense steps, above 1")
    parser.add_argument(
        "--target-ms", type=float, help=f"of --preset {_AUTO}: milliseconds of denoising; --true-cfg takes twice that"
    )
    inputs.add_arguments(parser)
    made.add_arguments(parser)
    parser.add_argument("--steps", type=int, help="number of denoising steps; without it the preset's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of every other random choice")
    options.add_size_option(parser)
    parser.add_argument("--guidance", type=float, help="guidance_scale of the pipeline's call; without it its own")
    parser.add_argument("--true-cfg", type=float, help="true classifier-free guidance, above 1; costs twice as much")
    parser.add_argument("--negative-prompt", help="what to avoid; FLUX needs --true-cfg with it")
    options.add_length_option(parser)
    parser.add_argument("--report", type=Path, help="page to write with a slider over the steps, FILE.html")
    parser.add_argument("--stats", action="store_true", help="print what every step cost, and what ran and why")


def run(arguments: argparse.Namespace) -> int:
    """Writes the picture and prints what it cost."""
    check_numbers(arguments)
    config = _config(arguments)
    made.check(arguments)
    _check_report(arguments)
    guidance, text_tokens = _guidance(arguments), options.length_of(arguments)
    given = inputs.read(arguments)

    import torch

    import jitaccel

    from ..loading import pipeline_class

    shape = inputs.shape_of(given)
    size = options.size_of(arguments, config, shape)
    kind = inputs.class_of(pipeline_class(arguments.model), arguments, given)
    if kind is not None:  # before weights are loaded
        made.check_class(kind, arguments)
        inputs.check_call(kind, given)
    pipe = options.load(arguments, kind)
    made.check_class(type(pipe), arguments)
    inputs.check_call(type(pipe), given)
    if arguments.model is None and (note := _of_unknown_words(f"{arguments.prompt} {arguments.negative_prompt or ''}")):
        print(f"jitaccel generate: {note}", file=sys.stderr)
    size = made.size_of(pipe, size, shape)
    if arguments.preset == _AUTO:
        with bar("timing steps") as progress:
            choice = jitaccel.auto_config(
                pipe,
                **_target(arguments),
                size=size,
                text_tokens=text_tokens,
                call={**given, **({} if arguments.frames is None else {"num_frames": arguments.frames})},
                progress=progress,
            )
        print(f"auto: {choice}")
        config = choice.config
    handle = None
    if config is not None:  # passed by name, so that a model's own noise levels are kept
        overrides = {} if arguments.steps is None else {"steps": arguments.steps}
        handle = jitaccel.apply(pipe, config if arguments.preset == _AUTO else arguments.preset, **overrides)
        if arguments.report is not None:
            handle.record()
    steps = arguments.steps if handle is None else handle.config.steps
    call = made.call_of(
        pipe,
        arguments,
        {
            "height": None if size is None else size[0],
            "width": None if size is None else size[1],
            "num_inference_steps": steps,
            "max_sequence_length": text_tokens if arguments.model is None else arguments.max_sequence_length,
            **guidance,
            **given,
        },
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    start = time.perf_counter()
    result = _called(pipe, {"prompt": arguments.prompt, "generator": generator, **call}, arguments.option)
    seconds = time.perf_counter() - start
    stats = None if handle is None else handle.stats()
    described = made.save(pipe, result, arguments, stats)
    print(f"{arguments.out}: {described}, preset {arguments.preset}, {seconds:.2f} s")
    if handle is not None and arguments.report is not None:
        report = handle.report(arguments.report, prompt=arguments.prompt)
        print(f"{report}: {report.stat().st_size / 1e6:.1f} MB, open it in a browser")
    if arguments.stats:
        print("no statistics: the pipeline ran untouched" if stats is None else stats)
    return 0


def _called(pipe: Any, call: dict[str, Any], options: list[str] | None) -> Any:
    """Returns what a pipeline makes. Raises CommandError with what it says of a value that it does not take."""
    try:
        return pipe(**call)
    except ConfigError:
        raise
    except NameError as error:
        if error.name not in _UNASKED:
            raise
        raise CommandError(
            f"{error.name} must be installed for {type(pipe).__name__}, got none; pip install {error.name}"
        ) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not options:
            raise
        what = "--option" if options else "the command"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommandError(f"{what} must be what {type(pipe).__name__} takes, got an error: {reason}") from error


def _of_unknown_words(prompt: str) -> str | None:
    """Returns a note on words of the prompt that the embedded model was not trained on, or None if there are none."""
    from ..api import embedded_model
    from ..evaluation.scenes.captions import unknown_words

    words = ", ".join(repr(word) for word in unknown_words(prompt))
    card = embedded_model() / "README.md"
    return f"the embedded model draws landscapes, it does not know {words}; its words are in {card}" if words else None


def _config(arguments: argparse.Namespace) -> JiTConfig | None:
    options.checked_preset(arguments.preset, _AUTO, _UNTOUCHED)
    if arguments.preset == _AUTO:
        _check_target(arguments)
        return None
    if given := [name for name, value in _target(arguments).items() if value is not None]:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CommandError(f"{names} must come with --preset {_AUTO}, got --preset {arguments.preset}")
    if arguments.preset == _UNTOUCHED:
        return None
    overrides = {} if arguments.steps is None else {"steps": arguments.steps}
    return resolve(arguments.preset, **overrides)


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"target_speedup": arguments.target_speedup, "target_ms": arguments.target_ms}


def _check_target(arguments: argparse.Namespace) -> None:
    """Raises, before anything is loaded, the errors that `apply` would raise later."""
    if arguments.steps is not None:
        raise CommandError(f"--steps must be left out with --preset {_AUTO}, which picks them, got {arguments.steps}")
    from ..speed.auto import check_target

    check_target(arguments.target_speedup, arguments.target_ms, {})


def _check_report(arguments: argparse.Namespace) -> None:
    if arguments.report is None:
        return
    if arguments.preset == _UNTOUCHED:
        raise CommandError(f"--report must come with a preset, got --preset {_UNTOUCHED}; --preset dense runs the same")
    check_report(arguments.report, arguments.overwrite, "--report")


def _guidance(arguments: argparse.Namespace) -> dict[str, Any]:
    call: dict[str, Any] = {}
    if arguments.guidance is not None:
        call["guidance_scale"] = arguments.guidance
    if arguments.true_cfg is not None:
        if not 1.0 < arguments.true_cfg < math.inf:
            raise CommandError(
                f"--true-cfg must be above 1 and finite, got {arguments.true_cfg}; 1 is the same as leaving it out"
            )
        call["true_cfg_scale"] = arguments.true_cfg
        call["negative_prompt"] = arguments.negative_prompt or ""
    elif arguments.negative_prompt is not None:
        call["negative_prompt"] = arguments.negative_prompt
    return call
