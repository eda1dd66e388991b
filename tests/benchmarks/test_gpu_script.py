"""The scripts for GPU machines: steps they skip, stop or resume, files they copy, and a dry run of every step."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECOND = ["float8", "batches", "large", "video", "wan", "kernels", "startup"]  # cpp takes a compiler half a minute
STEPS = ["load", "memcheck", "racecheck", "operators", "graphs", "targets", "agreement", "record"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def _tree(tmp_path: Path) -> Path:
    """Returns a separate tree with the script, because the script works in a folder of its own tree."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("jitaccel", "tests", "patches", "pyproject.toml", "assets"):
        (tree / name).symlink_to(ROOT / name)
    return tree


def _run(tree: Path, *arguments: str, python: str = sys.executable, **environment: str) -> list[str]:
    done = subprocess.run(
        ["bash", str(tree / "benchmarks" / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": python, **environment},
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_steps_that_are_done_are_left_out_failures_go_on_and_limits_hold(tmp_path: Path) -> None:
    tree, out, python, calls = _tree(tmp_path), tmp_path / "out", tmp_path / "python", tmp_path / "calls"
    python.write_text(
        f'#!/bin/sh\necho "$*" >>"{calls}"\n'
        'case "$*" in *" packing "*) echo "3 cases were not begun within 1 s";; *" kernels "*) exit 3;; '
        '*" startup "*) sleep 60;; esac\n'
    )
    python.chmod(0o755)
    steps = ("kernels", "batches", "load")

    assert _run(tree, str(out), *steps, python=str(python), BUDGET="0")[0] == (
        "kernels: not begun within 0 s, run the script again"
    )
    lines = [line for line in _run(tree, str(out), *steps, python=str(python)) if ": " in line and "after" in line]
    assert [line.partition(" after")[0] for line in lines] == ["kernels: failed", "batches: begun", "load: done"]
    again = _run(tree, str(out), "load", "batches", python=str(python))
    assert again[0] == "load: done before" and again[1].startswith("batches: begun")
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "steps.txt"]
    assert "== kernels:" in (out / "log.txt").read_text()
    benched = [line for line in calls.read_text().splitlines() if line.startswith("-m benchmarks ")]
    assert all("--device cuda" in line and "--resume --within" in line for line in benched)
    cut = _run(tree, str(out), "startup", python=str(python), BUDGET="6")
    assert cut[0].startswith("startup: cut off after")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[], SECOND], ids=["first", "second"])
def test_dry_run_goes_through_every_step(steps: list[str], tmp_path: Path) -> None:
    tree, out = _tree(tmp_path), tmp_path / "out"
    lines = [line for line in _run(tree, "--dry-run", str(out), *steps) if " after " in line]
    assert [line.partition(" after")[0] for line in lines] == [f"{step}: done" for step in steps or STEPS], (
        out / "log.txt"
    ).read_text()
    wanted = ["log.txt", "steps.txt"]
    if not steps:
        assert '"is_closing": true' in (out / "rows.jsonl").read_text()
        wanted = ["log.txt", "rows.jsonl", "steps.txt"]
    assert sorted(path.name for path in out.iterdir()) == wanted
    for step in ("float8", "batches", "large", "video", "wan", "kernels", "startup"):  # steps not begun are looked up
        section = (out / "log.txt").read_text().partition(f"== {step}:")[2].partition("\n== ")[0]
        assert (step in steps) == bool(re.search(r"[1-9]\d* cases? (was|were) not begun", section)), section


def test_second_script_names_steps_of_the_first(tmp_path: Path) -> None:
    steps = (ROOT / "benchmarks" / "gpu2.sh").read_text().rpartition("\\\n")[2].split()
    first = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert set(steps) >= {"load", "cpp", *SECOND} and all(f"\n        {step})" in first for step in steps)
