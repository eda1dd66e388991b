"""Compiles the operators in csrc/ with the system's compilers. Run by `python -m jitaccel.build` and by setup.py.

Builds two plain shared libraries on LibTorch's stable ABI, `_C_cpu.so` and `_C_cuda.so`. One build works with every
Python and with every torch from 2.10 on; the CUDA library also compiles against a torch without CUDA. This module uses
only the standard library. torch is located for its headers, but never imported.

    JITACCEL_CPU, JITACCEL_CUDA   auto (default: build if possible, report if not), 1 (must build), 0 (skip)
    TORCH_CUDA_ARCH_LIST          as in PyTorch, such as "9.0" or "8.0;9.0+PTX"; default: all that nvcc can make
    CXX, CUDA_HOME                the compilers
    JITACCEL_CXXFLAGS, JITACCEL_NVCCFLAGS   more options
    JITACCEL_TORCH                the folder of torch, for isolated builds that cannot see it (`uv pip install`)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

KINDS = {"cpu": ".cpp", "cuda": ".cu"}
_HEADERS = {"cpu": ("*.h", "*.map"), "cuda": ("*.h", "*.cuh", "*.map")}
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the oldest with the stable ABI used here
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX;10.0;12.0+PTX"
_PACKAGE = Path(__file__).resolve().parent
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")  # psabi: no vectors are passed between files


class MissingToolError(RuntimeError):
    """A tool or package needed for the build is missing; the compiler itself did not fail."""


class CompilerError(RuntimeError):
    """The compiler failed or could not be run."""


def source_folder() -> Path:
    """Returns csrc/: inside an installed package, next to the package in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def library_path(kind: str, folder: Path | None = None) -> Path:
    """Returns the path of the library of a kind ("cpu" or "cuda")."""
    return (folder or _PACKAGE) / f"_C_{kind}.so"


def sources(kind: str) -> list[Path]:
    """Returns the files that are compiled into a library, in a fixed order."""
    return sorted(source_folder().glob(f"*{KINDS[kind]}"))


def source_hash(kind: str) -> str | None:
    """Returns a hash of all sources of a library, including headers; None if the sources are not available."""
    headers = [file for pattern in _HEADERS[kind] for file in sorted(source_folder().glob(pattern))]
    files = [*sources(kind), *headers]
    if not sources(kind):
        return None
    digest = hashlib.sha256(TARGET_VERSION.encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def staleness(kind: str, library: Path) -> str | None:
    """Returns why a library cannot be used (missing, or built from other sources), or None if it can be.

    Reads the mark in the file, because loading the library would register its operators. If no sources are available,
    the library is accepted as it is.
    """
    if not library.is_file():
        return f"{library.name} is not built"
    wanted = source_hash(kind)
    if wanted is None or f"jitaccel-sources:{wanted}".encode() in library.read_bytes():
        return None
    return f"{library.name} was built from other sources"


def cuda_mismatch(library: Path, torch_cuda: str) -> str | None:
    """Returns why a CUDA library cannot be used by a torch for a CUDA version such as "12.8", or None if it can be.

    The library contains the runtime of the CUDA version it was linked with, which needs a driver of at least that major
    version. A torch for an older major version also runs on older drivers, where every call would fail.
    """
    mark = re.search(rb"jitaccel-cuda-major:(\d+);", library.read_bytes())
    if mark is None or int(mark[1]) <= int(torch_cuda.partition(".")[0]):
        return None
    return (
        f"{library.name} was linked with CUDA {int(mark[1])} and torch is built for CUDA {torch_cuda}: "
        f"compile it with that CUDA (CUDA_HOME), or install a torch for CUDA {int(mark[1])}"
    )


def build(kind: str, out: Path, sanitize: bool = False, required: bool = False) -> bool:
    """Builds a library and returns whether that succeeded.

    If the library was requested, by its environment variable or `required`, a failure is an error. Otherwise it is a
    warning, because plain torch is the fallback.
    """
    switch = f"JITACCEL_{kind.upper()}"
    mode = os.environ.get(switch, "auto")
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"build: {switch} must be auto, 0 or 1, got {mode!r}; unset it for auto")
    if mode == "0":
        _say(f"{kind} operators skipped ({switch}=0)")
        return False
    try:
        if mode == "auto" and (reason := unsupported_reason(kind, sys.platform)) is not None:
            raise MissingToolError(reason)
        _compile(compile_command(kind, sanitize), out)
    except (MissingToolError, CompilerError) as error:
        if mode == "1" or required:
            asked = f"{switch}=1" if mode == "1" else f"the {kind} library is asked for"
            raise RuntimeError(f"build: {asked}, but {error}") from error
        _say(f"WARNING: {kind} operators not built, plain torch runs in their place: {error}")
        return False
    return True


def unsupported_reason(kind: str, platform: str) -> str | None:
    """Returns why a library cannot work on a platform (as `sys.platform` names it), or None if it can."""
    if platform == "win32":
        return "they are written for g++ and clang++, not for Windows"
    if platform == "darwin" and kind == "cuda":
        return "there is no CUDA on macOS"
    return None


def compile_command(kind: str, sanitize: bool = False) -> list[str]:
    """Returns the compiler command of a library without its output. Raises MissingToolError for a missing tool."""
    torch_root = find_torch()
    if not sources(kind):
        raise MissingToolError(f"no sources in {source_folder()}")
    options = [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f'-DJITACCEL_SOURCES="{source_hash(kind)}"']
    options += ["-isystem", str(torch_root / "include")]
    files = [str(file) for file in sources(kind)]
    libraries = ["-L", str(torch_root / "lib")]
    if kind == "cpu":
        flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", *_WARNINGS]
        if sanitize:
            flags += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += shlex.split(os.environ.get("JITACCEL_CXXFLAGS", ""))
        return [*find_compiler(), *flags, *options, *files, *libraries, *_link_options("torch_cpu")]
    nvcc = find_nvcc()
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-cudart", "static"]
    flags += ["--threads", "0", "-DUSE_CUDA", *architecture_options(nvcc)]
    flags += shlex.split(os.environ.get("JITACCEL_NVCCFLAGS", ""))
    return [nvcc, *flags, *options, *files, *libraries, *_link_options("torch", "torch_cpu", escape="\\")]


def _link_options(*names: str, escape: str = "") -> list[str]:
    """Linker options for both compilers: -Xlinker passes one option; with nvcc, spaces in it must be escaped."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    # Link these libraries although nothing refers to them: they load torch in programs without Python.
    exports = str(source_folder() / "exports.map").replace(" ", f"{escape} ")
    return ["-Xlinker", "--no-as-needed", *(f"-l{name}" for name in names), "-Xlinker", f"--version-script={exports}"]


def _compile(command: Sequence[str], out: Path) -> None:
    """Runs the compiler into a temporary file next to `out`, and replaces `out` only if it succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(f".{os.getpid()}.tmp")
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "-o", str(unfinished)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise CompilerError(f"the compiler failed:\n{shlex.join(command)}\n{done.stdout[-8000:]}")
        unfinished.replace(out)
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run: {error}; check CXX and CUDA_HOME") from error
    finally:
        unfinished.unlink(missing_ok=True)
    if done.stdout.strip():
        _say(done.stdout.strip())
    _say(f"{out.name} built in {time.monotonic() - started:.1f} s")


def find_torch() -> Path:
    """Returns the folder of the installed torch without importing it, under pip's build isolation too."""
    for root in _torch_folders():
        if (root / "include/torch/csrc/stable/library.h").is_file():
            if _torch_version(root) < (2, 10):
                raise MissingToolError(f"torch in {root} is older than 2.10")
            return root
    hint = "; uv builds in isolation: --no-build-isolation or JITACCEL_TORCH=FOLDER" if os.environ.get("UV") else ""
    raise MissingToolError(f"no torch of 2.10 or newer with headers for {sys.executable}{hint}")


def _torch_folders() -> Iterator[Path]:
    if folder := os.environ.get("JITACCEL_TORCH"):
        yield Path(folder)
    spec = importlib.util.find_spec("torch")
    yield from map(Path, (spec.submodule_search_locations or ()) if spec else ())
    yield from (Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib"))
    # An isolated build has its own path; the environment it builds for is at the interpreter's prefix.
    yield from Path(sys.prefix).glob("lib/python3*/site-packages/torch")


def _torch_version(root: Path) -> tuple[int, int]:
    header = root / "include/torch/headeronly/version.h"
    text = header.read_text() if header.is_file() else ""
    parts = [re.search(rf"TORCH_VERSION_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
    return (int(parts[0][1]), int(parts[1][1])) if parts[0] and parts[1] else (0, 0)


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler. Raises MissingToolError if none is found."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise MissingToolError("no C++ compiler: install g++ or set CXX")


def find_nvcc() -> str:
    """Returns the path of nvcc. Raises MissingToolError if it is not found."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if path := shutil.which(candidate):
            return path
    raise MissingToolError("no nvcc: install the CUDA toolkit or set CUDA_HOME")


def architecture_options(nvcc: str) -> list[str]:
    """Returns nvcc's options for the requested architectures, or for those defaults that this nvcc supports."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    wanted = re.split(r"[;,\s]+", asked or DEFAULT_ARCHITECTURES)
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+\w?)", listed))
    options = []
    for item in wanted:
        number = item.removesuffix("+PTX").replace(".", "")
        if not asked and number not in known:
            continue
        code = f"[sm_{number},compute_{number}]" if item.endswith("+PTX") else f"sm_{number}"
        options += ["-gencode", f"arch=compute_{number},code={code}"]
    return options


def _say(message: str) -> None:
    sys.stderr.write(f"jitaccel: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the libraries into the package or into `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m jitaccel.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="cpu, cuda: must be built; default: both, if possible")
    parser.add_argument("--out", type=Path, help="output folder; set JITACCEL_LIBRARIES to load from there")
    parser.add_argument("--if-stale", action="store_true", help="skip libraries that are up to date with their sources")
    parser.add_argument("--sanitize", action="store_true", help="cpu: with address and undefined-behaviour sanitizers")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"KIND must be cpu or cuda, got {', '.join(sorted(unknown))}")
    try:
        for kind in options.kinds or KINDS:
            out = library_path(kind, options.out)
            if not options.if_stale or staleness(kind, out) is not None:
                build(kind, out, options.sanitize, required=bool(options.kinds))
    except RuntimeError as error:
        parser.exit(1, f"jitaccel: {error}\n")


if __name__ == "__main__":
    main()
