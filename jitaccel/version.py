"""The version of this package, and the checkout it runs from. Imports nothing heavy."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path


def checkout() -> Path | None:
    """Returns the root of the checkout that holds this package and its pyproject.toml, or None if installed."""
    root = Path(__file__).resolve().parents[1]
    return root if _project_version(root) is not None else None


def _project_version(root: Path) -> str | None:
    """Returns the version in a folder's pyproject.toml, or None if that is missing or belongs to another project."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        return str(project["version"]) if project["name"] == "jitaccel" else None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError):
        return None


def _version() -> str:
    root = checkout()
    found = None if root is None else _project_version(root)
    if found is not None:  # the installed metadata may describe another copy
        return found
    try:
        return metadata.version("jitaccel")
    except metadata.PackageNotFoundError:
        return "unknown"


__version__ = _version()
