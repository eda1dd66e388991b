"""The bounds of every numeric argument: the last valid number works, and the next is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jitaccel
from jitaccel import ConfigError, Request, noise_levels
from jitaccel.limits import MOST_BATCH, MOST_SHARED, MOST_SIDE, MOST_TEXT_TOKENS
from jitaccel.method.checks import MAX_STEPS
from tests.support.tiny import SHORT


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("height", 1, MOST_SIDE),
        ("width", 1, MOST_SIDE),
        ("seed", 0, 2**64 - 1),
        ("max_sequence_length", 1, MOST_TEXT_TOKENS),
        ("guidance_scale", 0, None),
        ("true_cfg_scale", 0, None),
    ],
)
def test_bounds_of_a_request(name: str, least: int, most: int | None) -> None:
    def problems(value: int) -> list[str]:
        fields: dict[str, Any] = {name: value}
        return Request(prompt="a", **fields).problems()

    assert problems(least) == [] and len(problems(least - 1)) == 1
    if most is not None:
        assert problems(most) == []
        (said,) = problems(most + 1)
        assert f"{name} must be a whole number from {least} to {most}, got {most + 1}" in said


def test_bounds_of_steps() -> None:
    for steps in (1, MAX_STEPS):
        assert len(noise_levels(SHORT.replace(densities=(1.0,), boundaries=(1.0,)), steps)) == steps + 1
        assert SHORT.replace(densities=(1.0,), boundaries=(1.0,), steps=steps).steps == steps
        assert Request(prompt="a", preset="dense", steps=steps).config().steps == steps
    for steps in (0, MAX_STEPS + 1):
        for ask in (
            lambda steps=steps: noise_levels(SHORT, steps),
            lambda steps=steps: SHORT.replace(steps=steps),
            Request(prompt="a", preset="dense", steps=steps).config,
        ):
            with pytest.raises(ConfigError, match=f"steps must be a whole number from 1 to {MAX_STEPS}"):
                ask()


def test_bounds_of_the_multiple() -> None:
    for multiple in (1, MOST_SHARED):
        assert SHORT.replace(multiple=multiple).multiple == multiple
        assert all(count % multiple == 0 for count in SHORT.token_counts(4 * MOST_SHARED, multiple=multiple))
    for multiple in (0, MOST_SHARED + 1):
        with pytest.raises(ConfigError, match=rf"JiTConfig: multiple must be .* in 1\.\.{MOST_SHARED}"):
            SHORT.replace(multiple=multiple)
        with pytest.raises(ConfigError, match=rf"token_counts: multiple must be .* in 1\.\.{MOST_SHARED}"):
            SHORT.token_counts(144, multiple=multiple)


@pytest.mark.parametrize(("name", "most"), [("batch_size", MOST_BATCH), ("text_tokens", MOST_TEXT_TOKENS)])
def test_bounds_of_an_export(name: str, most: int, tmp_path: Path) -> None:
    def export(value: int) -> None:
        given: dict[str, Any] = {name: value}
        jitaccel.export(object(), tmp_path / "stages", SHORT, size=(48, 48), format="torchscript", **given)

    for value in (1, most):  # the next thing that is looked at is the target
        with pytest.raises(jitaccel.UnsupportedModelError):
            export(value)
    for value in (0, most + 1):
        with pytest.raises(ConfigError, match=rf"export: {name} must be a whole number in 1\.\.{most}, got {value}"):
            export(value)


def test_bounds_of_the_text_of_a_measurement() -> None:
    for value in (1, MOST_TEXT_TOKENS):  # the next thing that is looked at is the target
        with pytest.raises(jitaccel.UnsupportedModelError):
            jitaccel.auto_config(object(), target_speedup=4.0, text_tokens=value)
    for value in (0, MOST_TEXT_TOKENS + 1):
        with pytest.raises(ConfigError, match=rf"text_tokens must be a whole number in 1\.\.{MOST_TEXT_TOKENS}"):
            jitaccel.auto_config(object(), target_speedup=4.0, text_tokens=value)
