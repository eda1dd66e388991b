"""The `jitaccel` command: generate a picture, list presets, demonstrate, export, measure, check the installation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from ..errors import ArtefactError, CommandError, ConfigError, NonFiniteVelocityError, UnsupportedModelError
from . import app, bench, demo, doctor, eval, export, generate, messages, presets, serve, view
from .outputs import UNWRITABLE

_COMMANDS = {
    "generate": generate,
    "presets": presets,
    "demo": demo,
    "view": view,
    "app": app,
    "eval": eval,
    "export": export,
    "serve": serve,
    "bench": bench,
    "doctor": doctor,
}
_OF_LIBRARY = (ArtefactError, ConfigError, UnsupportedModelError, NonFiniteVelocityError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 2 for bad input, reported in one line without a traceback."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") and word.endswith("=--"):  # argparse reads it as the end of options and returns a list
            return _refuse(arguments.command, f"{word[:-3]} must have a value, got '--'; give another")
        if not _is_encodable(word):
            return _refuse(arguments.command, f"an argument must be text, got {word!a}; give another")
    try:
        with messages.warnings_in_one_line(arguments.command):
            return int(_COMMANDS[arguments.command].run(arguments))
    except CommandError as error:
        return _refuse(arguments.command, str(error))
    except _OF_LIBRARY as error:
        return _refuse(arguments.command, messages.as_options(str(error), vars(arguments)))
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if not messages.is_out_of_memory(error):
            raise
        return _refuse(arguments.command, messages.out_of_memory(error, vars(arguments)))
    except BrokenPipeError:  # `jitaccel doctor | head`: the reader is gone; must not be reported at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or "a file"
        return _refuse(arguments.command, f"{where} must be writable, got: {error.strerror}; written files are kept")


def _is_encodable(word: str) -> bool:
    """Whether a word can be a name or a text, which a lone surrogate cannot."""
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        return False
    return True


def _refuse(command: str, reason: str) -> int:
    line = "; ".join(line.strip() for line in reason.splitlines() if line.strip())
    print(f"jitaccel {command}: {line}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jitaccel", description="Training-free spatial acceleration of flow-matching transformers."
    )
    parser.add_argument("--version", action="version", version=f"jitaccel {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in _COMMANDS.items():
        line = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name, help=line, description=line, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
    return parser


def _version() -> str:
    try:
        return metadata.version("jitaccel")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
