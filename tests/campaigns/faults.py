"""Exceptions, also KeyboardInterrupt, at any line of this package: afterwards the patch can be removed completely.

A trace function raises at the n-th line that the package runs during an action, with n drawn at random.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import jitaccel
from tests.campaigns.campaign import Counts, Survivor
from tests.campaigns.operations import is_ours
from tests.campaigns.targets import CONFIGS, expected, registered
from tests.support import tiny
from tests.support.patched import CASES, Case, picture_of
from tests.support.tiny import SHORT

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = tuple(str(folder) for folder in (_ROOT / "jitaccel", _ROOT / "patches"))
_ACTIONS = ("apply", "apply", "again", "remove", "remove", "generate", "generate", "generate", "export")


class Injected(Exception):
    """The injected fault."""


@contextmanager
def _traced(at: int | None, kind: type[BaseException], seen: list[str]) -> Iterator[None]:
    """Records the lines of the package that run, and raises at line number `at` of these."""

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(seen) - 1 == at:
                raise kind
        return line

    def call(frame: FrameType, _: str, __: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(_FOLDERS) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _faulty(action: Callable[[], Any], kind: type[BaseException], at: int) -> str:
    """Runs an action with a fault at this line; returns where it was raised, or "" if fewer lines ran."""
    seen: list[str] = []
    try:
        with _traced(at, kind, seen):
            action()
    except (Injected, KeyboardInterrupt):
        pass
    except BaseException as error:
        raise Survivor(f"the fault at {seen[-1]} became {type(error).__name__}: {error}") from error
    return seen[at] if len(seen) > at else ""


def _lines(action: Callable[[], Any]) -> int:
    seen: list[str] = []
    with _traced(None, Injected, seen):
        action()
    return len(seen)


def case(rng: random.Random, counts: Counts) -> None:
    """Runs one action on one target and interrupts it somewhere."""
    action = rng.choice(_ACTIONS)
    kind = rng.choice((Injected, KeyboardInterrupt))
    with registered(), torch.no_grad():
        if action == "export":
            _export(rng, kind)
        else:
            _patched(rng, action, kind)
    counts.operations += 1
    counts.faults += 1


def _patched(rng: random.Random, action: str, kind: type[BaseException]) -> None:
    name, config = rng.choice([*CASES]), rng.choice([*CONFIGS])
    case = CASES[name]
    target = case.make()
    untouched = picture_of(target)
    case_of: dict[str, Callable[[], Any]] = {
        "apply": lambda: jitaccel.apply(target, CONFIGS[config]),
        "again": lambda: jitaccel.apply(target, CONFIGS[config]),
        "remove": lambda: jitaccel.remove(target),
        "generate": lambda: case.generate(target, 0),
    }

    def prepare() -> None:
        jitaccel.remove(target)
        if action != "apply":
            jitaccel.apply(target, CONFIGS["short"])

    prepare()
    count = _lines(case_of[action])
    prepare()
    where = (
        f"{name}: {action} ({config}) with {kind.__name__} at {_faulty(case_of[action], kind, rng.randrange(count))}"
    )
    if action in ("generate", "again"):
        handle = jitaccel.handle_of(target)
        if handle is None:
            raise Survivor(f"{where} leaves no handle")
        names = [each for each in ("short", config) if CONFIGS[each] == handle.config]
        if not names or not torch.equal(case.generate(target, 1), expected(name, names[0], 1)):
            raise Survivor(f"{where} makes the next picture wrong")
    jitaccel.remove(target)
    after = picture_of(target)
    left = [key for key in {*after, *untouched} if is_ours(key) and after.get(key) != untouched.get(key)]
    left += _hook_names(case, target)
    if action == "apply" and "_diffusers_hook" in {key.partition(".")[2] for key in after}:
        left.append("_diffusers_hook")
    if left or jitaccel.handle_of(target) is not None:
        raise Survivor(f"{where} leaves {left}")
    if not torch.equal(case.generate(target, 1), expected(name, None, 1)):
        raise Survivor(f"{where} changes the picture for good")


def _hook_names(case: Case, target: Any) -> list[str]:
    """Returns the names of diffusers' hooks on the networks; diffusers keeps an empty registry after removal."""
    registries = [vars(part).get("_diffusers_hook") for part in case.parts(target)]
    return [name for registry in registries if registry is not None for name in registry.hooks]


def _export(rng: random.Random, kind: type[BaseException]) -> None:
    pipe = tiny.pipeline()
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "stages"

        def action() -> None:
            jitaccel.export(pipe, folder, SHORT, size=(48, 48), format="torchscript", text_tokens=tiny.TEXT_TOKENS)

        where = _faulty(action, kind, rng.randrange(3000))
        if folder.exists():
            jitaccel.load_exported(folder)  # must be complete
        if left := [path.name for path in Path(above).iterdir() if path != folder]:
            raise Survivor(f"export with {kind.__name__} at {where} leaves {left}")
    if jitaccel.handle_of(pipe) is not None:
        raise Survivor(f"export with {kind.__name__} at {where} leaves the pipeline patched")
