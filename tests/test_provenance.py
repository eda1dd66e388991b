"""The commit recorded with a measurement: that of our checkout, never that of an enclosing repository."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import jitaccel
from jitaccel import provenance, version

INSTALLED = f"installed {jitaccel.__version__}"
PROJECT = '[project]\nname = "jitaccel"\nversion = "7.8.9"\n'
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    settings = ("user.name=a", "user.email=a@b.c", "core.hooksPath=/dev/null", "core.fsmonitor=false")
    own = [part for setting in settings for part in ("-c", setting)]
    done = subprocess.run(["git", *own, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path, inside: str, project: str | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a package in a folder of a repository, which provenance takes for its own."""
    root = folder / inside
    (root / "jitaccel").mkdir(parents=True)
    (root / "jitaccel" / "version.py").write_text("")
    if project is not None:
        (root / "pyproject.toml").write_text(project)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    monkeypatch.delenv("JITACCEL_COMMIT", raising=False)
    monkeypatch.setattr(version, "__file__", str(root / "jitaccel" / "version.py"))
    return root


def watched(folder: Path) -> Path:
    """Sets a file-system monitor that leaves a trace, and returns the path of the trace."""
    trace, program = folder.parent / "trace", folder.parent / "monitor"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    git(folder, "config", "core.fsmonitor", str(program))
    return trace


def test_commit_of_our_own_checkout_is_named_without_running_its_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own"
    repository(folder, ".", PROJECT, monkeypatch)
    trace = watched(folder)
    head = git(folder, "rev-parse", "--short=12", "HEAD")
    assert provenance.commit() == head
    (folder / "pyproject.toml").write_text(PROJECT + "# changed\n")
    assert provenance.commit() == f"{head}-dirty"
    assert not trace.exists()


@pytest.mark.parametrize(
    ("inside", "project"),
    [
        ("venv/site-packages", None),
        (".", '[project]\nname = "theirs"\nversion = "1.0"\n'),
        (".", "no TOML at all ["),
        ("third_party/copy", PROJECT),
    ],
    ids=["installed", "copied into their package", "damaged", "copied whole"],
)
def test_commit_of_somebody_elses_repository_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, project: str | None
) -> None:
    folder = tmp_path / "theirs"
    repository(folder, inside, project, monkeypatch)
    trace = watched(folder)
    assert provenance.commit() == INSTALLED
    assert not trace.exists()


def test_repository_of_a_surrounding_hook_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    repository(theirs, ".", None, monkeypatch)
    repository(own, ".", PROJECT, monkeypatch)
    head = git(own, "rev-parse", "--short=12", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))
    assert provenance.commit() == head
