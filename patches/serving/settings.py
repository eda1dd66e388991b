"""Reads an engine plug-in's settings from an environment variable, and applies them to the engine's pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jitaccel.errors import ConfigError, UnsupportedModelError

VARIABLE = "JITACCEL_CONFIG"
_FILES = (".json", ".yaml", ".yml")
_log = logging.getLogger(__name__)


def asked(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jitaccel.apply` from JITACCEL_CONFIG; None if it is not set or empty.

    The variable holds the name of a preset (`7x`), a JSON object (`{"preset": "7x", "steps": 14}`), or the path of a
    JSON or YAML file with such an object.

    Raises:
        ConfigError: If the variable holds none of these.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return None
    found: Any = {"preset": text}
    if text.startswith("{"):
        found = _parsed(text, text)
    elif text.lower().endswith(_FILES):
        found = _of_file(Path(text))
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{VARIABLE}: the settings must be an object of names and values, got {found!r}")
    return found


def _of_file(path: Path) -> Any:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{VARIABLE}: the file must be readable, got {error}") from None
    if path.suffix.lower() == ".json":
        return _parsed(text, str(path))
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{VARIABLE}: YAML must come with PyYAML installed, got none; use JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{VARIABLE}: {path} must be YAML, got an error: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: {where} must be JSON, got an error: {error}") from None


def accelerate(pipeline: Any, settings: Mapping[str, Any], engine: str) -> None:
    """Applies jitaccel to the pipeline inside an engine. If `apply` refuses, logs the error and runs dense.

    Args:
        pipeline: The diffusers pipeline.
        settings: Arguments of `jitaccel.apply`. With `strict`, a refusal is raised, and the engine does not start.
        engine: Name of the engine in the log.

    Raises:
        ConfigError: If no pipeline could have these settings, or, with `strict`, if `apply` raises it.
        UnsupportedModelError: With `strict`, if `apply` raises it.
    """
    from jitaccel.api import apply

    try:
        handle = apply(pipeline, **settings)
    except UnsupportedModelError as error:
        if settings.get("strict"):
            raise
        _log.error("jitaccel: %s runs dense, because %s", engine, error)
        return
    _log.warning("jitaccel: %s is accelerated, %r", engine, handle)  # engines only show warnings of other packages
