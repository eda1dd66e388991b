"""Stand-ins for the parts of SGLang-Diffusion 0.5.23 and vLLM-Omni 0.30.0 that jitaccel uses, with their signatures.

They provide modules with the engines' names, as far as our plug-ins import them. `python -m tests.support.engines
FOLDER` compares the signatures with the engines' sources, from wheels unpacked into FOLDER (docs/engines.md).
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from tests.support import signatures

SGLANG_PLUGINS = "sglang.multimodal_gen.runtime.platforms.plugins"
SGLANG_PIPELINE = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline"
OMNI_ADAPTER = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"
OMNI_REGISTRY = "vllm_omni.diffusion.registry"
OMNI_FLUX = "vllm_omni.diffusion.models.flux.pipeline_flux"
OMNI_GUIDANCE = "vllm_omni.diffusion.distributed.cfg_parallel"


class HookType(enum.Enum):
    """SGLang's kinds of hooks."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class Hooks:
    """SGLang's hook registration; `apply_to` does the work of its `apply_plugin_hooks` for one class."""

    def __init__(self) -> None:
        self.found: list[tuple[str, HookType, Callable[..., Any]]] = []

    def plugin_hook(self, target: str, type: HookType = HookType.AFTER) -> Callable[..., Any]:
        def decorator(hook: Callable[..., Any]) -> Callable[..., Any]:
            self.found.append((target, type, hook))
            return hook

        return decorator

    def apply_to(self, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
        for target, hook_type, hook in self.found:
            assert hook_type is HookType.AROUND
            _, owner, name = target.rsplit(".", 2)
            if owner != kind.__name__:
                continue
            original = getattr(kind, name)

            def wrapped(*args: Any, _original: Any = original, _hook: Any = hook, **kwargs: Any) -> Any:
                return _hook(_original, *args, **kwargs)

            monkeypatch.setattr(kind, name, wrapped)


class DiffusersPipeline:
    """SGLang's wrapper of a diffusers pipeline: loaded, cached, compiled, and then called as a whole."""

    def __init__(self, pipe: Any, server_args: Any = None) -> None:
        self.order: list[str] = []
        self.diffusers_pipe = self._apply_torch_compile(self._apply_cache_dit(pipe, server_args), server_args)

    def _apply_cache_dit(self, pipe: Any, server_args: Any) -> Any:
        self.order.append("cache-dit")
        return pipe

    def _apply_torch_compile(self, pipe: Any, server_args: Any) -> Any:
        self.order.append("compile")
        return pipe


class DiffusersAdapterPipeline(nn.Module):
    """vLLM-Omni's diffusers backend. `loads` replaces `from_pretrained`."""

    loads: Callable[[], Any]

    def __init__(self, *, od_config: Any, device: Any = None) -> None:
        super().__init__()
        self.od_config, self.device = od_config, device

    def load_weights(self) -> None:
        self._pipeline = type(self).loads()

    def forward(self, req: Any) -> Any:
        with torch.inference_mode():
            return self._pipeline(**req)


class CFGParallelMixin:
    """vLLM-Omni's guidance, with both branches in this process or one on each of two ranks."""

    transformer: Any

    def predict_noise(self, *args: Any, **kwargs: Any) -> Any:
        return self.transformer(*args, **kwargs)[0]

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: dict[str, Any],
        negative_kwargs: dict[str, Any] | None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not do_true_cfg:
            return self.predict_noise(**positive_kwargs)
        assert negative_kwargs is not None
        if distributed.is_initialized():
            rank = distributed.get_rank()
            own = self.predict_noise(**(positive_kwargs if rank == 0 else negative_kwargs)).contiguous()
            both = [torch.empty_like(own) for _ in range(2)]
            distributed.all_gather(both, own)
            positive, negative = both
        else:
            positive, negative = (self.predict_noise(**each) for each in (positive_kwargs, negative_kwargs))
        return negative + true_cfg_scale * (positive - negative)


class FluxPipeline(CFGParallelMixin, nn.Module):
    """vLLM-Omni's own FLUX.1 with its Euler loop, on the parts of the diffusers pipeline in `od_config.pipe`."""

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.transformer, self.scheduler = od_config.pipe.transformer, od_config.pipe.scheduler
        self._interrupt = False
        self.joint_attention_kwargs: dict[str, Any] = {}

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def prepare_timesteps(self, num_inference_steps: Any, sigmas: Any, image_seq_len: Any) -> Any:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else sigmas
        self.scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(image_seq_len))
        return self.scheduler.timesteps, len(self.scheduler.timesteps)

    def diffuse(
        self,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        negative_pooled_prompt_embeds: Tensor,
        latents: Tensor,
        latent_image_ids: Tensor,
        text_ids: Tensor,
        negative_text_ids: Tensor,
        timesteps: Tensor,
        do_true_cfg: bool,
        guidance: Tensor,
        true_cfg_scale: float,
        cfg_normalize: bool = False,
    ) -> Tensor:
        raise AssertionError("the engine's own loop must be replaced")

    def forward(self, req: Any) -> Tensor:
        """Makes the latents of a request, which is a namespace of embedded prompts, latents, ids and guidance."""
        timesteps, _ = self.prepare_timesteps(28, None, req.latents.shape[1])
        text_ids = torch.zeros(req.prompt_embeds.shape[1], 3)
        guidance = torch.full([1], req.guidance_scale, dtype=torch.float32).expand(req.latents.shape[0])
        return self.diffuse(
            req.prompt_embeds,
            req.pooled_prompt_embeds,
            req.negative_prompt_embeds,
            req.negative_pooled_prompt_embeds,
            req.latents,
            req.ids,
            text_ids,
            text_ids,
            timesteps,
            req.true_cfg_scale > 1,
            guidance if self.transformer.config.guidance_embeds else None,
            req.true_cfg_scale,
            cfg_normalize=False,
        )


class Registry:
    """vLLM-Omni's registry of pipelines."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str]] = {}

    def register_diffusion_model(
        self,
        model_arch: str,
        module_name: str,
        class_name: str,
        pre_process_func_name: str | None = None,
        post_process_func_name: str | None = None,
        ir_op_priority_func_name: str | None = None,
        action_post_process_func_name: str | None = None,
        prefix_cache_func_name: str | None = None,
    ) -> None:
        self.found[model_arch] = (module_name, class_name)

    def made(self, model_arch: str, od_config: Any) -> Any:
        """Returns a pipeline by architecture, as the engine makes it."""
        module, name = self.found[model_arch]
        return getattr(importlib.import_module(module), name)(od_config=od_config)


def get_flux_post_process_func(od_config: Any) -> Any:
    return lambda x: x


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Installs modules with the engines' names; returns the objects that tests inspect."""
    hooks, registry = Hooks(), Registry()
    adapter = type("DiffusersAdapterPipeline", (DiffusersAdapterPipeline,), {
        "load_weights": DiffusersAdapterPipeline.load_weights,
    })  # fmt: skip
    for name, content in (
        (SGLANG_PLUGINS, {"HookType": HookType, "plugin_hook": hooks.plugin_hook}),
        (OMNI_ADAPTER, {"DiffusersAdapterPipeline": adapter}),
        (OMNI_REGISTRY, {"register_diffusion_model": registry.register_diffusion_model}),
        *signatures.MODULES,
        (OMNI_FLUX, {"FluxPipeline": FluxPipeline, "get_flux_post_process_func": get_flux_post_process_func}),
    ):
        put_module(monkeypatch, name, content)
    return SimpleNamespace(hooks=hooks, registry=registry, adapter=adapter)


def put_module(monkeypatch: pytest.MonkeyPatch, name: str, content: dict[str, Any]) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        whole = ".".join(parts[:end])
        module = sys.modules.get(whole) or ModuleType(whole)
        monkeypatch.setitem(sys.modules, whole, module)
    vars(sys.modules[name]).update(content)


def request_of(batch: int = 1, scale: float = 1.0, seed: int = 0) -> SimpleNamespace:
    """Returns a request with embedded prompts for vLLM-Omni's own FLUX.1."""
    from tests.support import tiny

    generator = torch.Generator().manual_seed(5)
    text = [torch.randn(batch, tiny.TEXT_TOKENS, tiny.WIDTH, generator=generator) for _ in range(2)]
    pooled = [torch.randn(batch, tiny.WIDTH, generator=generator) for _ in range(2)]
    return SimpleNamespace(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1],
        latents=torch.cat([tiny.start(seed + image) for image in range(batch)]),
        ids=tiny.ids(),
        guidance_scale=3.5,
        true_cfg_scale=scale,
    )


def through_diffusers(request: SimpleNamespace, config: Any) -> Tensor:
    """Returns the picture for such a request from a diffusers pipeline with `jitaccel.apply`."""
    import jitaccel
    from tests.support import tiny

    pipe = tiny.pipeline()
    with jitaccel.apply(pipe, config, execution="indexed"):
        return tiny.generate(
            pipe,
            prompt=None,
            latents=request.latents,
            true_cfg_scale=request.true_cfg_scale,
            **{name: value for name, value in vars(request).items() if name.endswith("_embeds")},
        )


GUIDED = {"one": 1, "batch of two": 2}


def guidance(rank: int) -> Any:
    """A suite of `ranks`: vLLM-Omni's own FLUX.1 with one guidance branch on each of two ranks."""
    from jitaccel.patches.serving.vllm_omni import register
    from tests.support import tiny

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITACCEL_CONFIG", '{"preset": "7x-paper", "steps": 9}')
        engine = install(patch)
        register()
        for name, batch in GUIDED.items():
            pipe = engine.registry.made("FluxPipeline", SimpleNamespace(pipe=tiny.pipeline()))
            with tiny.counted(pipe.transformer) as seen:
                made = pipe.forward(request_of(batch, 2.0))
            found[name] = {"made": made, "seen": seen}
    return found


PAIRS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (SGLANG_PLUGINS, "plugin_hook", Hooks.plugin_hook),
    (SGLANG_PIPELINE, "DiffusersPipeline._apply_cache_dit", DiffusersPipeline._apply_cache_dit),
    (SGLANG_PIPELINE, "DiffusersPipeline._apply_torch_compile", DiffusersPipeline._apply_torch_compile),
    (OMNI_ADAPTER, "DiffusersAdapterPipeline.__init__", DiffusersAdapterPipeline.__init__),
    (OMNI_ADAPTER, "DiffusersAdapterPipeline.load_weights", DiffusersAdapterPipeline.load_weights),
    (OMNI_ADAPTER, "DiffusersAdapterPipeline.forward", DiffusersAdapterPipeline.forward),
    (OMNI_REGISTRY, "register_diffusion_model", Registry.register_diffusion_model),
    (OMNI_GUIDANCE, "CFGParallelMixin.predict_noise", CFGParallelMixin.predict_noise),
    (
        OMNI_GUIDANCE,
        "CFGParallelMixin.predict_noise_maybe_with_cfg",
        CFGParallelMixin.predict_noise_maybe_with_cfg,
    ),
    (OMNI_FLUX, "FluxPipeline.__init__", FluxPipeline.__init__),
    (OMNI_FLUX, "FluxPipeline.prepare_timesteps", FluxPipeline.prepare_timesteps),
    (OMNI_FLUX, "FluxPipeline.diffuse", FluxPipeline.diffuse),
    (OMNI_FLUX, "FluxPipeline.forward", FluxPipeline.forward),
    (OMNI_FLUX, "get_flux_post_process_func", get_flux_post_process_func),
)
"""Functions of an engine: module, name, and our counterpart."""


def main(folder: Path) -> int:
    """Reports differences between our assumptions and the unpacked wheels in a folder; returns the exit status."""
    pairs = (*PAIRS, *signatures.PAIRS)
    wrong = [*signatures.differing(folder, pairs), *signatures.lacking(folder)]
    classes = len(signatures.WHOLE) + len(signatures.SOME)
    print("\n".join(wrong) or f"{len(pairs)} signatures and {classes} classes are those of {folder}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
