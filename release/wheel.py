"""Makes the release files, sdist and wheel, checks them, and tries them in an empty environment: `make wheel`.

The wheel is built from the sdist, which shows that the sdist is complete. It contains the CPU library, and the CUDA
library if nvcc is available. If a library is missing or was built from other sources, the output folder is left empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jitaccel import build

ROOT = Path(__file__).resolve().parents[1]
SDIST = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
# A wheel must not contain copies of torch's libraries, which come with torch, or of the driver, which the machine has.
NOT_OURS = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcuda.so.1")


def wheel_problems(wheel: Path, wanted: Mapping[str, str | None]) -> list[str]:
    """Returns problems with a wheel's libraries and tag; `wanted` maps each kind it needs to its source hash."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = {kind: f"jitaccel/_C_{kind}.so" for kind in build.KINDS}
        held = {kind: archive.read(name) for kind, name in libraries.items() if name in names}
    lacking = sorted(wanted.keys() - held)
    problems = [f"{libraries[kind]} must be in it, got none; see what its compiler said" for kind in lacking]
    for kind in sorted(wanted.keys() & held):
        if f"jitaccel-sources:{wanted[kind]}".encode() not in held[kind]:
            problems.append(f"{libraries[kind]} must be built from csrc/ as it is, got other sources; build it again")
    if not held and not wheel.stem.endswith("-any"):
        problems.append(f"a wheel without a library must be tagged any, got {wheel.name}")
    if held and wheel.stem.endswith("-any"):
        problems.append(f"a wheel with a library must be tagged for its platform, got {wheel.name}")
    return problems


def build_environment(environment: Mapping[str, str], kinds: Sequence[str]) -> dict[str, str]:
    """Returns the environment of the build, in which the given kinds must be built and others are left out."""
    return {**environment, **{f"JITACCEL_{kind.upper()}": "1" if kind in kinds else "0" for kind in build.KINDS}}


def bare_environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns an environment without compilers, and with no packages but those of `folder`'s Python."""
    kept = {k: v for k, v in environment.items() if not k.startswith(("PYTHON", "JITACCEL_", "CUDA_", "VIRTUAL_ENV"))}
    return {**kept, "PATH": str(folder / "bin"), "CXX": str(folder / "no-compiler")}


def wanted_kinds() -> list[str]:
    """Returns the kinds of libraries for a wheel built here; CUDA only if nvcc is available."""
    try:
        build.find_nvcc()
    except build.MissingToolError as error:
        sys.stderr.write(f"wheel: without the CUDA library: {error}\n")
        return ["cpu"]
    return ["cpu", "cuda"]


def missing_tools(repair: bool) -> list[str]:
    """Returns the tools that `make` needs but cannot find, so that this is known before minutes of compiling."""
    modules = ("twine", "check_wheel_contents", *(("auditwheel",) if repair else ()))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return missing + (["patchelf"] if repair and shutil.which("patchelf") is None else [])


def make(out: Path, kinds: Sequence[str], repair: bool) -> None:
    """Writes sdist and wheel to `out`. Raises RuntimeError if something is wrong, and then writes nothing."""
    if missing := missing_tools(repair):
        raise RuntimeError(f"tools must be installed, got no {', '.join(missing)}; pip install them")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run([sys.executable, "-c", SDIST, str(folder)], cwd=ROOT)
        sdist = next(folder.glob("*.tar.gz"))
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        _run([*pip, "--wheel-dir", str(folder), str(sdist)], env=build_environment(os.environ, kinds))
        wheel = next(folder.glob("*.whl"))
        if repair:
            excluded = [option for library in NOT_OURS for option in ("--exclude", library)]
            (folder / "repaired").mkdir()
            _run([sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", str(folder / "repaired"), str(wheel)])
            wheel = next((folder / "repaired").glob("*.whl"))
        if problems := wheel_problems(wheel, {kind: build.source_hash(kind) for kind in kinds}):
            raise RuntimeError("\n".join(f"{wheel.name}: {problem}" for problem in problems))
        _run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)])
        _run([sys.executable, "-m", "check_wheel_contents", str(wheel)], cwd=ROOT)
        try_out(wheel, folder / "empty", kinds)
        out.mkdir(parents=True, exist_ok=True)
        for made in (sdist, wheel):
            shutil.copy2(made, out)
            sys.stdout.write(f"wheel: {out / made.name}\n")


def try_out(wheel: Path, folder: Path, kinds: Sequence[str]) -> None:
    """Installs a wheel in an empty environment without a compiler and makes a picture with it."""
    _run([sys.executable, "-m", "venv", str(folder)])
    environment = bare_environment(os.environ, folder)
    python = str(folder / "bin" / "python")
    pinned = ["--constraint", str(ROOT / "requirements" / "constraints.txt")]
    _run([python, "-m", "pip", "install", "--quiet", "--no-compile", *pinned, f"{wheel}[diffusers]"], env=environment)
    script = str(ROOT / "release" / "first_picture.py")
    _run([python, "-I", script, str(folder / "picture.png"), *kinds], cwd=folder, env=environment)


def _run(command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ... ended with {done.returncode}; its output is above")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the release files."""
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    parser.add_argument("--without-cuda", action="store_true", help="leave out the CUDA library even with nvcc")
    parser.add_argument("--repair", action="store_true", help="tag for manylinux with auditwheel, as PyPI requires")
    options = parser.parse_args(arguments)
    try:
        make(options.out.resolve(), ["cpu"] if options.without_cuda else wanted_kinds(), options.repair)
    except RuntimeError as error:
        parser.exit(1, f"wheel: {error}\n")


if __name__ == "__main__":
    main()
