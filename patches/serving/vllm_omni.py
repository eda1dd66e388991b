"""vLLM-Omni: patches its diffusers backend after loading, and replaces its own FLUX.1 pipeline.

Written for vllm-omni 0.30.0. The diffusers backend has no hook, so `load_weights` of the adapter's class is wrapped for
the whole process. The FLUX.1 pipeline is replaced through `register_diffusion_model`, which is made for that.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from .settings import accelerate, asked

_OURS = "_jitaccel_original"  # attribute of the method that replaces the adapter's


def register() -> None:
    """The entry point `vllm_omni.general_plugins`. Without JITACCEL_CONFIG it does nothing and imports nothing.

    Calling it twice has the same effect as once.

    Raises:
        ConfigError: If the settings cannot be read.
    """
    settings = asked(os.environ)
    if settings is None:
        return
    from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
    from vllm_omni.diffusion.registry import register_diffusion_model

    method = DiffusersAdapterPipeline.load_weights
    DiffusersAdapterPipeline.load_weights = loading(settings, getattr(method, _OURS, method))
    register_diffusion_model("FluxPipeline", "jitaccel.patches.serving.vllm_omni_flux", "JitFluxPipeline")


def loading(settings: Mapping[str, Any], original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a replacement for the adapter's `load_weights` that patches the loaded pipeline."""

    @functools.wraps(original)
    def load_weights(adapter: Any) -> None:
        original(adapter)
        accelerate(adapter._pipeline, settings, "vLLM-Omni's diffusers backend")

    setattr(load_weights, _OURS, original)
    return load_weights
