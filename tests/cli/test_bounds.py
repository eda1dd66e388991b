"""The bounds of every numeric option: the last valid number works, the next is refused, docs and errors name both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jitaccel import cli, loading
from jitaccel.cli import limits, options
from jitaccel.errors import CommandError
from jitaccel.limits import MOST_BATCH, MOST_SIDE
from jitaccel.method.checks import MAX_STEPS

BASE = {
    "generate": ["--prompt", "a", "--preset", "none"],
    "view": ["--prompt", "a"],
    "export": [],
    "eval": ["--metrics", "psnr"],
    "demo": [],
}
FILES = {"generate": "a.png", "view": "a.html", "export": "stages", "eval": "out", "demo": "out"}
BOUNDS: list[tuple[str, str, int, int]] = [
    *[(command, "--seed", 0, 2**63 - 1) for command in BASE if command != "export"],
    *[(command, "--max-sequence-length", 1, 512) for command in BASE if command != "demo"],
    *[(command, "--batch-size", 1, MOST_BATCH) for command in ("export", "eval")],
    ("generate", "--steps", 1, MAX_STEPS),
    ("demo", "--prompts", 1, limits.MOST_PROMPTS),
]


class _LoadedError(Exception):
    """Every check before a model was passed."""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")

    def load(*_: Any, **__: Any) -> Any:
        raise _LoadedError

    monkeypatch.setattr("jitaccel.loading.load_pipeline", load)
    monkeypatch.setattr("jitaccel.loading.pipeline_class", lambda _: None)


def _argv(command: str, tmp_path: Path, *more: object) -> list[str]:
    return [command, *BASE[command], "--out", str(tmp_path / FILES[command]), *map(str, more)]


def _refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert cli.main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("jitaccel "))
    return line


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(("command", "option", "least", "most"), BOUNDS)
def test_numbers_up_to_the_bounds_are_taken_and_those_beyond_are_not(
    command: str, option: str, least: int, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (least, most):
        with pytest.raises(_LoadedError):
            cli.main(_argv(command, tmp_path, f"{option}={value}"))
    capsys.readouterr()
    for value in (least - 1, most + 1):
        line = _refusal(capsys, _argv(command, tmp_path, f"{option}={value}"))
        shown = "2**63 - 1" if most == 2**63 - 1 else most
        assert f"{option} must be in {least}..{shown}, got {value}" in line


def test_every_number_with_a_bound_is_tried() -> None:
    assert {option for _, option, _, _ in BOUNDS} == {f"--{name.replace('_', '-')}" for name in limits._WHOLE}


@pytest.mark.usefixtures("loads")
def test_bounds_of_evaluated_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (2, limits.MOST_PROMPTS):
        with pytest.raises(_LoadedError):
            cli.main(_argv("eval", tmp_path, "--prompts", value))
    capsys.readouterr()
    for value in (1, limits.MOST_PROMPTS + 1):
        line = _refusal(capsys, _argv("eval", tmp_path, f"--prompts={value}"))
        assert f"at least 2 and at most {limits.MOST_PROMPTS}, got {value}" in line


def test_bounds_of_sides() -> None:
    for size in ((1, 1), (MOST_SIDE, 1), (1, MOST_SIDE), (MOST_SIDE, MOST_SIDE)):
        limits.check_size(size)
    for size in ((MOST_SIDE + 1, 1), (1, MOST_SIDE + 1), (0, 1), (1, 0)):
        with pytest.raises(CommandError, match=rf"--size must be of sides in 1\.\.{MOST_SIDE} pixels"):
            limits.check_size(size)


def test_bound_of_tokens() -> None:
    """A picture may have 65,536 tokens: 256 by 256 of them, or any other shape."""
    sizes = loading.PictureSizes(unit=16, side=1024)
    for size in ((256 * 16, 256 * 16), (65_536 * 16, 16), (16, 65_536 * 16)):
        options.check_size(size, sizes)
    for size in ((257 * 16, 256 * 16), (65_537 * 16, 16)):
        with pytest.raises(CommandError, match="--size must be at most 4096x4096 pixels in all"):
            options.check_size(size, sizes)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("option", "taken", "refused"),
    [
        ("--fps", ("1", "120"), ("0.99", "120.01", "nan")),
        ("--frames", ("1",), ("0",)),
        ("--guidance", ("0",), ("-0.01", "inf", "nan")),
        ("--true-cfg", ("1.01",), ("1", "inf", "nan")),
    ],
)
def test_bounds_of_other_numbers_of_generate(
    option: str, taken: tuple[str, ...], refused: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in taken:
        with pytest.raises(_LoadedError):
            cli.main(_argv("generate", tmp_path, f"{option}={value}"))
    capsys.readouterr()
    for value in refused:
        assert f"{option} must be" in _refusal(capsys, _argv("generate", tmp_path, f"{option}={value}"))
