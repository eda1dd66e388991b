"""SGLang-Diffusion: patches its diffusers backend after the pipeline has loaded; `sglang_flux` handles its own FLUX.1.

Written for sglang 0.5.23, whose plug-ins register hooks on dotted names. With `--backend diffusers`, the hook wraps
`_apply_cache_dit`, which divides tokens among GPUs if configured. jitaccel is applied after that, and before
torch.compile.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from .settings import accelerate, asked

TARGET = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline.DiffusersPipeline._apply_cache_dit"


def register() -> None:
    """The entry point `sglang.multimodal_gen.plugins`. Without JITACCEL_CONFIG it does nothing and imports nothing.

    Raises:
        ConfigError: If the settings cannot be read; the engine logs the error.
    """
    settings = asked(os.environ)
    if settings is None:
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookType, plugin_hook

    from . import sglang_flux as own

    for target, hook in (
        (TARGET, functools.partial(around_cache_dit, settings)),
        (f"{own.STAGE}.__init__", functools.partial(own.around_init, settings)),
        (f"{own.STAGE}._before_denoising_loop", functools.partial(own.around_beginning, settings)),
        (f"{own.STAGE}._run_denoising_step", own.around_step),
    ):
        plugin_hook(target, HookType.AROUND)(hook)


def around_cache_dit(
    settings: Mapping[str, Any], original: Callable[..., Any], engine: Any, pipe: Any, server_args: Any
) -> Any:
    """Returns the diffusers pipeline from the engine's `_apply_cache_dit`, patched.

    Args:
        settings: Arguments of `jitaccel.apply`.
        original: The engine's method.
        engine: The engine's DiffusersPipeline.
        pipe: The loaded diffusers pipeline.
        server_args: Arguments of the engine.
    """
    pipe = original(engine, pipe, server_args)
    accelerate(pipe, settings, "SGLang")
    return pipe
