"""Each function for a private name of diffusers behaves as documented on diffusers' own objects."""

from __future__ import annotations

import copy
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, FluxPipeline, ParallelConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import attention_dispatch
from torch import nn

import jitaccel
from jitaccel.patches import diffusers_private as private
from tests.support import tiny

MISSING = object()


@pytest.fixture
def owned() -> Any:
    """A pipeline all parts of which are the test's own: `tiny.pipeline` shares all but the transformer."""
    parts = {name: part for name, part in tiny.pipeline().components.items() if isinstance(part, nn.Module)}
    return tiny.pipeline(**copy.deepcopy(parts))


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
    pipe.transformer.set_attention_backend("native")
    assert private.attention_backend(processor) is None


def test_attention_backend_that_is_active_for_all_is_told(pipe: Any) -> None:
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    with attention_dispatch.attention_backend("_native_math"):
        assert private.attention_backend(processor) == "_native_math"
    assert private.attention_backend(processor) is None


def test_context_parallelism_is_told(pipe: Any) -> None:
    """Enabling it takes several processes, so the attributes are read from the source of diffusers' method."""
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    assert private.has_context_parallelism(processor) is False
    assert "processor._parallel_config = " in inspect.getsource(type(pipe.transformer).enable_parallelism)
    processor._parallel_config = object()
    assert private.has_context_parallelism(processor) is True


def test_splitting_over_devices_is_told_of_the_model(pipe: Any) -> None:
    assert pipe.transformer._parallel_config is None and private.is_parallel(pipe.transformer) is False
    assert "_parallel_config" in inspect.getsource(type(pipe.transformer).enable_parallelism)
    pipe.transformer._parallel_config = object()
    assert private.is_parallel(pipe.transformer) is True
    assert private.is_parallel(nn.Linear(1, 1)) is False


def test_context_parallelism_of_a_model_and_its_group_are_found(pipe: Any) -> None:
    """test_ranks.py tests them with two processes; here diffusers must fill and read the attributes that we read."""
    assert private.context_parallelism(pipe.transformer) is None
    assert private.context_parallelism(nn.Linear(1, 1)) is None
    settings = ContextParallelConfig(ulysses_degree=2)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=settings)
    assert private.context_parallelism(pipe.transformer) is settings
    settings._flattened_mesh = SimpleNamespace(get_group=lambda: "group", size=lambda: 2)
    assert private.divided_group(settings) == ("group", 2)


@pytest.mark.parametrize("is_outside", [True, False])
def test_order_of_hooks_that_divide_tokens_is_told(pipe: Any, is_outside: bool) -> None:
    model, ours = pipe.transformer, ModelHook()
    registry = HookRegistry.check_if_exists_or_initialize(model)

    def divide() -> None:
        apply_context_parallel(model, ContextParallelConfig(ulysses_degree=2), model._cp_plan)

    if not is_outside:
        divide()
    registry.register_hook(ours, "jitaccel")
    assert private.is_divided_around(model, ours) is False
    if is_outside:
        divide()
    assert private.is_divided_around(model, ours) is is_outside


def test_offloading_of_whole_models_is_told(owned: Any) -> None:
    pytest.importorskip("accelerate")
    assert private.offloads_whole_models(owned) is False
    owned.enable_model_cpu_offload(device="cpu")
    assert private.offloads_whole_models(owned) is True


def test_execution_device_is_where_a_waiting_model_will_run(owned: Any) -> None:
    assert private.execution_device(owned).type == "cpu"
    accelerate = pytest.importorskip("accelerate")
    for module in owned.components.values():
        if isinstance(module, nn.Module):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("meta"))
    assert private.execution_device(owned).type == "meta"


def test_latents_are_packed_and_unpacked_as_the_pipeline_does(pipe: Any) -> None:
    assert private.has_packed_latents(pipe) and not private.has_packed_latents(object())
    latents = torch.arange(2.0 * 4 * 6 * 4).reshape(2, 4, 6, 4)
    tokens = private.pack_latents(pipe, latents)
    assert tokens.shape == (2, 3 * 2, 16)
    scale = pipe.vae_scale_factor
    assert torch.equal(private.unpack_latents(pipe, tokens, 6 * scale, 4 * scale), latents)


def test_place_of_a_scheduler_is_kept_under_these_names(pipe: Any) -> None:
    scheduler = type(pipe.scheduler)()
    scheduler.set_timesteps(3, mu=0.5)
    fresh = private.scheduler_place(scheduler, MISSING)
    scheduler.set_begin_index(1)
    scheduler.step(torch.zeros(1), scheduler.timesteps[1], torch.zeros(1))
    place = private.scheduler_place(scheduler, MISSING)
    assert MISSING not in fresh.values() and set(fresh.values()) == {None}
    assert sorted(place.values()) == [scheduler.begin_index, scheduler.step_index] == [1, 2]


def test_step_of_a_scheduler_can_be_set(pipe: Any) -> None:
    scheduler = type(pipe.scheduler)()
    scheduler.set_timesteps(3, mu=0.5)
    private.count_step(scheduler, 2)
    assert scheduler.step_index == 2
    scheduler.step(torch.zeros(1), scheduler.timesteps[2], torch.zeros(1))
    assert scheduler.step_index == 3


def test_dtype_is_given_by_the_name_that_pipelines_take_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dtype")
        pipe = FluxPipeline.from_pretrained(jitaccel.embedded_model(), **{private.dtype_argument(): torch.bfloat16})
    assert pipe.transformer.dtype is torch.bfloat16


def test_progress_bar_is_left_out_and_comes_back_with_its_settings() -> None:
    pipe = tiny.pipeline()
    for settings in ({"disable": False, "desc": "steps"}, None):
        if settings is None:
            del pipe._progress_bar_config
        else:
            pipe.set_progress_bar_config(**settings)
        with private.quiet(pipe):
            assert pipe.progress_bar(range(2)).disable
        assert vars(pipe).get("_progress_bar_config") == settings
