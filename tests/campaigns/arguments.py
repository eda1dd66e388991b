"""Malformed arguments of every public function and of the command line raise an error of this package that names them.

Public functions are found through `jitaccel.__all__` and their signatures; a new function not listed here fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import random
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import jitaccel
from jitaccel import ArtefactError, ConfigError, NonFiniteVelocityError, UnsupportedModelError, cli, loading
from jitaccel.errors import CommandError
from tests.campaigns.campaign import Counts, Survivor
from tests.campaigns.exports import exported
from tests.support import tiny
from tests.support.tiny import SHORT

OWN = (ConfigError, UnsupportedModelError, ArtefactError, NonFiniteVelocityError, CommandError)
_NAMES_ITSELF = {"folder": ("folder", "manifest"), "target": ("target", "pipeline")}


class _Odd:
    """An object of an unrelated class."""


def _weird(rng: random.Random) -> Any:
    """Returns a value that hardly any argument accepts."""
    return rng.choice(
        [
            None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, -(10**30), 0.0, -0.5, 1e300, float("nan"),
            float("inf"), -float("inf"), 1j, "", "7x", "7X", "auto", "\ud800", "a\0b", "x" * 10_000, b"7x", [], {}, (),
            set(), [None], [[1]], (1,), (1, 2, 3), [1.0, 0.5], [float("nan"), 0.0], {"a": 1}, {1: 2}, range(3),
            object(),
            _Odd(), _Odd, len, torch.zeros(2), torch.tensor(float("nan")), slice(3), iter([1]), Path("/nowhere"),
        ]
    )  # fmt: skip


def _mutated(rng: random.Random, valid: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments with one or two of them replaced, and their names."""
    names = rng.sample([*valid], min(len(valid), rng.choice((1, 1, 2))))
    return {**valid, **{name: _weird(rng) for name in names}}, names


def _apply(rng: random.Random, mutate: Any) -> None:
    config = {field.name: getattr(SHORT, field.name) for field in fields(SHORT)}
    given = {
        "preset": SHORT, "noise_levels": None, "execution": "auto", "attention": "auto", "compile": False,
        "strict": False, "on_unsupported": "error", "controlnet": "dense", "target_speedup": None, "target_ms": None,
        "size": None, "text_tokens": None, **(config if rng.random() < 0.5 else {}),
    }  # fmt: skip
    target = tiny.transformer() if rng.random() < 0.5 else tiny.pipeline()
    with jitaccel.apply(target, **mutate(given)) as handle:
        repr(handle), str(handle.stats())


def _auto(rng: random.Random, mutate: Any) -> None:
    given = mutate({"speedup": 2.0, "ms": None, "size": (48, 48), "text_tokens": 8})
    jitaccel.apply(tiny.pipeline(), jitaccel.Auto(**given)).remove()


def _auto_config(rng: random.Random, mutate: Any) -> None:
    given = mutate({"target_speedup": 2.0, "target_ms": None, "size": (48, 48), "text_tokens": 8})
    jitaccel.auto_config(tiny.pipeline(), **given)


def _export(rng: random.Random, mutate: Any) -> None:
    with tempfile.TemporaryDirectory() as above:
        given = mutate(
            {
                "folder": Path(above) / "a", "preset": SHORT, "size": (48, 48), "format": "torchscript",
                "batch_size": 1, "text_tokens": 8, "attention": "sdpa", "options": None,
            }
        )  # fmt: skip
        if isinstance(given["folder"], (str, Path)) and "\0" not in str(given["folder"]):
            given["folder"] = Path(above) / str(given["folder"]).lstrip("/")  # nothing is written elsewhere
        jitaccel.export(tiny.pipeline(), **given)


def _load_exported(rng: random.Random, mutate: Any) -> None:
    jitaccel.load_exported(**mutate({"folder": exported(0), "device": None}))


def _generate_batch(rng: random.Random, mutate: Any) -> None:
    request = {
        "prompt": "a", "height": 48, "width": 48, "seed": 0, "preset": SHORT, "steps": None, "negative_prompt": None,
        "true_cfg_scale": 1.0, "guidance_scale": 3.5, "max_sequence_length": 8,
    }  # fmt: skip
    if rng.random() < 0.7:
        jitaccel.generate_batch(tiny.pipeline(), [jitaccel.Request(**mutate(request))], output_type="latent")
        return
    given = {"execution": "auto", "attention": "auto", "strict": False, "output_type": "latent", "requests": []}
    jitaccel.generate_batch(tiny.pipeline(), **mutate(given))


def _config(rng: random.Random, mutate: Any) -> None:
    given = mutate({field.name: getattr(SHORT, field.name) for field in fields(SHORT)})
    make = rng.choice((lambda g: jitaccel.JiTConfig(**g), jitaccel.JiTConfig.from_dict, lambda g: SHORT.replace(**g)))
    config = make(given)
    config.stage_ends(7) if config.steps == "caller" else config.stage_ends(config.steps)


def _noise_levels(rng: random.Random, mutate: Any) -> None:
    jitaccel.noise_levels(**mutate({"config": SHORT, "steps": 5}))


def _handles(rng: random.Random, mutate: Any) -> None:
    target = mutate({"target": None})["target"]
    if jitaccel.handle_of(target) is not None or jitaccel.remove(target):
        raise Survivor(f"{target!r} has a handle")


def _warmup(rng: random.Random, mutate: Any) -> None:
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, SHORT) as handle:
        given = mutate({"sizes": [(48, 48)], "batch_sizes": (1,)})
        handle.warmup(**given, progress=False, max_sequence_length=8)


def _methods(rng: random.Random, mutate: Any) -> None:
    given = mutate({"steps": 5, "step": 0, "num_tokens": 144, "num_forced": 0, "multiple": 1})
    name = rng.choice(("stage_ends", "stage_of_step", "token_counts"))
    known = inspect.signature(getattr(SHORT, name)).parameters
    getattr(SHORT, name)(**{each: value for each, value in given.items() if each in known})


FUNCTIONS: dict[str, Callable[[random.Random, Any], None]] = {
    "apply": _apply, "Auto": _auto, "auto_config": _auto_config, "export": _export, "load_exported": _load_exported,
    "generate_batch": _generate_batch, "Request": _generate_batch, "JiTConfig": _config,
    "noise_levels": _noise_levels, "handle_of": _handles, "remove": _handles, "Handle": _warmup, "PRESETS": _methods,
}  # fmt: skip
_NO_ARGUMENTS = {"Choice", "Outcome", "Sound", "Stats", "Exported", "embedded_model"}  # what is returned


def check_all_are_known() -> None:
    """Raises if a public name is not tried here."""
    errors = {error.__name__ for error in OWN}
    missing = {*jitaccel.__all__} - {*FUNCTIONS} - _NO_ARGUMENTS - errors
    if missing:
        raise Survivor(f"no malformed arguments are known of {', '.join(sorted(missing))}")


def case(rng: random.Random, counts: Counts) -> None:
    """Makes one call with malformed arguments."""
    check_all_are_known()
    if rng.random() < 0.3:
        _command(rng)
    else:
        _function(rng)
    counts.operations += 1
    counts.faults += 1


def _function(rng: random.Random) -> None:
    name = rng.choice([*FUNCTIONS])
    changed: dict[str, Any] = {}
    known: dict[str, Any] = {}

    def mutate(valid: Mapping[str, Any]) -> dict[str, Any]:
        given, names = _mutated(rng, valid)
        changed.update({each: given[each] for each in names})
        known.update(valid)
        return given

    what = f"jitaccel.{name}({{}})"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            FUNCTIONS[name](rng, mutate)
    except OWN as error:
        named = any(word in str(error) for each in known for word in _NAMES_ITSELF.get(each, (each,)))
        if not named:
            raise Survivor(f"{what.format(_shown(changed))}: names no argument: {error}"[:600]) from error
    except Survivor:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if type(error).__name__ == "_Hangs":
            raise Survivor(f"{what.format(_shown(changed))} hangs") from error
        raise Survivor(f"{what.format(_shown(changed))}: {type(error).__name__}: {error}"[:600]) from error


def _shown(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in changed.items())


def _short(value: Any) -> str:
    return "10**400" if isinstance(value, int) and abs(value) > 10**300 else repr(value)[:60]


# The command line

_COMMANDS: dict[str, dict[str, str]] = {  # with the values that keep a command from doing much
    "generate": {"--prompt": "a", "--out": "a.png", "--device": "cpu"},
    "view": {"--prompt": "a", "--out": "a.html", "--device": "cpu"},
    "demo": {"--prompts": "1", "--out": "out", "--device": "cpu"},
    "eval": {"--prompts": "2", "--metrics": "psnr", "--out": "out", "--device": "cpu"},
    "export": {"--out": "out", "--format": "torchscript", "--device": "cpu"},
    "bench": {"--repeat": "1"},
}
_WORDS = (
    "", " ", "0", "-1", "1e9", "nan", "inf", "-inf", "9" * 25, "9" * 5000, "1.5", "abc", "x", "0x10", "1x", "x1",
    "1x2x3",
    "²", "٣", "7x", "auto", "none", "cuda:99", "cpu:1", "/nowhere/at/all", "/proc/self/x", "a" * 300, ".", "..",
    "\ud800", "dense:0", "dense:99999999999999999999", ",", ",,", "dense:2,dense:2", "--", "-",
)  # fmt: skip


def _options_of(name: str) -> list[str]:
    """Returns the options of a command that take a value, read from its help."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"jitaccel.cli.{name}").add_arguments(parser)
    found = re.findall(r"^  (--[a-z-]+) [A-Z{]", parser.format_help(), re.MULTILINE)
    assert len(found) > 3, f"the help of {name} has another form"
    return sorted(set(found) - {"--model"})


def _command(rng: random.Random) -> None:
    name = rng.choice([*_COMMANDS])
    options = dict(_COMMANDS[name])
    changed = {option: rng.choice(_WORDS) for option in rng.sample(_options_of(name), rng.choice((1, 1, 2)))}
    if name == "bench":
        options["--list"] = ""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        options |= {"--out": f"{folder}/{options['--out']}"} if "--out" in options else {}
        argv = [name, *(f"{option}={value}" if value or option in changed else option
                        for option, value in {**options, **changed}.items())]  # fmt: skip
        error = io.StringIO()
        before, loading.load_pipeline = loading.load_pipeline, _loads_nothing
        try:
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                status = cli.main(argv)
        except SystemExit as left:
            status = left.code  # type: ignore[assignment]
        except Exception as raw:
            raise Survivor(f"jitaccel {' '.join(argv)[:200]}: {type(raw).__name__}: {raw}"[:600]) from raw
        finally:
            loading.load_pipeline = before
    said = error.getvalue()
    if status not in (0, 2) or "Traceback" in said:
        raise Survivor(f"jitaccel {' '.join(argv)[:200]}: status {status}: {said[-300:]}")
    is_named = "the model would be loaded now" in said or re.search(r"--|argument|device|preset", said) is not None
    if status == 2 and not is_named:
        raise Survivor(f"jitaccel {' '.join(argv)[:200]} names no argument: {said[-300:]}")


def _loads_nothing(*_: Any, **__: Any) -> Any:
    raise CommandError("the model would be loaded now")
