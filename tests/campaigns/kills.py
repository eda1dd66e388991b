"""Kills processes while they write: files with their final names are complete, and resumed runs continue."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

import jitaccel
from jitaccel.cli.outputs import save_picture
from jitaccel.evaluation.clips import write_clip
from jitaccel.evaluation.study import append_lines, read_lines
from tests.campaigns import commands
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


_CLIPS = ("a.gif", *(("a.mp4",) if importlib.util.find_spec("imageio_ffmpeg") else ()))
_FRAMES = 6


def _clips(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (_FRAMES, 96, 96, 3), dtype=np.uint8)
    for number in range(10**6):
        side = 32 + number % 32 * 2
        write_clip(noise[:, :side, :side], folder / _CLIPS[number % len(_CLIPS)], fps=8.0)


def _check_clips(folder: Path) -> None:
    for path in (folder / name for name in _CLIPS if (folder / name).exists()):
        if path.suffix == ".gif":
            with Image.open(path) as clip:
                count = sum(1 for _ in ImageSequence.Iterator(clip))
        else:
            import imageio_ffmpeg

            count = imageio_ffmpeg.count_frames_and_secs(str(path))[0]
        if count != _FRAMES:
            raise Survivor(f"{path.name} has {count} of {_FRAMES} frames")


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
        if not path.name.startswith("."):  # truncated files keep a temporary name
            jitaccel.load_exported(path)


KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], None], float]] = {
    "picture": (_pictures, _check_picture, 0.2),
    "rows": (_rows, _check_rows, 0.2),
    "clip": (_clips, _check_clips, 1.0),
    "export": (_export, _check_export, 6.0),
    **{
        f"jitaccel {name}": (functools.partial(commands.run, name), commands.check, longest_s)
        for name, (_, longest_s) in commands.COMMANDS.items()
    },
}
"""The function that writes, the check after a kill, and the longest duration."""
_OFTEN = {"picture": 4, "rows": 4, "export": 1, "jitaccel export": 1}


def case(rng: random.Random, counts: Counts) -> None:
    """Kills one writing process at a random time or at a random write; a command is then run again."""
    kind = rng.choice([name for name in KINDS for _ in range(_OFTEN.get(name, 2))])
    write, check, longest_s = KINDS[kind]
    command = kind.removeprefix("jitaccel ")
    if command in commands.COMMANDS:
        commands.prepare()
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above)
        at_write = rng.random() < 0.5
        number, delay_s = rng.randint(1, 12), rng.uniform(0.0, 0.003)
        child = os.fork()
        if child == 0:  # a copy of this process, which must not return to the tests
            try:
                commands.quiet()
                if at_write:
                    _die_at_write(folder, number, delay_s)
                write(folder)
            finally:
                os._exit(1)
        _wait(child, 3.0 * longest_s if at_write else rng.uniform(0.0, longest_s))
        counts.operations += 1
        counts.faults += 1
        try:
            check(folder)
            if command in commands.COMMANDS and command != kind:
                commands.finish(command, folder)
        except Survivor:
            raise
        except Exception as error:
            raise Survivor(f"{kind}: {type(error).__name__}: {error}"[:400]) from error


def _wait(child: int, seconds: float) -> None:
    """Kills a process if it has not ended by itself after `seconds` seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(min(0.005, max(until - time.monotonic(), 0.0)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _die_at_write(folder: Path, number: int, delay_s: float) -> None:
    """Kills this process shortly after it opens a file in a folder to write, or moves one, for the number-th time."""
    left = number

    def see(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        is_write = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event == "os.rename") and str(given[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    sys.addaudithook(see)
