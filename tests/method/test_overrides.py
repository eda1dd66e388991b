"""The typed keywords and names that editors complete match the real ones."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_type_hints

import pytest

import jitaccel
from jitaccel.method.config import JiTConfig
from jitaccel.method.overrides import Overrides
from jitaccel.method.presets import PresetName


def test_overrides_are_the_fields_of_the_configuration() -> None:
    assert get_type_hints(Overrides) == get_type_hints(JiTConfig)


def test_preset_names_are_the_presets() -> None:
    assert get_args(PresetName) == tuple(jitaccel.PRESETS)


@pytest.mark.parametrize("function", [jitaccel.apply, jitaccel.export, jitaccel.auto_config, JiTConfig.replace])
def test_public_functions_take_typed_overrides(function: Any) -> None:
    (keywords,) = (p for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD)
    assert "Unpack[Overrides]" in str(keywords.annotation) or keywords.annotation.__args__ == (Overrides,)
