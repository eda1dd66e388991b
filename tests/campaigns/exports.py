"""Damages exports (flipped bytes, truncated, mixed, signed again): they are refused, and nothing is run."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import jitaccel
from jitaccel import ArtefactError
from jitaccel.artefacts.manifest import JSON
from tests.campaigns.campaign import Counts, Survivor
from tests.support import tiny
from tests.support.tiny import SHORT


@functools.cache
def exported(seed: int) -> Path:
    """Returns an exported folder, which is removed when the process ends."""
    above = tempfile.TemporaryDirectory(prefix="jitaccel-campaign-")
    _KEPT.append(above)
    config = SHORT.replace(densities=(0.35, 1.0), boundaries=(0.5, 1.0), steps=3)
    folder = Path(above.name) / "stages"
    pipe = tiny.pipeline(seed)
    return jitaccel.export(pipe, folder, config, size=(48, 48), format="torchscript", text_tokens=tiny.TEXT_TOKENS)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _flip(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of {path.name} at {place}"


def _truncate(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    kept = rng.choice((0, rng.randrange(len(content)), len(content) - 1))
    path.write_bytes(content[:kept])
    return f"{path.name} of {kept} bytes"


def _remove(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    return f"{path.name} is missing"


def _append(folder: Path, rng: random.Random) -> str:
    path = rng.choice([each for each in sorted(folder.iterdir()) if each.name != JSON])
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 8, 4096))))
    return f"{path.name} is longer"


def _foreign(folder: Path, rng: random.Random) -> str:
    others = exported(1)
    name = rng.choice(
        [each.name for each in sorted(folder.iterdir()) if each.name.endswith((".pt", "weights.safetensors"))]
    )
    other = others / name
    if name.endswith(".pt"):  # use another stage's program, because those of one configuration are equal
        other = rng.choice([each for each in sorted(folder.glob("*.pt")) if each.name != name])
    (folder / name).write_bytes(other.read_bytes())
    return f"{name} is another's"


def _no_manifest(folder: Path, rng: random.Random) -> str:
    contents = [
        "",
        "[]",
        "{}",
        "null",
        "3",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"sha256": 1}',
        "\x00" * 50,
        '{"version": 3, "sha256": ""}',
    ]
    content = rng.choice(contents)
    (folder / JSON).write_text(content)
    return f"{JSON} is {content[:30]!r}"


_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    2.5,
    "x",
    [],
    {},
    [None],
    [[]],
    10**30,
    {"a": []},
    "../x",
    ["../../etc/passwd"],
)


def _signed_again(folder: Path, rng: random.Random) -> str:
    path = folder / JSON
    content = json.loads(path.read_text())
    del content["sha256"]
    kind = rng.choice(("field", "drop", "file dropped", "file more", "file renamed", "digest"))
    files = content["files"]
    name = rng.choice(sorted(content))
    if kind == "field":
        name = rng.choice([each for each in sorted(content) if each not in ("model", "codebase", "attention")])
        none = name == "operators"  # a plan without operators is valid
        content[name] = rng.choice([odd for odd in _ODD if odd != content[name] and not (none and odd in ([], {}))])
    elif kind == "drop":
        del content[name]
    elif kind == "file dropped":
        name = rng.choice(sorted(files))
        del files[name]
        (folder / name).write_bytes(b"altered")
    elif kind == "file more":
        files[rng.choice(("../a", "/etc/passwd", "a.py", ""))] = "0" * 64
    elif kind == "file renamed":
        name = rng.choice(sorted(files))
        files[f"x{name}"] = files.pop(name)
    else:
        files[rng.choice(sorted(files))] = rng.choice(("", "0" * 64, None, 3))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}))
    return f"signed again: {kind} {name}={content.get(name)!r:.60}"


DAMAGE: tuple[Callable[[Path, random.Random], str], ...] = (
    _flip, _flip, _truncate, _remove, _append, _foreign, _no_manifest, _signed_again, _signed_again,
)  # fmt: skip


def case(rng: random.Random, counts: Counts) -> None:
    """Damages an export once and tries to load it."""
    whole = exported(0)
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "stages"
        shutil.copytree(whole, folder)
        what = rng.choice(DAMAGE)(folder, rng)
        counts.operations += 1
        counts.faults += 1
        is_same = all((folder / path.name).exists() for path in whole.iterdir()) and _content(folder) == _content(whole)
        loaded: list[Any] = []
        original = torch.jit.load
        torch.jit.load = lambda *given, **more: loaded.append(given) or original(*given, **more)
        try:
            jitaccel.load_exported(folder)
        except ArtefactError as error:
            if "export" not in str(error) and "copy" not in str(error):
                raise Survivor(f"{what}: says nothing of what to do: {error}") from error
            if loaded:
                raise Survivor(f"{what}: was refused after a program of it was loaded: {error}") from error
            return
        except Exception as error:
            raise Survivor(f"{what}: {type(error).__name__}: {error}"[:600]) from error
        finally:
            torch.jit.load = original
        if not is_same:
            raise Survivor(f"{what}: was loaded")


def _content(folder: Path) -> Any:
    """Returns the contents of a folder, ignoring white space in the manifest."""
    try:
        manifest = json.loads((folder / JSON).read_text())
    except (ValueError, RecursionError):
        return None
    return manifest, {path.name: path.read_bytes() for path in folder.iterdir() if path.name != JSON}
