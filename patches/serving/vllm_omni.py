"""vLLM-Omni: its diffusers backend is patched when it has loaded, and its own FLUX.1 pipeline is replaced by ours.

Written for vllm-omni 0.30.0. The first wraps `load_weights` of the adapter's class in the process, since that backend
has no hook; the second is what `register_diffusion_model` is for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from .settings import accelerate, asked

_OURS = "_jitaccel_original"  # on the method that stands in place of the adapter's


def register() -> None:
    """The entry point `vllm_omni.general_plugins`; does nothing, and imports nothing, unless asked. Twice is once.

    Raises:
        ConfigError: For settings that cannot be read.
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
    """Returns `load_weights` of the adapter, which patches the pipeline that it has loaded."""

    @functools.wraps(original)
    def load_weights(adapter: Any) -> None:
        original(adapter)
        accelerate(adapter._pipeline, settings, "vLLM-Omni's diffusers backend")

    setattr(load_weights, _OURS, original)
    return load_weights
