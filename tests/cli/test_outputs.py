"""Output paths of commands: unwritable ones are reported before a model is loaded, and finished pictures are kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jitaccel import cli, loading
from jitaccel.cli import outputs
from jitaccel.errors import CommandError

COMMANDS = {
    "generate": lambda out: ["generate", "--prompt", "a", "--out", str(out / "a.png")],
    "demo": lambda out: ["demo", "--prompts", "1", "--out", str(out)],
    "eval": lambda out: ["eval", "--prompts", "2", "--out", str(out)],
    "export": lambda out: ["export", "--out", str(out)],
}
Argv = Callable[[Path], list[str]]


def _no_model(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


def _fails(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jitaccel ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_pipeline", _no_model)


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("command", COMMANDS)
def test_folder_that_takes_no_file_is_told_before_a_model_is_loaded(
    command: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", _fails(code))
    assert cli.main(COMMANDS[command](tmp_path / "new" / "out")) == 2
    line = _one_line(capsys)
    assert "--out must be writable" in line and os.strerror(code) in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("without_models")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="has no folder that takes no file from anybody")
@pytest.mark.parametrize("command", COMMANDS)
def test_folder_that_the_system_keeps_for_itself_is_told(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(COMMANDS[command](Path("/proc/jitaccel"))) == 2
    assert "--out must be writable" in _one_line(capsys)


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("name", ["a" * 300, "a/" + "b" * 300, "a\0b"], ids=["long", "long below", "null"])
@pytest.mark.parametrize("command", COMMANDS)
def test_name_that_no_file_can_have_is_told(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(COMMANDS[command](tmp_path / name)) == 2
    assert "--out must be" in _one_line(capsys)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp", ".bmp"])
def test_finished_picture_that_cannot_be_saved_is_kept_elsewhere(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, out = tmp_path / "temporary", tmp_path / "out" / f"a{suffix}"
    temporary.mkdir()
    monkeypatch.setattr(outputs.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(outputs, "write_whole", _fails(errno.ENOSPC))
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    with pytest.raises(CommandError, match=r"No space left.*the picture is in") as raised:
        outputs.save_picture(picture, out)
    (kept,) = temporary.rglob(f"*{suffix}")
    assert str(kept) in str(raised.value) and Image.open(kept).size == (8, 8)
    monkeypatch.setattr(outputs.tempfile, "mkdtemp", _fails(errno.ENOSPC))
    with pytest.raises(CommandError, match="nor could the picture be kept"):
        outputs.save_picture(picture, out)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_picture_that_is_cut_off_leaves_what_stood(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    outputs.save_picture(Image.new("RGB", (8, 8)), out)
    before = out.read_bytes()

    def cut_off(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise kind

    monkeypatch.setattr(Path, "write_bytes", cut_off)
    with pytest.raises((CommandError, KeyboardInterrupt)):
        outputs.save_picture(Image.new("RGB", (9, 9)), out)
    assert [*tmp_path.iterdir()] == [out] and out.read_bytes() == before


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize(
    "argv",
    [
        ["demo", "--prompts", "99999999999999999999999"], ["eval", "--prompts", "99999999999999999999999"],
        ["eval", "--prompts", "1" * 5000], ["eval", "--prompts", "²"], ["eval", "--seed", "9" * 23],
        ["eval", "--batch-size", "9" * 20], ["eval", "--guidance", "nan"], ["eval", "--guidance", "inf"],
        ["eval", "--size", "9" * 30], ["eval", "--size", "99999x16"], ["eval", "--max-sequence-length", "9" * 20],
        ["demo", "--seed", "-5"], ["demo", "--seed", "9" * 23],
        ["generate", "--steps", "9" * 20, "--preset", "none"], ["generate", "--guidance", "nan"],
        ["generate", "--true-cfg", "nan"], ["generate", "--true-cfg", "inf"], ["generate", "--size", "9" * 14],
        ["generate", "--size", "16x0"], ["generate", "--seed", "9" * 30],
        ["generate", "--max-sequence-length", "9" * 30], ["export", "--max-sequence-length", "0"],
        ["export", "--batch-size", "9" * 12], ["export", "--size", "9999999999x16"],
    ],
    ids=lambda argv: " ".join(argv)[:40],
)  # fmt: skip
def test_number_beyond_all_bounds_is_told_before_a_model_is_loaded(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"generate": ["--prompt", "a", "--out", str(tmp_path / "a.png")]}
    assert cli.main([*argv, *needed.get(argv[0], ["--out", str(tmp_path / "out")])]) == 2
    line = _one_line(capsys)
    assert argv[1] in line and " must " in line and len(line) < 300
    assert not [*tmp_path.iterdir()]


def test_full_disk_during_a_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.eval, "_study", _fails(errno.ENOSPC))
    assert cli.main(["eval", "--prompts", "2", "--out", str(tmp_path / "out")]) == 2
    assert "No space left" in _one_line(capsys)
    monkeypatch.setattr(cli.eval, "_study", _fails(errno.ENOENT))  # no matter of the place: a fault of the program
    with pytest.raises(FileNotFoundError):
        cli.main(["eval", "--prompts", "2", "--out", str(tmp_path / "out")])
