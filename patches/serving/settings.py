"""What one environment variable asks an engine's plug-in for, and how the pipeline inside gets it."""

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
    """Returns the arguments of `jitaccel.apply` that JITACCEL_CONFIG asks for; None where it is not set, or empty.

    It is the name of a preset (`7x`), a JSON object (`{"preset": "7x", "steps": 14}`), or a file of one, JSON or YAML.

    Raises:
        ConfigError: For what is none of these.
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
    """Applies jitaccel to the pipeline inside an engine; a refusal goes to the log, and the engine runs dense.

    Args:
        pipeline: Of diffusers.
        settings: Arguments of `jitaccel.apply`. With `strict`, a refusal is raised, and the engine does not start.
        engine: Its name in the log.

    Raises:
        ConfigError, UnsupportedModelError: Of `apply`, with `strict`; ConfigError in any case, for settings that no
            pipeline can have.
    """
    from jitaccel.api import apply

    try:
        handle = apply(pipeline, **settings)
    except UnsupportedModelError as error:
        if settings.get("strict"):
            raise
        _log.error("jitaccel: %s runs dense, since %s", engine, error)
        return
    _log.warning("jitaccel: %s is accelerated, %r", engine, handle)  # a warning, since engines show no less of others
