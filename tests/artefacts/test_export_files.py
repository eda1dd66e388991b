"""Export files that are damaged, truncated or mixed from several exports are refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jitaccel
from jitaccel import ArtefactError, ConfigError
from jitaccel.artefacts.manifest import VERSION, Manifest, manifest_tensors
from jitaccel.limits import MOST_BATCH, MOST_TEXT_TOKENS
from tests.support.exports import TWO_STAGES, export
from tests.support.tiny import SHORT


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _alter, Path.unlink], ids=["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["stage1.pt", "weights.safetensors", "manifest.safetensors", "manifest.json"])
def test_damaged_folder_is_refused(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        jitaccel.load_exported(folder)


def test_manifest_with_another_number_is_refused(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["levels"][1] = 0.5
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="altered"):
        jitaccel.load_exported(folder)
    (folder / "manifest.json").write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ArtefactError, match=f"of version {VERSION}, got 99"):
        jitaccel.load_exported(folder)


def _signed(folder: Path, content: Any) -> None:
    """Writes a manifest with a correct checksum."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))


@pytest.mark.parametrize("name", ["stage1.pt", "weights.safetensors", "manifest.safetensors"])
def test_signed_manifest_that_names_fewer_files_is_refused(folder: Path, name: str) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    _signed(folder, content)
    jitaccel.load_exported(folder)
    del content["files"][name]
    _signed(folder, content)
    with pytest.raises(ArtefactError, match=r"files of .* must be .*stage0\.pt.*; export again"):
        jitaccel.load_exported(folder)


def test_signed_manifest_that_names_another_file_is_refused(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["../elsewhere"] = "0" * 64
    _signed(folder, content)
    with pytest.raises(ArtefactError, match="elsewhere"):
        jitaccel.load_exported(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("files", []), ("files", None), ("inputs", 3), ("tokens", None), ("config", []), ("config", {}),
        ("format", "onnx"), ("format", ["aoti"]), ("levels", 1), ("dtype", -1), ("text_tokens", None), ("batch", True),
        ("grid", ["a", "b"]), ("levels", [None, 0.0]), ("processor", {}), ("inputs", []),
    ],
)  # fmt: skip
def test_signed_manifest_with_a_field_of_another_kind_is_refused(folder: Path, name: str, value: Any) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    _signed(folder, {**content, name: value})
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        jitaccel.load_exported(folder)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("batch", 0, rf"batch must be in 1\.\.{MOST_BATCH}, got 0"),
        ("batch", MOST_BATCH + 1, rf"batch must be in 1\.\.{MOST_BATCH}, got {MOST_BATCH + 1}"),
        ("text_tokens", 0, rf"text_tokens must be in 1\.\.{MOST_TEXT_TOKENS}, got 0"),
        ("text_tokens", MOST_TEXT_TOKENS + 1, rf"text_tokens must be in 1\.\.{MOST_TEXT_TOKENS}"),
        ("grid", [4, 0], r"two or three sides above 0, got \(4, 0\)"),
        ("grid", [16], r"two or three sides above 0, got \(16,\)"),
        ("grid", [2, 2, 2, 2], "two or three sides"),
        ("dtype", "int8", "dtype must be one of .*, got 'int8'"),
        ("levels", [1.0, 0.0], "levels must be one more than the 5 steps, got 2"),
    ],
)
def test_manifest_checks_its_values(exported: Path, name: str, wrong: Any, said: str) -> None:
    manifest = Manifest.read(exported)
    for fine in {"batch": (1, MOST_BATCH), "text_tokens": (1, MOST_TEXT_TOKENS)}.get(name, ()):
        replace(manifest, **{name: fine}).check_values()
    value = tuple(wrong) if isinstance(wrong, list) else wrong
    with pytest.raises(ValueError, match=said):
        replace(manifest, **{name: value}).check_values()


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"a":' * 100_000, "3", "null", '"text"', "", "\ud800"],
    ids=["list", "deep lists", "deep mappings", "number", "null", "text", "empty", "no UTF-8"],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ArtefactError, match="must be a manifest, got something else"):
        jitaccel.load_exported(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((None,), "folder must be a path"), ((3,), "folder must be a path")],
)
def test_bad_folder_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        jitaccel.load_exported(*arguments)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", 3.5, ["cpu"]])
def test_bad_device_is_refused(exported: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match="device must be a device of torch"):
        jitaccel.load_exported(exported, device=device)


@pytest.mark.parametrize(("mask", "of_files", "of_folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_modes_follow_the_umask(pipe: Any, tmp_path: Path, mask: int, of_files: int, of_folder: int) -> None:
    before = os.umask(mask)
    try:
        folder = export(pipe, tmp_path / "x", TWO_STAGES)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == of_folder
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes) == {"manifest.json", *Manifest.read(folder).files}
    assert set(modes.values()) == {of_files}, modes


def test_nothing_is_unpickled_by_python(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    jitaccel.load_exported(exported)


def test_manifest_reads_what_it_wrote(exported: Path) -> None:
    manifest = Manifest.read(exported)
    assert manifest.config == SHORT and manifest.tokens == SHORT.token_counts(144) and len(manifest.levels) == 6
    tensors = manifest_tensors(manifest.config, manifest.levels, manifest.grid)
    assert tensors["stages"].tolist() == [0, 0, 1, 2, 2] and tensors["tokens"].tolist() == [50, 93, 144]
    assert tensors["levels"][-1] == 0 and tensors["blur_0"].shape[0] % 2 == 1


def test_manifest_declares_what_each_stage_is_called_with(folder: Path) -> None:
    """By name, shape and dtype as given by the codebase, because this code does not know the network's inputs."""
    manifest = Manifest.read(folder)
    for inputs, count in zip(manifest.inputs, manifest.tokens, strict=True):
        declared = {each.name: (each.shape, each.dtype) for each in inputs}
        assert next(iter(declared)) == "state"
        assert declared["state"] == (
            (manifest.batch, manifest.grid[0] * manifest.grid[1], manifest.channels),
            manifest.dtype,
        )
        assert declared["anchors"] == ((manifest.batch, count), "int64")
        assert declared["levels"] == ((2,), "float32")
