"""Settings of an engine plug-in in JITACCEL_CONFIG."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from jitaccel import ConfigError, UnsupportedModelError, handle_of
from jitaccel.patches.serving.settings import accelerate, asked
from tests.support import tiny


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("  ", None),
        ("4x", {"preset": "4x"}),
        ('{"preset": "7x", "steps": 14}', {"preset": "7x", "steps": 14}),
    ],
)
def test_variable_holds_a_preset_or_json(text: str, expected: Any) -> None:
    assert asked({"JITACCEL_CONFIG": text}) == expected
    assert asked({}) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"preset": "4x", "steps": 20}'),
        ("a.yaml", "preset: 4x\nsteps: 20\n"),
        ("a.YML", "{preset: 4x, steps: 20}"),
    ],
)
def test_variable_names_a_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert asked({"JITACCEL_CONFIG": str(tmp_path / name)}) == {"preset": "4x", "steps": 20}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{", "must be JSON"),
        ("a.yaml", "{", "must be YAML"),
        ("a.yaml", "- 4x", "must be an object of names and values"),
        ("a.yaml", "4: x", "must be an object of names and values"),
    ],
)
def test_file_that_holds_no_settings_is_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=says):
        asked({"JITACCEL_CONFIG": str(tmp_path / name)})


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be readable"):
        asked({"JITACCEL_CONFIG": "/nowhere/a.yaml"})
    with pytest.raises(ConfigError, match="must be JSON"):
        asked({"JITACCEL_CONFIG": "{preset}"})


def test_refusal_goes_to_the_log_and_the_engine_runs_dense(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny.pipeline(scheduler=tiny.scheduler(stochastic_sampling=True))
    accelerate(pipe, {"preset": "7x"}, "An engine")
    assert "An engine runs dense, because" in caplog.text and handle_of(pipe) is None
    assert caplog.records[-1].levelno == logging.ERROR
    with pytest.raises(UnsupportedModelError):
        accelerate(pipe, {"preset": "7x", "strict": True}, "An engine")


def test_settings_that_no_pipeline_can_have_are_raised() -> None:
    with pytest.raises(ConfigError, match="preset must be one of"):
        accelerate(tiny.pipeline(), {"preset": "9x"}, "An engine")
