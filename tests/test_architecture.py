"""Import rules and type names: no cycles between folders, no model in the method, no duplicate names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("jitaccel", "patches")


def _files() -> list[Path]:
    links = [ROOT / "jitaccel" / name for name in ("patches", "assets", "benchmarks")]
    found = [path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if not any(link in path.parents for link in links)]


def _module(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ["jitaccel", *parts] if parts[0] == "patches" else parts


def _room(module: list[str]) -> str:
    """Returns the folder of a module, one level deep in jitaccel and in patches; other files count as folders."""
    depth = 3 if module[1:2] == ["patches"] else 2
    return ".".join(module[:depth])


def _imports(path: Path, known: set[str]) -> Iterator[list[str]]:
    """Yields a file's imports of jitaccel at run time, without those for type checkers."""
    module, tree = _module(path), ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in guarded:
            continue
        own = module if path.name == "__init__.py" else module[:-1]
        base = [*own[: len(own) - node.level + 1]] if node.level else []
        base += node.module.split(".") if node.module else []
        for name in node.names:
            target = [*base, name.name]
            yield target if ".".join(target) in known else base


def _arrows() -> dict[str, set[str]]:
    files = _files()
    known = {".".join(_module(path)) for path in files}
    arrows: dict[str, set[str]] = {}
    for path in files:
        room = _room(_module(path))
        targets = {_room(each) for each in _imports(path, known) if each[:1] == ["jitaccel"]}
        arrows.setdefault(room, set()).update(targets - {room, "jitaccel"})
    return arrows


def test_folders_import_each_other_without_a_cycle() -> None:
    arrows = _arrows()
    assert len(arrows) > 15
    while leaves := [room for room, targets in arrows.items() if not targets & arrows.keys()]:
        for room in leaves:
            del arrows[room]
    assert not arrows, f"a cycle among {sorted(arrows)}"


def test_method_knows_no_model_and_no_codebase() -> None:
    allowed = {"jitaccel.errors", "jitaccel.limits", "jitaccel.ops", "jitaccel.tokens"}
    assert _arrows()["jitaccel.method"] <= allowed


def test_nothing_that_ships_imports_tests() -> None:
    benchmarks = [path for path in (ROOT / "benchmarks").rglob("*.py") if "checkout" not in path.parts]
    assert len(benchmarks) > 20
    for path in (*_files(), *benchmarks):
        names = [
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        ]
        assert not [name for name in names if name.split(".")[0] == "tests"], path


def test_test_files_import_each_other_through_support_alone() -> None:
    support = {f"tests.support.{path.stem}" for path in (ROOT / "tests" / "support").glob("*.py")}
    names = {path.stem for path in (ROOT / "tests" / "campaigns").glob("*.py") if not path.stem.startswith("test_")}
    campaigns = {"tests.campaigns", *(f"tests.campaigns.{name}" for name in names)}
    for path in (ROOT / "tests").rglob("*.py"):
        shared = {"tests", "tests.support", *support, *(campaigns if path.parent.name == "campaigns" else ())}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                assert node.module in shared, f"{path}: {node.module}"
                assert not any(name.rpartition(".")[2].startswith("test_") for name in named), path


def _types(path: Path) -> Iterator[str]:
    """Yields the public classes and aliases of types that a file defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            names = []
        yield from (name for name in names if re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name))


def test_no_two_types_share_a_name() -> None:
    where: dict[str, list[str]] = {}
    for path in _files():
        for name in _types(path):
            where.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert len(where) > 100
    assert not {name: paths for name, paths in where.items() if len(paths) > 1}
