"""The installed package: names, version, command, package data, and a wheel built from this checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def wanted_by(requirements: list[str], extras: set[str]) -> Iterator[Requirement]:
    """Yields the requirements of a distribution for this environment, extras included."""
    for requirement in map(Requirement, requirements):
        environments = [{"extra": extra} for extra in extras or {""}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def installed_requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - {"eval"}))  # eval has its own
def test_constraints_let_an_extra_install(extra: str) -> None:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    asked = PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]
    found = [("jitaccel", each) for each in wanted_by(asked, set())]
    seen, refused = set(), []
    while found:
        asker, requirement = found.pop()
        name = canonicalize_name(requirement.name)
        if name in pins and not requirement.specifier.contains(pins[name], prereleases=True):
            refused.append(f"{asker} asks for {requirement}, constraints.txt has {pins[name]}")
        if name == "jitaccel":
            more = [each for of in requirement.extras for each in PROJECT["optional-dependencies"][of]]
        else:
            more = installed_requirements(name)
        if (name, *sorted(requirement.extras)) not in seen:
            seen.add((name, *sorted(requirement.extras)))
            found += [(name, each) for each in wanted_by(more, requirement.extras)]
    assert refused == []


def test_package_is_marked_typed() -> None:
    assert (files("jitaccel") / "py.typed").is_file()


def test_citation_names_the_installed_version() -> None:
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_embedded_pipeline_is_found() -> None:
    folder = files("jitaccel.assets") / "tiny-flux"
    if not (ROOT / "assets" / "tiny-flux").exists():
        pytest.skip("this checkout has no embedded pipeline")
    assert (folder / "model_index.json").is_file()


def test_comfyui_nodes_are_a_package_of_its_registry() -> None:
    nodes = tomllib.loads((ROOT / "patches" / "comfyui" / "pyproject.toml").read_text())
    for name in ("name", "version", "requires-python"):
        assert nodes["project"][name] == PROJECT[name]
    assert nodes["project"]["license"] == {"text": PROJECT["license"]}
    assert nodes["project"]["dependencies"] == [PROJECT["name"]]
    assert nodes["tool"]["comfy"].keys() == {"PublisherId", "DisplayName", "Icon"}


@pytest.mark.parametrize("repository", [None, "https://example.org/a"])
def test_readme_has_no_relative_link_on_a_package_index(tmp_path: Path, repository: str | None) -> None:
    pytest.importorskip("setuptools", minversion="77")
    other = shutil.ignore_patterns("*.so", "patches", "assets", "benchmarks")
    shutil.copytree(ROOT / "jitaccel", tmp_path / "jitaccel", ignore=other)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    if repository is not None:
        project = tmp_path / "pyproject.toml"
        project.write_text(
            project.read_text().replace("[project.urls]", f'[project.urls]\nRepository = "{repository}"')
        )
    make = "from setuptools import build_meta as b; import sys; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", make, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    text = (tmp_path / done.stdout.splitlines()[-1] / "METADATA").read_text()
    assert "Description-Content-Type: text/markdown" in text and "# jitaccel" in text
    relative = re.findall(r"\]\((?!https?://|#)[^)]*\)", text)
    assert relative == []
    assert ("[an exact calculation](https://example.org/a/blob/main/docs/exact-lab.md)" in text) == bool(repository)
    assert "an exact calculation" in text


@pytest.fixture(scope="module", params=["links", "no links", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("with space")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, sources)
    for name in ("jitaccel", "patches", "assets", "csrc", "benchmarks"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, sources / name, symlinks=True)
    environment = {**os.environ, "JITACCEL_CUDA": "0"}  # compiling for CUDA takes a while and is tested elsewhere
    if request.param == "no links":  # a checkout on a file system that has none, and no compiler
        environment["JITACCEL_CPU"] = "0"
        for name in ("patches", "assets", "benchmarks"):
            (sources / "jitaccel" / name).unlink()
    for library in (sources / "jitaccel").glob("_C_*.so"):
        library.unlink()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    if request.param == "sdist":
        make = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
        subprocess.run([sys.executable, "-c", make, str(folder)], cwd=sources, capture_output=True, check=True)
        sources = next(folder.glob("jitaccel-*.tar.gz"))
    built = subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(sources)], capture_output=True, text=True, check=False, env=environment
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next(folder.glob("jitaccel-*.whl")))


@pytest.fixture
def has_library(request: pytest.FixtureRequest) -> bool:
    """Whether the wheel was built with a compiler available."""
    return "no links" not in request.node.callspec.id and shutil.which("g++") is not None


def test_wheel_holds_every_file_once(wheel: zipfile.ZipFile, has_library: bool) -> None:
    expected = set()
    for folder, installed in {
        "jitaccel": "jitaccel",
        "patches": "jitaccel/patches",
        "assets": "jitaccel/assets",
        "csrc": "jitaccel/csrc",
        "benchmarks": "jitaccel/benchmarks",
    }.items():
        paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
        expected |= {f"{installed}/{path.as_posix()}" for path in paths if "__pycache__" not in path.parts}
    of_checkout = {name for name in expected if name.startswith("jitaccel/benchmarks/") and not name.endswith(".py")}
    of_checkout |= {name for name in expected if name.startswith("jitaccel/benchmarks/checkout/")}
    expected = {name for name in expected - of_checkout if not name.endswith(".so")}
    if has_library:
        expected.add("jitaccel/_C_cpu.so")
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)


def test_wheel_serves_every_python_and_every_platform_without_a_library(
    wheel: zipfile.ZipFile, has_library: bool
) -> None:
    assert "-py3-none-" in str(wheel.filename)
    assert str(wheel.filename).endswith("-any.whl") != has_library


def test_wheel_runs_from_where_it_is_installed(wheel: zipfile.ZipFile, has_library: bool, tmp_path: Path) -> None:
    target = tmp_path / "with space"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel.filename)], capture_output=True, check=True)
    code = """if True:
        import sys, warnings; sys.path.insert(0, sys.argv[1]); warnings.simplefilter("ignore")
        import torch, jitaccel.patches
        from jitaccel import ops
        print(jitaccel.patches.__file__)
        print(jitaccel.embedded_model())
        print(sorted(ops.compiled()), torch.ops.jitaccel.nearest_anchor(torch.tensor([[1, 2]]), [2, 2]).tolist())
    """
    done = subprocess.run([sys.executable, "-I", "-c", code, str(target)], capture_output=True, text=True, check=True)
    patches, model, result = done.stdout.splitlines()
    assert Path(patches).is_relative_to(target) and Path(model).is_relative_to(target)
    assert result == f"{['cpu'] if has_library else []} [[0, 0, 1, 0]]"


def test_editable_install_is_found_from_a_script_beside_the_clone(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    clone = tmp_path / "jitaccel"  # the folder's name is the package's
    clone.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("jitaccel", "patches", "assets", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(site), "--editable", str(clone)],
        env={**os.environ, "JITACCEL_CPU": "0", "JITACCEL_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    script = tmp_path / "script.py"
    script.write_text(f"import site\nsite.addsitedir({str(site)!r})\nimport jitaccel\nprint(jitaccel.__file__)\n")
    run = [sys.executable, "-S", str(script)]  # without the packages of the environment, which may hold a jitaccel
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == clone / "jitaccel" / "__init__.py"
