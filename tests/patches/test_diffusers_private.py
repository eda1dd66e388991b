"""The private names of diffusers in one file: each function does on diffusers' own objects what it says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from torch import nn

from jitaccel.patches import diffusers_private as private
from tests.support import tiny

MISSING = object()


@pytest.fixture(scope="module")
def shared() -> Any:
    """A pipeline that no test changes."""
    return tiny.pipeline()


def test_registry_of_hooks_is_the_one_that_diffusers_makes() -> None:
    module = nn.Linear(1, 1)
    assert private.hook_registry(module) is None
    made = HookRegistry.check_if_exists_or_initialize(module)
    assert private.hook_registry(module) is made
    assert private.put_hook_registry(module, HookRegistry(module)) is made


def test_registry_that_is_put_on_a_module_is_found_by_diffusers() -> None:
    module = nn.Linear(1, 1)
    registry = HookRegistry(module)
    assert private.put_hook_registry(module, registry) is registry
    assert HookRegistry.check_if_exists_or_initialize(module) is registry


def test_hook_of_accelerate_is_found() -> None:
    accelerate = pytest.importorskip("accelerate")
    module = nn.Linear(1, 1)
    assert private.accelerate_hook(module) is None
    hook = accelerate.hooks.ModelHook()
    accelerate.hooks.add_hook_to_module(module, hook)
    assert private.accelerate_hook(module) is hook


def test_chosen_attention_backend_is_told(pipe: Any) -> None:
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    assert private.attention_backend(processor) is None
    pipe.transformer.set_attention_backend("_native_math")
    assert private.attention_backend(processor) == "_native_math"


def test_context_parallelism_is_told(pipe: Any) -> None:
    """To turn it on takes several processes, so what diffusers' method sets is read from its text."""
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    assert private.has_context_parallelism(processor) is False
    assert "processor._parallel_config = " in inspect.getsource(type(pipe.transformer).enable_parallelism)
    processor._parallel_config = object()
    assert private.has_context_parallelism(processor) is True
    assert private.is_parallel(pipe.transformer) is False and hasattr(pipe.transformer, "_parallel_config")
    pipe.transformer._parallel_config = object()
    assert private.is_parallel(pipe.transformer) is True


def test_offloading_of_whole_models_is_told(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    assert private.offloads_whole_models(pipe) is False
    pipe.enable_model_cpu_offload(device="cpu")
    assert private.offloads_whole_models(pipe) is True


def test_execution_device_is_where_a_waiting_model_will_run(pipe: Any) -> None:
    assert private.execution_device(pipe).type == "cpu"
    accelerate = pytest.importorskip("accelerate")
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("meta"))
    assert private.execution_device(pipe).type == "meta"


def test_latents_are_packed_and_unpacked_as_the_pipeline_does(shared: Any) -> None:
    assert private.has_packed_latents(shared) and not private.has_packed_latents(object())
    latents = torch.arange(2.0 * 4 * 6 * 4).reshape(2, 4, 6, 4)
    tokens = private.pack_latents(shared, latents)
    assert tokens.shape == (2, 3 * 2, 16)
    scale = shared.vae_scale_factor
    assert torch.equal(private.unpack_latents(shared, tokens, 6 * scale, 4 * scale), latents)


def test_place_of_a_scheduler_is_kept_under_these_names(shared: Any) -> None:
    scheduler = type(shared.scheduler)()
    scheduler.set_timesteps(3, mu=0.5)
    fresh = private.scheduler_place(scheduler, MISSING)
    scheduler.set_begin_index(1)
    scheduler.step(torch.zeros(1), scheduler.timesteps[1], torch.zeros(1))
    place = private.scheduler_place(scheduler, MISSING)
    private.count_step(scheduler, 2)
    assert scheduler.step_index == 2
    assert MISSING not in fresh.values() and set(fresh.values()) == {None}
    assert sorted(place.values()) == [scheduler.begin_index, scheduler.step_index] == [1, 2]
