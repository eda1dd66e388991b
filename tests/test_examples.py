"""Every script in examples/ runs on tiny random weights and writes its documented output."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from tests.support import tiny, video
from tests.support.every_model import wan_transformer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIDE = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a script in an empty folder, as a command line would, and returns its variables."""

    def script(name: str, *arguments: object) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return script


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    """A picture, and a mask that is white in its lower right quarter."""
    picture, mask = Image.new("RGB", (SIDE, SIDE), "orange"), Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, SIDE // 2, SIDE, SIDE))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path / "picture.png", tmp_path / "mask.png"


def steps_of(made: dict[str, Any]) -> list[int]:
    return [step.tokens for step in made["handle"].stats().steps]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_text_to_image(run: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run("text_to_image.py", "--model", model, "--size", SIDE)
    assert size_of(tmp_path / "text_to_image.png") == (SIDE, SIDE)
    assert len(steps_of(made)) == 11 and min(steps_of(made)) < max(steps_of(made))
    assert "grid 12x12" in capsys.readouterr().out


def test_image_to_image(run: Any, model: Path, tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    made = run("image_to_image.py", "--model", model, "--size", SIDE, "--image", pictures[0])
    assert size_of(tmp_path / "image_to_image.png") == (SIDE, SIDE)
    assert len(steps_of(made)) < 11 and min(steps_of(made)) < max(steps_of(made))


def test_inpainting_has_anchors_under_the_mask(
    run: Any, model: Path, tmp_path: Path, pictures: tuple[Path, Path]
) -> None:
    picture, mask = pictures
    made = run("inpainting.py", "--model", model, "--size", SIDE, "--image", picture, "--mask", mask)
    assert size_of(tmp_path / "inpainting.png") == (SIDE, SIDE)
    first = set(made["handle"].stats().anchors[0][0].tolist())
    assert {12 * row + column for row in range(6, 12) for column in range(6, 12)} <= first < set(range(144))


def test_lora(run: Any, model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    other = tiny.pipeline()
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    other.transformer.add_adapter(config, "mine")
    state = peft.get_peft_model_state_dict(other.transformer, adapter_name="mine")
    other.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    for scale in (0.0, 1.0):
        run("lora.py", "--model", model, "--size", SIDE, "--lora", tmp_path / "lora", "--scale", scale)
        (tmp_path / "lora.png").rename(tmp_path / f"{scale}.png")
    plain, changed = (Image.open(tmp_path / f"{scale}.png").tobytes() for scale in (0.0, 1.0))
    run("text_to_image.py", "--model", model, "--size", SIDE, "--prompt", "a lighthouse at dawn")
    assert plain == Image.open(tmp_path / "text_to_image.png").tobytes() != changed


def test_own_loop_makes_the_pipelines_picture(run: Any, model: Path, tmp_path: Path) -> None:
    run("own_loop.py", "--model", model, "--size", SIDE, "--preset", "7x-paper")
    run("text_to_image.py", "--model", model, "--size", SIDE, "--preset", "7x-paper")
    own, pipes = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("own_loop.png", "text_to_image.png")
    )
    assert own.std() > 1 and abs(own - pipes).max() <= 1


def test_batch(run: Any, model: Path, tmp_path: Path) -> None:
    run("batch.py", "--model", model, "--size", SIDE, "--out-folder", tmp_path / "new" / "folder")
    sizes = [size_of(tmp_path / "new" / "folder" / f"{index}.png") for index in range(3)]
    assert sizes == [(SIDE, SIDE), (SIDE, SIDE // 2), (SIDE // 2, SIDE // 2)]


def test_video_of_wan(run: Any, tmp_path: Path) -> None:
    pipe = video.text_pipeline(wan_transformer(in_channels=16, out_channels=16))
    pipe.save_pretrained(tmp_path / "wan")
    size = ("--height", 96, "--width", 128, "--frames", 9)
    made = run("video_wan.py", "--model", tmp_path / "wan", *size, "--out", tmp_path / "video.gif")
    with Image.open(tmp_path / "video.gif") as frames:
        assert (frames.size, frames.n_frames) == ((128, 96), 9)
    assert len(steps_of(made)) == 11 and min(steps_of(made)) < max(steps_of(made))


def test_every_example_is_run_by_a_test() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"ray_serve.py"}  # needs a cluster of Ray
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert scripts == {name for name in scripts if f'"{name}"' in tests}


def test_comfyui_workflow_uses_the_nodes_as_they_are() -> None:
    from jitaccel.patches.comfyui.nodes import NODE_CLASS_MAPPINGS

    nodes = json.loads((EXAMPLES / "comfyui" / "flux_7x.json").read_text())
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert len(links) == 13 and all(nodes[source] and output == 0 for source, output in links)
    own = {node["class_type"]: node["inputs"] for node in nodes.values() if node["class_type"] in NODE_CLASS_MAPPINGS}
    assert own.keys() == NODE_CLASS_MAPPINGS.keys()
    for name, given in own.items():
        wanted = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
        assert given.keys() == wanted.keys()
        for field, (kind, *_) in wanted.items():
            assert not isinstance(kind, list) or given[field] in kind
    (sampler,) = (node["inputs"] for node in nodes.values() if node["class_type"] == "KSamplerSelect")
    assert sampler == {"sampler_name": "euler"} and own["JiTApply"]["preset"] == own["JiTSigmas"]["preset"]
