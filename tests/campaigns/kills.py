"""Processes that are killed while they write: what has its name is whole, and what is taken up again goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import jitaccel
from jitaccel.cli.outputs import save_picture
from jitaccel.evaluation.study import append_lines, read_lines
from tests.campaigns.campaign import Counts, Survivor
from tests.support import tiny
from tests.support.tiny import SHORT


def _pictures(folder: Path) -> None:
    for number in range(10**6):
        side = 64 + number % 64
        save_picture(Image.effect_noise((side, side), 50).convert("RGB"), folder / "a.png")


def _check_picture(folder: Path) -> None:
    if (folder / "a.png").exists():
        Image.open(folder / "a.png").load()


def _rows(folder: Path) -> None:
    with append_lines(folder / "rows.jsonl") as file:
        for number in range(10**6):
            file.write(json.dumps({"method": "7x", "prompt": "a" * 300, "prompt_index": number}) + "\n")
            if number % 7 == 0:
                file.flush()


def _check_rows(folder: Path) -> None:
    path = folder / "rows.jsonl"
    before = [row["prompt_index"] for row in read_lines(path)]
    if before != [*range(len(before))]:
        raise Survivor("rows are lost between others")
    with append_lines(path) as file:
        file.write(json.dumps({"prompt_index": -1}) + "\n")
    if [row["prompt_index"] for row in read_lines(path)] != [*before, -1]:
        raise Survivor("a row that is written after a kill is lost")


def _export(folder: Path) -> None:
    config = SHORT.replace(densities=(0.35, 1.0), boundaries=(0.5, 1.0), steps=3)
    for number in range(10**6):
        out = folder / f"{number}"
        jitaccel.export(tiny.pipeline(), out, config, size=(48, 48), format="torchscript", text_tokens=8)


def _check_export(folder: Path) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("."):  # what was cut off has a name that nothing looks for
            jitaccel.load_exported(path)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], float]] = {
    "picture": (_pictures, _check_picture, 0.2),
    "rows": (_rows, _check_rows, 0.2),
    "export": (_export, _check_export, 6.0),
}
"""What is written, what must hold after a kill, and how long it runs at most."""


def case(rng: random.Random, counts: Counts) -> None:
    """One process that writes, killed at a random time."""
    kind = rng.choice(("picture", "picture", "rows", "rows", "export"))
    write, check, longest_s = KINDS[kind]
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above)
        child = os.fork()
        if child == 0:  # a copy of this process, which must not come back into the tests
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                write(folder)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, longest_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts.operations += 1
        counts.faults += 1
        try:
            check(folder)
        except Survivor:
            raise
        except Exception as error:
            raise Survivor(f"{kind}: {type(error).__name__}: {error}"[:400]) from error
