"""Exported stages give the eager latents behind the same patch, and are refused for other inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.artefacts.export import weights_of
from tests.support import tiny
from tests.support.exports import GUIDED, TWO_STAGES, eager, export, stop
from tests.support.tiny import SHORT, generate, relative_error


@pytest.mark.parametrize("call", [{}, {"seed": 3}, GUIDED], ids=["plain", "other seed", "guided"])
def test_stages_make_the_eager_latents(pipe: Any, exported: Path, call: dict[str, Any]) -> None:
    expected = eager(pipe, **call)
    pipe.transformer = None  # not needed any more
    with jitaccel.load_exported(exported).apply(pipe) as handle:
        for _ in range(2):
            assert relative_error(generate(pipe, **call), expected) < 1e-5
        stats = handle.stats()
    assert (stats.execution, stats.attention, stats.token_steps) == ("exported", "sdpa, torchscript", 481)


@pytest.mark.slow
def test_aoti_makes_the_eager_latents(pipe: Any, aoti: Path) -> None:
    expected = eager(pipe, TWO_STAGES)
    assert sorted(path.name for path in aoti.iterdir()) == [
        "manifest.json", "manifest.safetensors", "stage0.pt2", "stage1.pt2", "weights.safetensors",
    ]  # fmt: skip
    with jitaccel.load_exported(aoti).apply(pipe):
        assert relative_error(generate(pipe), expected) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"lifter": "clean", "micro_flow": "none"},
        {"noise": "own"},
        {"schedule": "native"},
        {"micro_flow": "released"},
        {"solver": "dpmpp_2m"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_are_exported(pipe: Any, tmp_path: Path, settings: Mapping[str, Any]) -> None:
    config = TWO_STAGES.replace(**settings)
    expected = eager(pipe, config)
    with jitaccel.load_exported(export(pipe, tmp_path / "x", config)).apply(pipe):
        assert relative_error(generate(pipe), expected) < 1e-5


def test_batch_of_images_with_anchors_of_their_own(pipe: Any, tmp_path: Path) -> None:
    call: dict[str, Any] = {"seed": (1, 2), "prompt": ["a", "red circle"]}
    expected = eager(pipe, TWO_STAGES, **call)
    with jitaccel.load_exported(export(pipe, tmp_path / "x", TWO_STAGES, batch_size=2)).apply(pipe):
        assert relative_error(generate(pipe, **call), expected) < 1e-5


@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_half_precision_stays_within_its_own_error(pipe: Any, tmp_path: Path, lifter: Any) -> None:
    config = TWO_STAGES.replace(lifter=lifter)
    exact, half = eager(pipe, config), copy.deepcopy(pipe).to(torch.bfloat16)
    usual = eager(half, config)
    with jitaccel.load_exported(export(half, tmp_path / "x", config)).apply(half):
        made = generate(half)
    assert made.dtype == torch.bfloat16
    assert relative_error(made, exact) <= 2 * relative_error(usual, exact)


def test_lora_layers_are_exported_with_their_scale(pipe: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = eager(pipe, TWO_STAGES)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "proj_mlp"])
    pipe.transformer.add_adapter(lora, adapter_name="one")
    pipe.transformer.set_adapters(["one"], [0.5])
    expected = eager(pipe, TWO_STAGES)
    assert relative_error(expected, plain) > 1e-3
    with jitaccel.load_exported(export(pipe, tmp_path / "x", TWO_STAGES)).apply(pipe):
        assert relative_error(generate(pipe), expected) < 1e-5


def test_weights_are_stored_once_and_read_from_their_file(exported: Path) -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        stage = torch.jit.load(str(exported / "stage0.pt"))
    assert not list(stage.parameters())
    loaded = jitaccel.load_exported(exported)
    model = tiny.pipeline().transformer
    expected = [weight for _, weight in sorted(model.named_parameters())]
    assert all(torch.equal(one, other) for one, other in zip(loaded._weights, expected, strict=True))


def test_removed_handle_leaves_the_pipeline_as_it_was(pipe: Any, exported: Path) -> None:
    expected = generate(pipe, num_inference_steps=3)
    before, state = pipe.transformer, dict(vars(pipe))
    handle = jitaccel.load_exported(exported).apply(pipe)
    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, callback_on_step_end=stop)
    generate(pipe)
    handle.remove()
    assert pipe.transformer is before and vars(pipe).keys() == state.keys()
    assert torch.equal(generate(pipe, num_inference_steps=3), expected)


def test_exported_and_patched_pipelines_do_not_mix(pipe: Any, exported: Path, tmp_path: Path) -> None:
    loaded = jitaccel.load_exported(exported)
    with jitaccel.apply(pipe, SHORT):
        with pytest.raises(ConfigError, match="must not be patched"):
            loaded.apply(pipe)
        with pytest.raises(ConfigError, match="must not be patched"):
            export(pipe, tmp_path / "x")
    with loaded.apply(pipe), pytest.raises(ConfigError, match="must not be patched"):
        loaded.apply(pipe)
    with pytest.raises(UnsupportedModelError, match="must be a FluxPipeline"):
        loaded.apply(pipe.transformer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "onnx"}, "must be one of aoti, torchscript, got 'onnx'"),
        ({"size": (50, 48)}, "multiples of 4 pixels"),
        ({"batch_size": 0}, "batch_size must be a whole number in 1..1024, got 0"),
        ({"text_tokens": 1.5}, "text_tokens must be a whole number"),
        ({"steps": "caller"}, "steps must be a number"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"attention": None}, "attention must be one of"),
        ({"format": ["aoti"]}, "format must be one of"),
        ({"size": 48}, r"size must be \(height, width\)"),
        ({"size": None}, r"size must be \(height, width\)"),
        ({"size": (48, "48")}, "multiples of 4 pixels"),
        ({"size": (48.0, 48)}, "multiples of 4 pixels"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"options": "max_autotune"}, "options must be a mapping"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    pipe: Any, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(pipe, tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not exist"):
        export(pipe, tmp_path)


def test_export_that_fails_leaves_no_folder(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jitaccel.artefacts.export._lower", stop)
    with pytest.raises(RuntimeError, match="stop"):
        export(pipe, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_bare_transformers_and_quantised_weights_are_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"must be a FluxPipeline, .*got FluxTransformer2DModel"):
        export(pipe.transformer, tmp_path / "x")
    linear = torch.nn.Linear(2, 2)
    linear.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"plain floating tensors, got Tensor of torch\.int8 for weight"):
        weights_of(linear)
