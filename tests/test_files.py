"""Files under their final names are complete, whatever happens to the writer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jitaccel.files import is_there, whole, write_whole


@pytest.mark.parametrize("content", ["é\n", b"\x00\xff"], ids=["text", "bytes"])
def test_content_is_written_and_nothing_else(content: str | bytes, tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", content)
    assert (tmp_path / "a.txt").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_writer_that_fails_leaves_what_stood(error: type[BaseException], tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "before")

    def fail() -> None:
        with whole(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
def test_writer_that_is_killed_leaves_a_hidden_file_alone(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            with whole(tmp_path / "a.txt") as partial:
                partial.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and left.suffix == ".txt"
    write_whole(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_mode_of_a_file_is_that_of_any_other(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_name_that_is_too_long_stands_for_nothing(tmp_path: Path) -> None:
    assert is_there(tmp_path) and not is_there(tmp_path / "none") and not is_there(tmp_path / ("a" * 5000))
