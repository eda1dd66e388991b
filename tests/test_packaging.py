"""What is installed: names, version, command, package data, and a wheel built from this checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("jitaccel")
    except metadata.PackageNotFoundError:
        pytest.skip("jitaccel runs from the checkout, not installed")


def test_installed_version_is_the_checkouts(distribution: metadata.Distribution) -> None:
    assert distribution.version == PROJECT["version"]


def test_console_command_resolves(distribution: metadata.Distribution) -> None:
    (command,) = distribution.entry_points.select(group="console_scripts", name="jitaccel")
    assert callable(command.load())


def test_package_is_marked_typed() -> None:
    assert (files("jitaccel") / "py.typed").is_file()


def test_citation_names_the_installed_version() -> None:
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_embedded_pipeline_is_found() -> None:
    folder = files("jitaccel.assets") / "tiny-flux"
    if not (ROOT / "assets" / "tiny-flux").exists():
        pytest.skip("this checkout has no embedded pipeline")
    assert (folder / "model_index.json").is_file()


@pytest.fixture(scope="module", params=["links", "no links"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("with space")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, sources)
    for name in ("jitaccel", "patches", "assets", "csrc"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, sources / name, symlinks=True)
    if request.param == "no links":  # a checkout on a file system that has none
        for name in ("patches", "assets"):
            (sources / "jitaccel" / name).unlink()
    for library in (sources / "jitaccel").glob("_C_*.so"):
        library.unlink()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    # Compiling for CUDA takes a while and is tested elsewhere.
    built = subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(sources)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JITACCEL_CUDA": "0"},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next(folder.glob("jitaccel-*.whl")))


def test_wheel_holds_every_file_once(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for folder, installed in {
        "jitaccel": "jitaccel",
        "patches": "jitaccel/patches",
        "assets": "jitaccel/assets",
        "csrc": "jitaccel/csrc",
    }.items():
        paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
        expected |= {f"{installed}/{path.as_posix()}" for path in paths if "__pycache__" not in path.parts}
    expected = {name for name in expected if not name.endswith(".so")}
    if shutil.which("g++"):
        expected.add("jitaccel/_C_cpu.so")
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)


def test_wheel_serves_every_python(wheel: zipfile.ZipFile) -> None:
    assert "-py3-none-" in str(wheel.filename)


def test_wheel_imports_from_where_it_is_unpacked(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import jitaccel.patches as p; print(p.__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
