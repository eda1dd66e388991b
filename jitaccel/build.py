"""Compiles the operators in csrc/ with the system's compilers: `python -m jitaccel.build`, and what setup.py calls.

Two plain shared libraries on LibTorch's stable ABI, `_C_cpu.so` and `_C_cuda.so`: one build serves every Python and
every torch from 2.10 on, and CUDA compiles beside a torch without it. Standard library only, and torch is needed for
its headers alone: it is looked for, never imported.

    JITACCEL_CPU, JITACCEL_CUDA   auto (default: build where that works, say where not), 1 (must build), 0 (skip)
    TORCH_CUDA_ARCH_LIST          as in PyTorch, such as "9.0" or "8.0;9.0+PTX"; default: all that nvcc can make
    CXX, CUDA_HOME                the compilers
    JITACCEL_CXXFLAGS, JITACCEL_NVCCFLAGS   more options
    JITACCEL_TORCH                the folder of torch, for builds that cannot see it (`uv pip install` isolates them)
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
TARGET_VERSION = "0x020a000000000000"  # torch 2.10: the oldest whose stable ABI is used
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX;10.0;12.0+PTX"
_PACKAGE = Path(__file__).resolve().parent
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")  # psabi: vectors are passed to no function of another file


class MissingToolError(RuntimeError):
    """Something that a build needs is not there (as opposed to: the compiler failed)."""


class CompilerError(RuntimeError):
    """The compiler failed, or could not be run."""


def source_folder() -> Path:
    """Returns csrc/: inside the package where it is installed, beside it in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def library_path(kind: str, folder: Path | None = None) -> Path:
    """Returns where the library of a kind ("cpu", "cuda") lies."""
    return (folder or _PACKAGE) / f"_C_{kind}.so"


def sources(kind: str) -> list[Path]:
    """Returns the files that are compiled into a library, in a fixed order."""
    return sorted(source_folder().glob(f"*{KINDS[kind]}"))


def source_hash(kind: str) -> str | None:
    """Returns a hash of all that a library is made of, headers included; None where the sources are not at hand."""
    headers = [file for pattern in _HEADERS[kind] for file in sorted(source_folder().glob(pattern))]
    files = [*sources(kind), *headers]
    if not sources(kind):
        return None
    digest = hashlib.sha256(TARGET_VERSION.encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def staleness(kind: str, library: Path) -> str | None:
    """Returns why a library may not be used: it is missing, or was built from other sources; None where it may.

    Read from the mark in the file, since loading it would register its operators. A library without sources at hand is
    taken as it is.
    """
    if not library.is_file():
        return f"{library.name} is not built"
    wanted = source_hash(kind)
    if wanted is None or f"jitaccel-sources:{wanted}".encode() in library.read_bytes():
        return None
    return f"{library.name} was built from other sources"


def cuda_mismatch(library: Path, torch_cuda: str) -> str | None:
    """Returns why a CUDA library may not be used by a torch of a CUDA version, such as "12.8"; None where it may.

    The library holds the runtime of the CUDA that it was linked with, which wants a driver of that major at least. A
    torch of a smaller one runs on older drivers, where every call would fail.
    """
    mark = re.search(rb"jitaccel-cuda-major:(\d+);", library.read_bytes())
    if mark is None or int(mark[1]) <= int(torch_cuda.partition(".")[0]):
        return None
    return (
        f"{library.name} was linked with CUDA {int(mark[1])} and torch is built for CUDA {torch_cuda}: "
        f"compile it with that CUDA (CUDA_HOME), or take a torch for CUDA {int(mark[1])}"
    )


def build(kind: str, out: Path, sanitize: bool = False, required: bool = False) -> bool:
    """Returns whether the library was built.

    Where it is asked for, by its switch or `required`, all that keeps it from being built is an error; else a warning,
    since plain torch stands in for it.
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
    """Returns why a library cannot work on a platform (as `sys.platform` names it), None where it can."""
    if platform == "win32":
        return "they are written for g++ and clang++, not for Windows"
    if platform == "darwin" and kind == "cuda":
        return "there is no CUDA on macOS"
    return None


def compile_command(kind: str, sanitize: bool = False) -> list[str]:
    """Returns the compiler call of a library, but for its output. Raises MissingToolError where a tool is missing."""
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
    """Of both compilers: -Xlinker takes one option of the linker's, in which nvcc wants spaces escaped."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    # The libraries are kept though nothing refers to them: they are what loads torch where Python has not.
    exports = str(source_folder() / "exports.map").replace(" ", f"{escape} ")
    return ["-Xlinker", "--no-as-needed", *(f"-l{name}" for name in names), "-Xlinker", f"--version-script={exports}"]


def _compile(command: Sequence[str], out: Path) -> None:
    """Runs the compiler into a temporary file beside `out`, which is replaced only by a whole library."""
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
    """Returns the folder of the installed torch, without importing it: under pip's build isolation too."""
    for root in _torch_folders():
        if (root / "include/torch/csrc/stable/library.h").is_file():
            if _torch_version(root) < (2, 10):
                raise MissingToolError(f"torch in {root} is older than 2.10")
            return root
    hint = "; uv builds apart from it: --no-build-isolation or JITACCEL_TORCH=FOLDER" if os.environ.get("UV") else ""
    raise MissingToolError(f"no torch of 2.10 or newer with headers beside {sys.executable}{hint}")


def _torch_folders() -> Iterator[Path]:
    if folder := os.environ.get("JITACCEL_TORCH"):
        yield Path(folder)
    spec = importlib.util.find_spec("torch")
    yield from map(Path, (spec.submodule_search_locations or ()) if spec else ())
    yield from (Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib"))
    # An isolated build has a path of its own; the environment it runs for is the interpreter's prefix.
    yield from Path(sys.prefix).glob("lib/python3*/site-packages/torch")


def _torch_version(root: Path) -> tuple[int, int]:
    header = root / "include/torch/headeronly/version.h"
    text = header.read_text() if header.is_file() else ""
    parts = [re.search(rf"TORCH_VERSION_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
    return (int(parts[0][1]), int(parts[1][1])) if parts[0] and parts[1] else (0, 0)


def find_compiler() -> list[str]:
    """Returns the C++ compiler's command. Raises MissingToolError where there is none."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise MissingToolError("no C++ compiler: install g++ or set CXX")


def find_nvcc() -> str:
    """Returns nvcc's path. Raises MissingToolError where there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if path := shutil.which(candidate):
            return path
    raise MissingToolError("no nvcc: install the CUDA toolkit or set CUDA_HOME")


def architecture_options(nvcc: str) -> list[str]:
    """Returns nvcc's options for the architectures asked for, or for those of the default that this nvcc can make."""
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
    """Builds what can be built, into the package or `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m jitaccel.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="cpu, cuda: must be built; default: both, if possible")
    parser.add_argument("--out", type=Path, help="where to; JITACCEL_LIBRARIES makes jitaccel load from there")
    parser.add_argument("--if-stale", action="store_true", help="leave alone what was built from these sources")
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
