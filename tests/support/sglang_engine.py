"""Runs SGLang-Diffusion's own denoising stage, from a wheel unpacked into FOLDER, with our hooks on the CPU.

Run `python -m tests.support.sglang_engine FOLDER`, or two ranks with `torchrun --nproc-per-node 2 -m ...`. It needs
einops. Stage, guidance, FLUX.1's configuration, requests, scheduler, positions and plug-in loading are the engine's own
code. Modules that need CUDA or are unrelated are empty: kernels, attention, loading, offloading, logging. The network
is that of `sglang_network`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

from tests.support import engines, tiny
from tests.support import sglang_network as network

ROOT = Path(__file__).resolve().parents[2]
_GEN = "sglang.multimodal_gen"
_RUN = f"{_GEN}.runtime"
REAL = (
    f"{_RUN}.pipelines_core.stages.denoising",
    f"{_RUN}.pipelines_core.stages.timestep_preparation",
    f"{_RUN}.pipelines_core.diffusion_scheduler_utils",
    f"{_RUN}.pipelines_core.schedule_batch",
    f"{_RUN}.distributed.cfg_policy",
    f"{_RUN}.distributed.cfg_parallel_utils",
    f"{_RUN}.distributed.sp_shard_utils",
    f"{_RUN}.distributed.communication_op",
    f"{_RUN}.models.schedulers.base",
    f"{_RUN}.models.schedulers.sigma_schedule",
    f"{_RUN}.models.schedulers.scheduling_flow_match_euler_discrete",
    f"{_RUN}.layers.rotary_embedding.mrope",
    f"{_RUN}.managers.forward_context",
    f"{_RUN}.platforms.interface",
    f"{_RUN}.platforms.plugins",
    f"{_GEN}.configs.pipeline_configs.base",
    f"{_GEN}.configs.pipeline_configs.flux",
    f"{_GEN}.configs.sample.sampling_params",
    f"{_GEN}.configs.sample.flux",
    f"{_GEN}.configs.task_type",
    "sglang.srt.plugins.hook_registry",
)
"""Modules of the engine whose own code runs; all others are empty."""


class _EmptyKind(type):
    """A metaclass whose classes have every attribute, each again such a class, and are false."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _EmptyKind(name, (_Empty,), {})
        setattr(cls, name, made)
        return made

    def __bool__(cls) -> bool:
        return False


class _Empty(metaclass=_EmptyKind):
    """Does nothing in any role: function, decorator, context manager or base class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else _Empty()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Module(ModuleType):
    """A module with every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _EmptyKind(name, (_Empty,), {})
        setattr(self, name, made)
        return made


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the engine's modules: some from a folder, and all others empty except for `given` names."""

    def __init__(self, folder: Path, given: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._given = folder, given

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        place = self._folder / Path(*fullname.split("."))
        file = place.with_suffix(".py")
        if fullname.partition(".")[0] != "sglang" or not (place.is_dir() or file.exists()):
            return None
        if fullname in REAL:
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._given.get(module.__name__, {}))


def _given() -> dict[str, dict[str, Any]]:
    """Returns the names that empty modules must provide: one process, or groups of `sglang_network`, on the CPU."""
    alone = network.GroupCoordinator(is_alone=True)
    groups = {
        "model_parallel_is_initialized": network.model_parallel_is_initialized,
        "get_replica_group": network.get_replica_group,
        "get_sp_group": network.sequence_group,
        "get_sp_world_size": lambda: network.sequence_group().world_size,
        "get_sp_parallel_rank": network.get_sp_parallel_rank,
        "get_cfg_group": network.branch_group,
        "get_classifier_free_guidance_world_size": lambda: network.branch_group().world_size,
        "get_classifier_free_guidance_rank": lambda: network.branch_group().rank_in_group,
        "get_tp_group": lambda: alone,
        "get_local_torch_device": lambda: torch.device("cpu"),
        "world_group_is_initialized": lambda: False,
    }
    cpu = type("Cpu", (_Empty,), {"is_float64_supported": lambda _: True, "device_type": "cpu"})()
    return {
        f"{_RUN}.distributed": groups,
        f"{_RUN}.distributed.parallel_state": groups,
        f"{_RUN}.platforms": {
            "current_platform": cpu,
            "PLATFORM_PLUGINS_GROUP": "sglang.multimodal_gen.platforms",
            "get_selected_platform_dist": lambda: None,
        },
        engines.SGLANG_PIPELINE: {"DiffusersPipeline": engines.DiffusersPipeline},
        f"{_RUN}.utils.precision": {"resolve_precision": lambda *_, **__: torch.float32},
        _GEN: {"envs": SimpleNamespace(SGLANG_CACHE_DIT_ENABLED=False, SGLANG_DIFFUSION_CFG_GATE_STEP=1.0)},
    }


def stage_of(pipe: Any, **server_args: Any) -> Any:
    """Returns the engine's own DenoisingStage with a diffusers pipeline's network and the engine's scheduler."""
    flux = importlib.import_module(f"{_GEN}.configs.pipeline_configs.flux")
    policy = importlib.import_module(f"{_RUN}.distributed.cfg_policy")
    denoising = importlib.import_module(f"{_RUN}.pipelines_core.stages.denoising")
    rotary = importlib.import_module(f"{_RUN}.layers.rotary_embedding.mrope")
    schedulers = importlib.import_module(f"{_RUN}.models.schedulers.scheduling_flow_match_euler_discrete")
    backend = importlib.import_module(f"{_RUN}.platforms.interface").AttentionBackendEnum.TORCH_SDPA
    config = flux.FluxPipelineConfig(cfg_policy=policy.CFGPolicy())
    config.dit_config = SimpleNamespace(
        arch_config=SimpleNamespace(in_channels=tiny.CHANNELS), hidden_size=32, num_attention_heads=2
    )
    config.vae_config = SimpleNamespace(arch_config=SimpleNamespace(vae_scale_factor=tiny.PIXELS_PER_TOKEN // 2))
    network.SERVER.args = SimpleNamespace(
        **{
            "pipeline_config": config,
            "enable_cfg_parallel": False,
            "enable_breakable_cuda_graph": None,
            "comfyui_mode": False,
            "disable_autocast": True,
            "enable_torch_compile": False,
            "model_loaded": {},
            **server_args,
        }
    )
    transformer = network.FluxTransformer2DModel(pipe.transformer)
    transformer.rotary_emb = rotary.FluxPosEmbed(theta=10000, axes_dim=list(pipe.transformer.config.axes_dims_rope))
    base = importlib.import_module(f"{_RUN}.pipelines_core.stages.base").PipelineStage
    base.server_args = network.SERVER.args
    stage = denoising.DenoisingStage(
        transformer, schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    )
    stage.attn_backend = SimpleNamespace(get_enum=lambda: backend, get_builder_cls=lambda: None)
    stage.device = torch.device("cpu")
    return stage


def made(stage: Any, batch: int = 1, scale: float = 1.0, **given: Any) -> Tensor:
    """Returns the latents (B, N, D) that the engine's stages make for a request with embedded prompts."""
    plain = engines.request_of(batch, scale)
    requests = importlib.import_module(f"{_RUN}.pipelines_core.schedule_batch")
    sampling = importlib.import_module(f"{_GEN}.configs.sample.flux")
    timesteps = importlib.import_module(f"{_RUN}.pipelines_core.stages.timestep_preparation")
    parameters = sampling.FluxSamplingParams(
        prompt="a red circle",
        negative_prompt="" if scale > 1 else None,
        true_cfg_scale=scale,
        height=tiny.GRID[0] * tiny.PIXELS_PER_TOKEN,
        width=tiny.GRID[1] * tiny.PIXELS_PER_TOKEN,
        **given,
    )
    lengths = [[plain.prompt_embeds.shape[1]] * batch] * 2
    request = requests.Req(
        sampling_params=parameters,
        prompt_embeds=[None, plain.prompt_embeds],
        negative_prompt_embeds=[None, plain.negative_prompt_embeds],
        prompt_seq_lens=lengths,
        negative_prompt_seq_lens=lengths,
        pooled_embeds=[plain.pooled_prompt_embeds],
        neg_pooled_embeds=[plain.negative_pooled_prompt_embeds],
        latents=plain.latents,
        raw_latent_shape=plain.latents.shape,
    )
    shift = importlib.import_module(f"{_RUN}.pipelines_core.diffusion_scheduler_utils").calculate_linear_shift
    prepare = timesteps.TimestepPreparationStage(
        stage.scheduler, [lambda request, _: ("mu", shift(request.raw_latent_shape[1]))]
    )
    prepare.forward(request, stage.server_args)
    stage.forward(request, stage.server_args)
    pack = importlib.import_module(f"{_GEN}.configs.pipeline_configs.base").pack_latents_2x2
    packed: Tensor = pack(request.latents, *request.latents.shape)
    return packed


SETTINGS = (
    {"preset": "7x-paper", "steps": 9},
    {"preset": "7x"},
    {"preset": "few-steps"},
    {"preset": "4x-paper", "schedule": "native", "steps": 12},
    {"preset": "7x-paper", "schedule": "native", "steps": "caller"},
)
_HOOKED = ("__init__", "_before_denoising_loop", "_run_denoising_step")
_REQUESTS = ((1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0))
_STEPS = 8  # requested steps
_TOLERANCE = 1e-5


class _Hooked:
    """The engine's DenoisingStage with our hooks, found, loaded and applied by its own plug-in machinery."""

    def __init__(self) -> None:
        self._kind = importlib.import_module(f"{_RUN}.pipelines_core.stages.denoising").DenoisingStage
        self._plugins = importlib.import_module(f"{_RUN}.platforms.plugins")
        self._own = dict(vars(self._kind))
        self._plugins.entry_points = lambda group: [EntryPoint(*each, group) for each in _declared(group)]

    def with_settings(self, settings: Mapping[str, Any] | None) -> None:
        """Restores the engine's methods, and wraps them with our hooks if settings are given."""
        for name in _HOOKED:
            setattr(self._kind, name, self._own[name])
        self._plugins.HookRegistry.reset()
        self._plugins._reset_lifecycle_for_tests()
        os.environ["JITACCEL_CONFIG"] = "" if settings is None else json.dumps(settings)
        self._plugins.load_plugins()
        self._plugins.apply_plugin_hooks()
        registry = self._plugins.HookRegistry
        assert set(registry._hooks) == registry._patched and len(registry._patched) == (0 if settings is None else 4)


def _declared(group: str) -> list[tuple[str, str]]:
    """Returns names and values of this project's entry points, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["entry-points"].get(group, {}).items())


def differences(hooked: _Hooked, **server: Any) -> Iterator[tuple[str, float]]:
    """Yields each case and its difference from the expected result of `jitaccel.apply` on diffusers in one process."""
    from jitaccel.method.presets import resolve

    for settings in SETTINGS:
        hooked.with_settings(settings)
        preset, fields = settings["preset"], {name: x for name, x in settings.items() if name != "preset"}
        config = resolve(preset, **fields, multiple=network.sequence_group().world_size)
        config = config.replace(steps=_STEPS) if config.steps == "caller" else config
        for batch, scale in _REQUESTS:
            expected = engines.through_diffusers(engines.request_of(batch, scale), config)
            picture = made(stage_of(tiny.pipeline(), **server), batch, scale, num_inference_steps=_STEPS)
            yield f"{settings}, batch {batch}, guidance {scale}", _difference(picture, expected)
    # With branches on several ranks the engine itself does not reuse guidance.
    gate = [] if server.get("enable_cfg_parallel") else [{"cfg_gate_step": 0.5}]
    for given in (*gate, {"guidance_rescale": 0.5}):
        pictures = []
        for chosen in (None, SETTINGS[0]):
            hooked.with_settings(chosen)
            pictures.append(made(stage_of(tiny.pipeline(), **server), 1, 2.0, num_inference_steps=_STEPS, **given))
        yield f"{given}, which is refused, from the engine's own", float(not torch.equal(*pictures))


def _difference(picture: Tensor, expected: Tensor) -> float:
    """Returns the relative difference; infinity if the ranks' pictures are not bitwise equal."""
    own = picture.contiguous()
    for other in network.GroupCoordinator().all_gather(own[None]):
        if not torch.equal(own, other):
            return float("inf")
    return tiny.relative_error(picture, expected)


def main(folder: str) -> int:
    """Prints how far the engine's pictures with our hooks are from the expected ones; returns the exit status."""
    logging.disable(logging.ERROR)
    sys.meta_path.insert(0, _Importer(Path(folder), _given()))
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    hooked, is_right = _Hooked(), True
    for server in ({}, {"enable_cfg_parallel": True}) if "RANK" in os.environ else ({},):
        network.SERVER.args = SimpleNamespace(enable_cfg_parallel=bool(server))
        for what, difference in differences(hooked, **server):
            is_right = is_right and difference < _TOLERANCE
            if network.GroupCoordinator().rank_in_group == 0:
                print(f"{difference:9.1e}  {server or ''} {what}")
    if "RANK" in os.environ:
        distributed.destroy_process_group()
    return not is_right


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
