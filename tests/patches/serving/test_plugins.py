"""Plug-ins of SGLang and vLLM-Omni against stand-ins with the engines' signatures (tests/support/engines.py)."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import UnsupportedModelError
from tests.support import engines, ranks, tiny

ROOT = Path(__file__).resolve().parents[3]
GROUPS = ("sglang.multimodal_gen.plugins", "vllm_omni.general_plugins")
SETTINGS = '{"preset": "7x-paper", "steps": 9, "execution": "indexed"}'
CONFIG = jitaccel.PRESETS["7x-paper"].replace(steps=9)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setenv("JITACCEL_CONFIG", SETTINGS)
    monkeypatch.delitem(sys.modules, "jitaccel.patches.serving.vllm_omni_flux", raising=False)
    return engines.install(monkeypatch)


@functools.cache
def expected(seed: int = 0) -> Tensor:
    """Returns the latents of the pipeline that was patched by hand."""
    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, CONFIG, execution="indexed"):
        return tiny.generate(pipe, seed)


def register(name: str) -> None:
    importlib.import_module(f"jitaccel.patches.serving.{name}").register()


def test_entry_points_are_those_of_the_engines_and_lead_to_functions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["entry-points"]) == set(GROUPS)
    for group in GROUPS:
        module, _, name = project["entry-points"][group]["jitaccel"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", ["sglang", "vllm_omni"])
def test_nothing_is_done_or_imported_unless_asked(name: str) -> None:
    code = f"""
import os, sys
os.environ.pop("JITACCEL_CONFIG", None)
from jitaccel.patches.serving.{name} import register
register()
print(sorted({{module.partition(".")[0] for module in sys.modules}} & {{"torch", "diffusers", "sglang", "vllm_omni"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""


def test_sglang_pipeline_is_patched_after_its_cache_and_before_it_is_compiled(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("sglang")
    engine.hooks.apply_to(monkeypatch, engines.DiffusersPipeline)
    seen: list[bool] = []
    compile_it = engines.DiffusersPipeline._apply_torch_compile

    def note(self: Any, pipe: Any, server_args: Any) -> Any:
        seen.append(jitaccel.handle_of(pipe) is not None)
        return compile_it(self, pipe, server_args)

    monkeypatch.setattr(engines.DiffusersPipeline, "_apply_torch_compile", note)
    served = engines.DiffusersPipeline(tiny.pipeline())
    assert served.order == ["cache-dit", "compile"] and seen == [True]
    assert torch.equal(tiny.generate(served.diffusers_pipe), expected())
    assert engine.hooks.found[0][0].startswith(f"{engines.SGLANG_PIPELINE}.DiffusersPipeline.")


def test_request_after_one_that_was_aborted_makes_its_own_picture(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("sglang")
    engine.hooks.apply_to(monkeypatch, engines.DiffusersPipeline)
    pipe = engines.DiffusersPipeline(tiny.pipeline()).diffusers_pipe

    def abort(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        raise ArithmeticError("the client left")

    with pytest.raises(ArithmeticError):
        tiny.generate(pipe, callback_on_step_end=abort)
    assert torch.equal(tiny.generate(pipe), expected())
    assert not torch.equal(tiny.generate(pipe, 1), expected())


def test_vllm_omni_diffusers_backend_is_patched_when_it_has_loaded(
    engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    engine.adapter.loads = staticmethod(tiny.pipeline)
    register("vllm_omni")
    register("vllm_omni")  # each process may load plug-ins again
    adapter = engine.adapter(od_config=None)
    adapter.load_weights()
    assert caplog.text.count("vLLM-Omni's diffusers backend is accelerated") == 1
    request = {
        "prompt": "a red circle",
        "height": 48,
        "width": 48,
        "max_sequence_length": tiny.TEXT_TOKENS,
        "output_type": "latent",
        "num_inference_steps": 28,
        "return_dict": False,
    }
    for seed in (0, 1):
        made = adapter.forward({**request, "generator": torch.Generator().manual_seed(seed)})[0]
        assert tiny.relative_error(made, expected(seed)) < 1e-6


def engine_pipeline(engine: SimpleNamespace, **od_config: Any) -> Any:
    register("vllm_omni")
    pipe = engine.registry.made("FluxPipeline", SimpleNamespace(pipe=tiny.pipeline(), **od_config))
    assert isinstance(pipe, engines.FluxPipeline)
    return pipe


@pytest.mark.parametrize("settings", [SETTINGS, "7x", "few-steps", '{"preset": "4x-paper", "schedule": "native"}'])
@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)])
def test_vllm_omni_flux_makes_the_picture_of_diffusers(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, settings: str, batch: int, scale: float
) -> None:
    monkeypatch.setenv("JITACCEL_CONFIG", settings)
    from jitaccel.method.presets import resolve
    from jitaccel.patches.serving.settings import asked

    given = {name: value for name, value in asked({"JITACCEL_CONFIG": settings}).items() if name != "execution"}
    request = engines.request_of(batch, scale)
    config = resolve(given.pop("preset"), **given)
    pipe = engine_pipeline(engine)
    with torch.inference_mode(), tiny.counted(pipe.transformer) as seen:
        made = pipe.forward(request)
    assert tiny.relative_error(made, engines.through_diffusers(request, config)) < 1e-5
    assert min(seen) < tiny.NUM_TOKENS


@pytest.mark.slow
def test_vllm_omni_ranks_with_a_branch_each_make_the_picture_of_one(tmp_path: Path) -> None:
    ended = ranks.start("guidance", tmp_path)
    assert [each.code for each in ended] == [0, 0], "\n".join(each.output[-3000:] for each in ended)
    first, second = (each.found for each in ended)
    for name, batch in engines.GUIDED.items():
        expected = engines.through_diffusers(engines.request_of(batch, 2.0), CONFIG)
        assert torch.equal(first[name]["made"], second[name]["made"])
        assert tiny.relative_error(first[name]["made"], expected) < 1e-5
        assert first[name]["seen"] == second[name]["seen"]  # a branch each, of the same tokens
        assert batch > 1 or len(first[name]["seen"]) == CONFIG.steps


def test_vllm_omni_flux_forgets_a_request_that_failed(engine: SimpleNamespace) -> None:
    pipe = engine_pipeline(engine)
    broken = pipe.transformer.x_embedder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.forward(engines.request_of())
    broken.remove()
    expected = engines.through_diffusers(engines.request_of(), CONFIG)
    assert tiny.relative_error(pipe.forward(engines.request_of()), expected) < 1e-5


def test_vllm_omni_flux_stops_where_it_is_interrupted(engine: SimpleNamespace) -> None:
    pipe = engine_pipeline(engine)
    pipe._interrupt = True
    assert torch.equal(pipe.forward(engines.request_of()), engines.request_of().latents)


def test_vllm_omni_flux_refuses_what_would_be_wrong(engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="cache_backend must be none, got 'cache_dit'"):
        engine_pipeline(engine, cache_backend="cache_dit")
    monkeypatch.setenv("JITACCEL_CONFIG", '{"preset": "7x-paper", "steps": "caller", "schedule": "native"}')
    with pytest.raises(UnsupportedModelError, match="steps must be a number in vLLM-Omni"):
        engine_pipeline(engine)
