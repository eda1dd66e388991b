"""ComfyUI: the nodes, and clones of patched models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.patches.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from tests.support import comfy_stand_in as comfy
from tests.support.comfy_models import flux1, sample, start
from tests.support.comfy_stand_in import BaseModel, ModelPatcher


def test_apply_node_patches_a_clone_and_its_clones_take_that_along() -> None:
    model = flux1()
    patcher = ModelPatcher(BaseModel(model))
    plain = sample(patcher, start(model), torch.linspace(1, 0, 12))
    node = NODE_CLASS_MAPPINGS["JiTApply"]
    (clone,) = getattr(node(), node.FUNCTION)(model=patcher, preset="7x", on_unsupported="error")
    later = clone.clone()
    sparse = sample(later, start(model), torch.linspace(1, 0, 12))
    assert not torch.equal(sparse, plain)
    assert torch.equal(sample(patcher, start(model), torch.linspace(1, 0, 12)), plain)
    (again,) = getattr(node(), node.FUNCTION)(model=clone, preset="4x", on_unsupported="error")
    assert len(again.get_wrappers("predict_noise", "jitaccel")) == 1
    assert torch.equal(sample(clone, start(model), torch.linspace(1, 0, 12)), sparse)


def test_applying_again_replaces() -> None:
    patcher = ModelPatcher(BaseModel(flux1()))
    first = jitaccel.apply(patcher, "4x")
    second = jitaccel.apply(patcher, "7x")
    assert not first.is_active and second.is_active
    first.remove()
    assert len(patcher.get_wrappers("predict_noise", "jitaccel")) == 1
    second.remove()
    assert not patcher.get_wrappers("predict_noise", "jitaccel")


def test_sigmas_node_gives_the_presets_levels() -> None:
    node = NODE_CLASS_MAPPINGS["JiTSigmas"]
    make = getattr(node(), node.FUNCTION)
    offered, settings = node.INPUT_TYPES()["required"]["preset"]
    assert offered == ["4x", "7x", "10x", "few-steps", "4x-paper", "7x-paper"] and settings["default"] == "7x"
    for preset in offered:
        expected = torch.tensor(jitaccel.noise_levels(jitaccel.PRESETS[preset]))
        assert torch.equal(make(preset=preset, steps=0, denoise=1.0)[0], expected)
    late = make(preset="7x", steps=6, denoise=0.5)[0]
    assert torch.equal(late, torch.tensor(jitaccel.noise_levels(jitaccel.PRESETS["7x"], 12))[-7:])
    assert make(preset="7x", steps=6, denoise=0.0)[0].numel() == 0


def test_inputs_of_the_nodes_are_their_arguments() -> None:
    for name, node in NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()["required"]
        code = getattr(node, node.FUNCTION).__code__
        assert [*inputs] == [*code.co_varnames[1 : code.co_argcount]]
        assert name in NODE_DISPLAY_NAME_MAPPINGS and len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_folder_linked_into_custom_nodes_loads_as_comfy_loads_it(tmp_path: Path) -> None:
    """By its path and under a name of ComfyUI's, from anywhere."""
    link = tmp_path / "custom_nodes" / "jitaccel"
    link.parent.mkdir()
    link.symlink_to(Path(jitaccel.__file__).parent / "patches" / "comfyui")
    name = str(link).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, link / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS


def test_noise_levels_and_packed_execution_are_told_apart() -> None:
    patcher = ModelPatcher(BaseModel(flux1()))
    with pytest.raises(ConfigError, match="noise_levels must be left out for ComfyUI"):
        jitaccel.apply(patcher, "7x", noise_levels=[1.0, 0.0])
    with pytest.raises(UnsupportedModelError, match="does not support ComfyUI's models"):
        jitaccel.apply(patcher, "7x", compile=True, strict=True)


def test_comfy_without_the_wrappers_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(comfy.WrappersMP, "PREDICT_NOISE")
    with pytest.raises(UnsupportedModelError, match=r"update it to 0\.3\.64 or newer"):
        jitaccel.apply(ModelPatcher(BaseModel(flux1())), "7x")
