"""Fixtures for tests of pipelines."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers import transformer_flux

from tests.support.flux_pipelines import changed


@pytest.fixture
def nothing_global_changes() -> Iterator[None]:
    """No test here may leave a class or module of diffusers, or torch's switches, other than it found them."""
    owners = (
        FluxPipeline,
        FluxTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
        HookRegistry,
        ModelHook,
        diffusers,
        transformer_flux,
    )
    before = [{name: value for name, value in vars(owner).items() if not _is_of_dynamo(name)} for owner in owners]
    switches = torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.get_num_threads()
    yield
    for owner, attributes_before in zip(owners, before, strict=True):
        now = {name: value for name, value in vars(owner).items() if name in attributes_before}
        assert not changed(attributes_before, now), owner
    assert switches == (
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


def _is_of_dynamo(name: str) -> bool:
    """Whether torch's compiler added this to a module; it disappears when earlier compiled code is collected."""
    return name.startswith(("__compiled_fn_", "__builtins_dict_", "__resume_at_"))
