"""Output files of commands. Paths are tested before any computation, and a picture that cannot be saved is kept."""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..files import write_whole

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
_TRIED_BYTES = 1 << 16
# Errors that describe the output location, not the program.
UNWRITABLE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO)
)


def check_folder(folder: Path, option: str = "--out") -> None:
    """Raises CommandError if no file can be written in a folder, by briefly writing one there or above it.

    Args:
        folder: The folder for later files; it and folders above it may be missing.
        option: The option whose value it is.
    """
    existing = _existing(folder, option)
    if not existing.is_dir():
        raise CommandError(f"{option} must be a folder, got the file {folder}")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * _TRIED_BYTES)
            file.flush()
    except OSError as error:
        raise CommandError(
            f"{option} must be writable, got {str(folder)!r} ({_reason(error)}); give another folder, or make room"
        ) from error


def check_name(path: Path, option: str = "--out") -> None:
    """Raises CommandError if no file of this name can be written; tests as `check_folder` does."""
    _existing(path, option)
    check_folder(path.parent, option)


def check_file(path: Path, option: str, suffixes: Sequence[str], *, overwrite: bool) -> None:
    """Raises CommandError, before any computation, for a file that cannot be written.

    Args:
        path: The file.
        option: The option whose value it is.
        suffixes: Allowed suffixes, in lower case.
        overwrite: Whether the file may exist.
    """
    check_name(path, option)
    if path.suffix.lower() not in suffixes:
        listed = " or ".join(suffixes) if len(suffixes) < 3 else f"one of {', '.join(suffixes)}"
        raise CommandError(f"{option} must end in {listed}, got {str(path)!r}")
    if path.is_dir():
        raise CommandError(f"{option} must be a file, got the folder {str(path)!r}")
    if path.exists() and not overwrite:
        raise CommandError(f"{option} must not exist, got {str(path)!r}; give another name, or --overwrite")


def _existing(path: Path, option: str) -> Path:
    """Returns the nearest existing folder at or above a path. Raises CommandError for an impossible name."""
    try:
        if "\0" in str(path):
            raise ValueError("it holds a null character")
        existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        for part in path.absolute().relative_to(existing).parts:
            (existing / part).exists()  # raises for a name that is too long; the limit depends on the folder
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{option} must be a name that a file can have, got {str(path)[:80]!r} ({_reason(error)}); give another"
        ) from error
    if existing != path.absolute() and not existing.is_dir():
        raise CommandError(f"{option} must lie in a folder, got {str(path)!r} below the file {existing}")
    return existing


def save_picture(picture: Any, path: Path, option: str = "--out") -> None:
    """Writes a PIL picture atomically; its folder is created if missing.

    Args:
        picture: The picture.
        path: The file.
        option: The option whose value it is.

    Raises:
        CommandError: If it cannot be written; the picture is then saved in the temporary folder that the error names.
    """
    suffix = path.suffix.lower()
    content = io.BytesIO()
    picture.save(content, format=_FORMATS.get(suffix, suffix[1:].upper()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise CommandError(
            f"{option} could not be written, got {path} ({_reason(error)}); {_rescued(path, content)}"
        ) from error


def _rescued(path: Path, content: io.BytesIO) -> str:
    try:
        found = Path(tempfile.mkdtemp(prefix="jitaccel-")) / f"picture{path.suffix}"
        found.write_bytes(content.getvalue())
    except OSError as error:
        return f"nor could the picture be kept in {tempfile.gettempdir()} ({_reason(error)})"
    return f"the picture is in {found}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
