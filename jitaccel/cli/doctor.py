"""Report what is installed, which devices are present, and what runs on them."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch", "numpy", "scipy", "safetensors", "diffusers", "transformers", "accelerate", "peft", "flash-attn",
    "xformers",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments; it has none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the sections. It loads no model, compiles nothing, and runs one operator on each device."""
    for title, section in SECTIONS:
        print(title)
        for line in section():
            print(f"  {line}")
    return 0


def versions() -> Iterator[str]:
    """Yields the versions of installed packages, without importing them."""
    from .. import __version__
    from ..provenance import commit, version

    yield f"{'jitaccel':14}{__version__} ({commit()})"
    yield f"{'python':14}{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _PACKAGES:
        yield f"{name:14}{version(name) or 'not installed'}"


def devices() -> Iterator[str]:
    """Yields the devices of this machine."""
    import torch

    from ..provenance import num_usable_cores, processor_name

    yield f"{'cpu':14}{processor_name()}, {num_usable_cores()} cores, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield f"{'cuda':14}none: torch is built {'for ' + built + ', and finds no device' if built else 'without CUDA'}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        yield f"cuda:{index:<9}{properties.name}, {gib:.0f} GiB, capability {properties.major}.{properties.minor}"


def operators() -> Iterator[str]:
    """Yields which operators are compiled, what replaces the others, and whether they run on each device."""
    import torch

    from .. import ops

    for device, path in ops.compiled().items():
        yield f"{device:14}compiled, {path}"
    for device, reason in ops.missing().items():
        yield f"{device:14}plain torch: {reason}"
    yield f"{'operators':14}{', '.join(ops.SCHEMAS)}"
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        yield f"{'on ' + name:14}{trial(name)}"


def trial(device: str) -> str:
    """Returns the result of one operator on a device, because a library may load and still not run there."""
    import torch

    from .. import ops

    try:
        nearest = ops.nearest_anchor(torch.tensor([[0, 3]], device=device), (2, 2)).tolist()
    except RuntimeError as error:
        return f"nearest_anchor fails: {str(error).strip().splitlines()[0]}"
    return "nearest_anchor runs" if nearest == [[0, 0, 0, 1]] else f"nearest_anchor is wrong: {nearest}"


def attention() -> Iterator[str]:
    """Yields, for each attention backend of packed execution, whether it is usable on the best device, or why not."""
    import torch

    from ..execution.attention.choice import BACKENDS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, head_dim = torch.bfloat16 if device.type == "cuda" else torch.float32, 128
    yield (
        f"(packed execution takes the first usable one, here for {str(dtype).removeprefix('torch.')} "
        f"with head dim {head_dim} on {device})"
    )
    for backend in BACKENDS:
        yield f"{backend.name:14}{'; '.join(backend.unsupported_reasons(device, dtype, head_dim)) or 'usable'}"


def embedded() -> Iterator[str]:
    """Yields whether the embedded model is present."""
    from ..api import embedded_model

    folder = embedded_model()
    if not (folder / "model_index.json").is_file():
        yield f"missing       {folder}"
        return
    files = [file for file in folder.rglob("*") if file.is_file()]
    yield f"present       {folder}, {sum(map(_size, files)) / 1e6:.1f} MB"
    judge = "present" if (folder / "judge" / "judge.json").is_file() else "missing (demo has no attribute accuracy)"
    yield f"judge         {judge}"


def _size(file: Path) -> int:
    return file.stat().st_size


SECTIONS: tuple[tuple[str, Callable[[], Iterator[Any]]], ...] = (
    ("versions", versions),
    ("devices", devices),
    ("operators", operators),
    ("attention backends", attention),
    ("embedded model", embedded),
)
