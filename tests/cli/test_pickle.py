"""`--pickle`: weights other than safetensors are only loaded on request, and otherwise their code never runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jitaccel import loading
from jitaccel.cli import main

Command = Callable[..., tuple[int, str, str]]
MADE = {"generate": "a.png", "view": "a.html", "eval": "out", "export": "stages"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny pipeline twice: in safetensors, and in pickled files only."""
    pytest.importorskip("diffusers")
    from tests.support import tiny

    above = tmp_path_factory.mktemp("models")
    tiny.pipeline().save_pretrained(above / "safetensors")
    shutil.copytree(above / "safetensors", above / "pickled")
    from safetensors.torch import load_file

    for path in (above / "pickled").rglob("*.safetensors"):
        torch.save(load_file(path), path.with_name(_pickled(path.stem)))
        path.unlink()
    return {path.name: path for path in above.iterdir()}


def _pickled(stem: str) -> str:
    return {"model": "pytorch_model"}.get(stem, stem) + ".bin"


def _argv(command: str, model: Path, out: Path) -> list[str]:
    own = {
        "generate": ["--prompt", "a", "--steps", "4", "--preset", "none"],
        "view": ["--prompt", "a", "--presets", "7x", "--previews", "colours"],
        "eval": ["--prompts", str(out / "prompts.txt"), "--methods", "dense:2,dense:1", "--metrics", "psnr"],
        "export": ["--format", "torchscript", "--size", "48x48"],
    }[command]
    (out / "prompts.txt").write_text("a red circle\nblue square\n")
    common = ["--device", "cpu", "--max-sequence-length", "8", "--out", str(out / MADE[command])]
    return [command, "--model", str(model), *own, *common]


@pytest.mark.parametrize("command", MADE)
def test_pickled_weights_are_loaded_where_asked_alone(
    command: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = _argv(command, folders["pickled"], tmp_path)
    assert main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"jitaccel {command}: --model must be a diffusers pipeline that loads")
    assert line.endswith("; --pickle also loads weights in formats other than safetensors")
    assert not (tmp_path / MADE[command]).is_file()
    assert main([*argv, "--pickle"]) == 0, capsys.readouterr().err
    assert (tmp_path / MADE[command]).exists()


def test_pickled_weights_make_the_same_picture(folders: dict[str, Path], tmp_path: Path) -> None:
    pictures = []
    for name in ("safetensors", "pickled"):
        (tmp_path / name).mkdir()
        assert main([*_argv("generate", folders[name], tmp_path / name), "--pickle"]) == 0
        with Image.open(tmp_path / name / "a.png") as picture:
            pictures.append(np.asarray(picture, dtype=int))
    # Weights mapped from a file lie at other addresses, and some products round differently there.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 1


class _Code:
    """What runs when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_code_in_weights_does_not_run_unasked(folders: dict[str, Path], tmp_path: Path) -> None:
    model, made = tmp_path / "model", tmp_path / "made by the weights"
    shutil.copytree(folders["pickled"], model)
    for path in model.rglob("*.bin"):
        torch.save(_Code(made), path)
    assert main(_argv("generate", model, tmp_path)) == 2
    assert not made.exists()
    torch.load(next(model.rglob("*.bin")), weights_only=False)
    assert made.exists()  # it would have been seen


@pytest.mark.parametrize("command", ["app", "serve"])
def test_server_hands_the_choice_on(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jitaccel.cli import _parser, options, serve

    for extra, wanted in (([], False), (["--pickle"], True)):
        arguments = _parser().parse_args([command, *extra])
        if command == "serve":
            assert serve.serving_of(arguments).pickle is wanted
            continue
        seen: list[Any] = []
        monkeypatch.setattr(loading, "load_pipeline", lambda *_, pickle, seen=seen: seen.append(pickle))
        options.load(arguments)
        assert seen == [wanted]
