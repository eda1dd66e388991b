"""Caches that diffusers' functions set on a model, without `enable_cache`, are found and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry

import jitaccel
from jitaccel import UnsupportedModelError
from jitaccel.patches.diffusers_private import caches_in, hook_registry
from tests.support import sd3, tiny
from tests.support.tiny import SHORT


def mag(model: Any) -> None:
    diffusers.hooks.apply_mag_cache(model, diffusers.MagCacheConfig(num_inference_steps=5, mag_ratios=torch.ones(5)))


def first_block(model: Any) -> None:
    diffusers.hooks.apply_first_block_cache(model, diffusers.FirstBlockCacheConfig(threshold=0.1))


def broadcast(model: Any) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.hooks.apply_pyramid_attention_broadcast(model, config)


def faster(model: Any) -> None:
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, tensor_format="BCHW"
    )
    diffusers.hooks.apply_faster_cache(model, config)


def taylor(model: Any) -> None:
    diffusers.hooks.apply_taylorseer_cache(model, diffusers.TaylorSeerCacheConfig(cache_interval=2))


def derived(model: Any) -> None:
    """As a package that builds on diffusers' caches does."""
    kind: Any = diffusers.hooks.mag_cache.MagCacheBlockHook
    mine = type("Mine", (kind,), {"__module__": "somebodys.caches"})
    block = model.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(mine.__new__(mine), "mine")


CACHES = [mag, first_block, broadcast, faster, taylor, derived]


def without(model: Any) -> None:
    """Removes caches as the message says."""
    for name in caches_in(model):
        HookRegistry.check_if_exists_or_initialize(model).remove_hook(name)


@pytest.fixture(params=["flux", "sd3"])
def subject(request: pytest.FixtureRequest) -> tuple[Any, Callable[..., Any]]:
    if request.param == "flux":
        return tiny.pipeline(), tiny.generate
    return sd3.pipeline(), sd3.generate


@pytest.mark.parametrize("cache", CACHES)
def test_cache_put_on_before_is_refused(subject: tuple[Any, Callable[..., Any]], cache: Callable[[Any], None]) -> None:
    pipe, _ = subject
    cache(pipe.transformer)
    names = caches_in(pipe.transformer)
    assert names
    for target in (pipe, pipe.transformer):
        with pytest.raises(UnsupportedModelError, match="must have no cache") as raised:
            jitaccel.apply(target, SHORT)
        assert all(repr(name) in str(raised.value) for name in names) and "remove_hook(name)" in str(raised.value)
    without(pipe.transformer)
    jitaccel.apply(pipe, SHORT).remove()


@pytest.mark.parametrize("cache", CACHES)
def test_cache_put_on_afterwards_is_refused_at_the_call(
    subject: tuple[Any, Callable[..., Any]], cache: Callable[[Any], None]
) -> None:
    pipe, generate = subject
    with jitaccel.apply(pipe, SHORT):
        expected = generate(pipe)
        cache(pipe.transformer)
        with pytest.raises(UnsupportedModelError, match=r"cache hooks .* in the transformer"):
            generate(pipe)
        without(pipe.transformer)
        assert torch.equal(generate(pipe), expected)


def test_offloading_is_no_cache() -> None:
    model = tiny.transformer()
    diffusers.hooks.apply_layerwise_casting(model, torch.bfloat16, torch.float32)
    assert any(hook_registry(module) for module in model.modules())
    assert caches_in(model) == ()
