"""Records where a measurement was made: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .version import __version__, checkout


def provenance(device: torch.device | None = None) -> dict[str, str | int]:
    """Returns what every measurement records: date, device, cores, threads, versions and commit.

    Args:
        device: The device that computes; None is the CPU. Naming a CUDA device initialises it.
    """
    is_cuda = device is not None and device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else processor_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "machine": platform.machine(),
        "cores": num_usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers") or "none",
        "jitaccel": __version__,
        "commit": commit(),
    }


def first_line(device: torch.device | None = None) -> str:
    """Returns the header line of every table: machine, torch, commit."""
    p = provenance(device)
    return (
        f"{p['device']} ({p['cores']} cores, {p['threads']} threads), torch {p['torch']}, "
        f"diffusers {p['diffusers']}, jitaccel {p['jitaccel']} at {p['commit']}"
    )


def processor_name() -> str:
    """Returns the processor's name from /proc/cpuinfo, or as Python reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def num_usable_cores() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version(package: str) -> str | None:
    """Returns the installed version of a package without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Returns the commit of this package's checkout, with "-dirty" if files differ, else "installed VERSION".

    A package inside another project's repository must not report that project's commit or run its programs, so git is
    called only if our own pyproject.toml and `.git` are there, with hooks and file-system monitor off. For a copy
    without history, set the environment variable JITACCEL_COMMIT.
    """
    if given := os.environ.get("JITACCEL_COMMIT"):
        return given
    root = checkout()
    found = None if root is None or not (root / ".git").exists() else _described(root)
    return found or f"installed {__version__}"


def _described(root: Path) -> str | None:
    command = ["git", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    command += ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    # Inside another repository's git hook, GIT_DIR and similar variables point to that repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(root.parent)
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
