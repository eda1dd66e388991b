"""The functions and fields of SGLang-Diffusion's own FLUX.1 that our plug-in uses, and a comparison with a wheel."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.support import tiny
from tests.support.sglang_native import (
    CFGBranch,
    CFGPolicy,
    DenoisingContext,
    DenoisingStage,
    DenoisingStepState,
    FluxPipelineConfig,
)
from tests.support.sglang_network import (
    AttentionBackendEnum,
    FluxPosEmbed,
    FluxTransformer2DModel,
    GroupCoordinator,
    get_replica_group,
    get_sp_parallel_rank,
    model_parallel_is_initialized,
)

_RUNTIME = "sglang.multimodal_gen.runtime"
DENOISING = f"{_RUNTIME}.pipelines_core.stages.denoising"
POLICY = f"{_RUNTIME}.distributed.cfg_policy"
DISTRIBUTED = f"{_RUNTIME}.distributed"
PARALLEL = f"{DISTRIBUTED}.parallel_state"
GROUP = f"{DISTRIBUTED}.group_coordinator"
PLATFORM = f"{_RUNTIME}.platforms.interface"
ROTARY = f"{_RUNTIME}.layers.rotary_embedding.mrope"
NETWORK = f"{_RUNTIME}.models.dits.flux"
SCHEDULER = f"{_RUNTIME}.models.schedulers.scheduling_flow_match_euler_discrete"
REQUEST = f"{_RUNTIME}.pipelines_core.schedule_batch"
SERVER = f"{_RUNTIME}.server_args.server_args"
SAMPLING = "sglang.multimodal_gen.configs.sample.sampling_params"
FLUX_CONFIG = "sglang.multimodal_gen.configs.pipeline_configs.flux"
BASE_CONFIG = "sglang.multimodal_gen.configs.pipeline_configs.base"

MODULES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        PARALLEL,
        {
            "model_parallel_is_initialized": model_parallel_is_initialized,
            "get_replica_group": get_replica_group,
            "get_sp_parallel_rank": get_sp_parallel_rank,
        },
    ),
)
"""Names that our plug-in imports from the engine, besides hooks, by module."""

PAIRS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    *(
        (DENOISING, f"DenoisingStage.{name}", getattr(DenoisingStage, name))
        for name in (
            "__init__",
            "_sp_world_size",
            "_get_transformer_attr",
            "_prepare_denoising_loop",
            "_before_denoising_loop",
            "_prepare_step_state",
            "_run_denoising_step",
            "_predict_noise_with_cfg",
            "_predict_noise",
            "forward",
        )
    ),
    *((POLICY, f"CFGPolicy.{name}", getattr(CFGPolicy, name)) for name in ("build", "combine")),
    (POLICY, "CFGBranch.configure_batch", CFGBranch.configure_batch),
    *(
        (FLUX_CONFIG, f"FluxPipelineConfig.{name}", getattr(FluxPipelineConfig, name))
        for name in (
            "prepare_sigmas",
            "get_classifier_free_guidance_scale",
            "_prepare_latent_image_ids",
            "get_freqs_cis",
            "prepare_pos_cond_kwargs",
            "prepare_neg_cond_kwargs",
        )
    ),
    *(
        (BASE_CONFIG, f"ImagePipelineConfig.{name}", getattr(FluxPipelineConfig, name))
        for name in ("shard_latents_for_sp", "gather_latents_for_sp")
    ),
    (BASE_CONFIG, "PipelineConfig.slice_noise_pred", FluxPipelineConfig.slice_noise_pred),
    (PARALLEL, "model_parallel_is_initialized", model_parallel_is_initialized),
    (PARALLEL, "get_replica_group", get_replica_group),
    (PARALLEL, "get_sp_parallel_rank", get_sp_parallel_rank),
    *(
        (GROUP, f"GroupCoordinator.{name}", getattr(GroupCoordinator, name))
        for name in ("all_gather", "all_reduce", "broadcast")
    ),
    (PLATFORM, "AttentionBackendEnum.is_sparse", AttentionBackendEnum.is_sparse.fget),  # type: ignore[attr-defined]
    (ROTARY, "FluxPosEmbed.__init__", FluxPosEmbed.__init__),
    (ROTARY, "FluxPosEmbed.forward", FluxPosEmbed.forward),
    (NETWORK, "FluxTransformer2DModel.forward", FluxTransformer2DModel.forward),
    (SCHEDULER, "FlowMatchEulerDiscreteScheduler.set_timesteps", tiny.scheduler().set_timesteps),
)
"""The signatures to compare, in the form of those in `engines`."""

WHOLE: tuple[tuple[str, str, tuple[str, ...]], ...] = tuple(
    (module, kind.__name__, tuple(each.name for each in dataclasses.fields(kind)))
    for module, kind in (
        (DENOISING, DenoisingContext),
        (DENOISING, DenoisingStepState),
        (POLICY, CFGBranch),
        (POLICY, CFGPolicy),
    )
)
"""Classes of the engine with exactly these fields, in this order: module, class, names."""

SOME: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (DENOISING, "DenoisingStage", ("transformer", "attn_backend", "_cache_dit_enabled")),
    (GROUP, "GroupCoordinator", ("world_size", "rank_in_group", "device_group")),
    (NETWORK, "FluxTransformer2DModel", ("rotary_emb",)),
    (
        REQUEST,
        "Req",
        ("latents", "raw_latent_shape", "did_sp_shard_latents", "image_latent", "extra", "is_warmup"),
    ),
    (
        SAMPLING,
        "SamplingParams",
        (
            "height",
            "width",
            "progressive_mode",
            "enable_teacache",
            "enable_spectrum",
            "guidance_rescale",
            "cfg_normalization",
            "cfg_gate_step",
            "rollout",
            "enable_sequence_shard",
        ),
    ),
    (SERVER, "ServerArgs", ("pipeline_config", "enable_breakable_cuda_graph", "comfyui_mode", "enable_cfg_parallel")),
    (BASE_CONFIG, "PipelineConfig", ("cfg_policy",)),
)
"""Classes of the engine with at least these fields and attributes: module, class, names."""


def differing(folder: Path, pairs: Iterable[tuple[str, str, Callable[..., Any]]]) -> list[str]:
    """Returns the functions whose arguments differ from those in the unpacked wheels in a folder."""
    found = []
    for module, name, ours in pairs:
        theirs = _arguments(_parsed(folder, module), name.split("."))
        own = [parameter for parameter in inspect.signature(ours).parameters if parameter != "self"]
        if own != theirs:
            found.append(f"{module}.{name}: {theirs} there, {own} here")
    return found


def lacking(folder: Path) -> list[str]:
    """Returns the SGLang classes in a folder whose fields differ from our assumptions."""
    found = []
    for module, name, ours in WHOLE:
        if (theirs := _fields(_parsed(folder, module), name)) != list(ours):
            found.append(f"{module}.{name}: {theirs} there, {list(ours)} here")
    for module, name, ours in SOME:
        if missing := [each for each in ours if each not in _fields(_parsed(folder, module), name)]:
            found.append(f"{module}.{name}: {', '.join(missing)} not there")
    return found


def _parsed(folder: Path, module: str) -> list[ast.stmt]:
    return ast.parse((folder / Path(*module.split(".")).with_suffix(".py")).read_text()).body


def _arguments(body: list[ast.stmt], path: list[str]) -> list[str]:
    for node in body:
        if isinstance(node, ast.ClassDef) and len(path) > 1 and node.name == path[0]:
            return _arguments(node.body, path[1:])
        if isinstance(node, ast.FunctionDef) and path == [node.name]:
            a = node.args
            rest = [each.arg for each in (a.vararg, a.kwarg) if each is not None]
            middle = [each.arg for each in a.kwonlyargs]
            names = [each.arg for each in (*a.posonlyargs, *a.args)]
            if a.vararg is not None:
                names, rest = [*names, a.vararg.arg], rest[1:]
            return [name for name in (*names, *middle, *rest) if name != "self"]
    return [f"no {'.'.join(path)}"]


def _fields(body: list[ast.stmt], name: str) -> list[str]:
    """Returns a class's annotated fields, then the attributes its methods set on `self`, each once."""
    kind = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if kind is None:
        return [f"no {name}"]
    fields = [n.target.id for n in kind.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    stored = [
        n.attr
        for n in ast.walk(kind)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, "id", "") == "self"
    ]
    return list(dict.fromkeys([*fields, *stored]))
