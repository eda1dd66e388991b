"""Extras, tests and modules named in the workflows exist; actionlint runs in a workflow and checks syntax."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(workflow: Path) -> list[dict[str, object]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step for job in jobs for step in job.get("steps", [])]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_commands_name_extras_tests_and_modules_that_are_there(workflow: Path) -> None:
    commands = "\n".join(str(step.get("run", "")) for step in steps(workflow))
    extras = {extra for named in re.findall(r"'\.\[([\w,-]+)\]'", commands) for extra in named.split(",")}
    assert extras <= PROJECT["optional-dependencies"].keys()
    paths = re.findall(r"(?<=\s)(?:tests|release)[/\w.]*|\.ci/run", commands)
    assert all((ROOT / path).exists() or (ROOT / f"{path.replace('.', '/')}.py").exists() for path in paths), paths


def test_every_python_that_the_package_names_is_tested() -> None:
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    tested = {case["python"] for case in tests["jobs"]["versions"]["strategy"]["matrix"]["include"]}
    named = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)}
    assert tested == named and f">={min(named, key=lambda version: int(version[2:]))}" == PROJECT["requires-python"]


def test_only_the_upload_may_do_more_than_read() -> None:
    for workflow in WORKFLOWS:
        content = yaml.safe_load(workflow.read_text())
        assert content["permissions"] == {"contents": "read"}, workflow.name
        more = {name for name, job in content["jobs"].items() if "permissions" in job}
        assert more == ({"publish"} if workflow.name == "release.yml" else set())


def test_changelog_has_this_version() -> None:
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
