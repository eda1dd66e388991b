"""Kills whole commands: files with their final names are complete, and the same command finishes afterwards."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import jitaccel
from jitaccel import cli, loading
from jitaccel.evaluation import judging
from tests.campaigns.campaign import Survivor
from tests.support import tiny

_PROMPTS = ("a red circle", "blue square")
_ENDS = {".html": "</html>", ".md": "\n", ".jsonl": "\n"}
_APPENDED = ("rows.jsonl", "scores.jsonl")  # readers skip a truncated line
_COMMON = ("--device", "cpu", "--max-sequence-length", "8", "--size", "48x48")


def _generate(folder: Path) -> list[str]:
    files = ["--out", f"{folder}/a.png", "--tokens", f"{folder}/tokens.jpg", "--report", f"{folder}/report.html"]
    return ["generate", "--prompt", "a red circle", "--overwrite", *_model(), *_COMMON, *files]


def _view(folder: Path) -> list[str]:
    made = ["--presets", "7x,few-steps", "--previews", "colours", "--overwrite", "--out", f"{folder}/report.html"]
    return ["view", "--prompt", "a red circle", *_model(), *_COMMON, *made]


def _export(folder: Path) -> list[str]:
    return ["export", "--format", "torchscript", *_model(), *_COMMON, "--out", f"{folder}/stages"]


def _eval(folder: Path) -> list[str]:
    asked = ["--prompts", str(_kept() / "prompts.txt"), "--methods", "dense:3,7x", "--metrics", "psnr,ssim"]
    return ["eval", *asked, *_model(), *_COMMON, "--out", str(folder)]


def _demo(folder: Path) -> list[str]:
    return ["demo", "--prompts", "1", "--device", "cpu", "--out", str(folder)]


COMMANDS: dict[str, tuple[Callable[[Path], list[str]], float]] = {
    "generate": (_generate, 1.0),
    "view": (_view, 1.5),
    "export": (_export, 7.0),
    "eval": (_eval, 2.0),
    "demo": (_demo, 2.0),
}
"""The arguments of a command from its output folder, and its approximate duration."""


def run(command: str, folder: Path) -> int:
    """Returns the exit status of a command that writes into a folder. Only for a process that ends afterwards."""
    if command == "demo":  # always uses the embedded pipeline, whose pictures take a minute
        loading.load_pipeline = lambda *_, **__: tiny.pipeline()
        judging.load_judge = lambda *_: None
    return cli.main(COMMANDS[command][0](folder))


def check(folder: Path) -> None:
    """Raises if a file is truncated. Names that begin with a dot are temporary and not checked."""
    for path in sorted(folder.rglob("*")):
        if path.name in _APPENDED or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix in (".png", ".jpg"):
            Image.open(path).load()
        elif path.suffix in _ENDS:
            text = path.read_text()
            if not text.endswith(_ENDS[path.suffix]):
                raise Survivor(f"{path.name} is cut off")
            if path.suffix == ".jsonl":
                [json.loads(line) for line in text.splitlines()]
        elif path.is_dir() and path.name == "stages":
            jitaccel.load_exported(path)


def finish(command: str, folder: Path) -> None:
    """Raises Survivor if the same command, run again after a kill, does not finish its work."""
    if command == "export" and (folder / "stages").exists():
        return  # `check` found it complete, and it is not overwritten
    child = os.fork()
    if child == 0:
        status = 1
        try:
            quiet()
            status = run(command, folder)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise Survivor(f"{command}, run again after a kill, ended with {status}")
    missing = [name for name in MADE[command] if not (folder / name).exists()]
    if missing:
        raise Survivor(f"{command}, run again after a kill, has not written {', '.join(missing)}")
    check(folder)


MADE = {
    "generate": ("a.png", "tokens.jpg", "report.html"),
    "view": ("report.html",),
    "export": ("stages/manifest.json",),
    "eval": ("results.jsonl", "table.jsonl", "table.md", "contact.png", "rows.jsonl"),
    "demo": ("demo.png", "tokens.png"),
}
"""The files that exist after a command has run."""


def prepare() -> None:
    """Makes the inputs of commands, before these run in copies of this process."""
    _kept()


def quiet() -> None:
    """Discards the output of this process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


@functools.cache
def _kept() -> Path:
    """Returns a folder with a tiny model and prompts, which is removed when the process ends."""
    _ABOVE.append(tempfile.TemporaryDirectory(prefix="jitaccel-campaign-"))
    folder = Path(_ABOVE[-1].name)
    tiny.pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(_PROMPTS))
    return folder


_ABOVE: list[tempfile.TemporaryDirectory[str]] = []


def _model() -> list[str]:
    return ["--model", str(_kept() / "model")]
