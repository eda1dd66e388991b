"""A stand-in for the denoising loop of SGLang-Diffusion 0.5.23's own FLUX.1, with the engine's signatures.

It runs in one process, or on ranks that divide the state and the tokens (sequence parallelism) or guidance branches.
`python -m tests.support.engines FOLDER` compares the signatures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from tests.support import tiny
from tests.support.sglang_network import (
    SERVER,
    AttentionBackendEnum,
    FluxTransformer2DModel,
    GroupCoordinator,
    sequence_group,
)


@dataclass
class CFGBranch:
    name: str
    is_conditional: bool
    kwargs: dict[str, Any]

    def configure_batch(self, batch: Any) -> None:
        batch.is_cfg_negative = not self.is_conditional


@dataclass
class CFGPolicy:
    branches: list[CFGBranch] = field(default_factory=list)
    parallel_uses_serial_arithmetic: bool = False

    def build(self, batch: Any, image_kwargs: Any, pos_cond_kwargs: Any, neg_cond_kwargs: Any) -> CFGPolicy:
        branches = [CFGBranch("conditional", True, {**image_kwargs, **pos_cond_kwargs})]
        if batch.do_classifier_free_guidance:
            branches.append(CFGBranch("unconditional", False, {**image_kwargs, **neg_cond_kwargs}))
        return dataclasses.replace(self, branches=branches)

    def combine(
        self, predictions: Any, batch: Any, cfg_scale: float, pipeline_config: Any, *, cfg_parallel: bool = False
    ) -> Any:
        positive, *others = predictions
        return positive if not others else others[0] + cfg_scale * (positive - others[0])


class FluxPipelineConfig:
    """The engine's configuration of FLUX.1. A token has a side of 4 pixels here, as in `tiny`."""

    embedded_cfg_scale = 3.5
    cfg_policy = CFGPolicy()

    def prepare_sigmas(self, sigmas: Any, num_inference_steps: int) -> Any:
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else sigmas

    def get_classifier_free_guidance_scale(self, batch: Any, guidance_scale: float) -> Any:
        return guidance_scale if batch.true_cfg_scale is None else batch.true_cfg_scale

    def _prepare_latent_image_ids(self, original_height: int, original_width: int, device: Any) -> Tensor:
        sides = (original_height // tiny.PIXELS_PER_TOKEN, original_width // tiny.PIXELS_PER_TOKEN)
        return tiny.ids(sides).to(device)

    def get_freqs_cis(
        self, prompt_embeds: Any, width: int, height: int, device: Any, rotary_emb: Any, batch: Any, txt_seq_lens: Any
    ) -> tuple[Tensor, ...]:
        ids = self._prepare_latent_image_ids(height, width, device)
        group = sequence_group()
        padded = torch.cat([ids, ids[-1:].expand(-len(ids) % group.world_size, -1)])
        halves = zip(
            rotary_emb.forward(torch.zeros(prompt_embeds.shape[1], 3)),
            rotary_emb.forward(padded.chunk(group.world_size)[group.rank_in_group]),
            strict=True,
        )
        return tuple(torch.cat(both) for both in halves)

    def prepare_pos_cond_kwargs(self, batch: Any, device: Any, rotary_emb: Any, dtype: Any) -> dict[str, Any]:
        return self._conditions(batch, rotary_emb, batch.prompt_embeds, batch.pooled_embeds) | batch.control

    def prepare_neg_cond_kwargs(self, batch: Any, device: Any, rotary_emb: Any, dtype: Any) -> dict[str, Any]:
        return self._conditions(batch, rotary_emb, batch.negative_prompt_embeds, batch.neg_pooled_embeds)

    def _conditions(self, batch: Any, rotary_emb: Any, embeds: Any, pooled: Any) -> dict[str, Any]:
        table = self.get_freqs_cis(embeds[1], batch.width, batch.height, "cpu", rotary_emb, batch, None)
        return {"freqs_cis": table, "pooled_projections": pooled[0], "encoder_hidden_states": embeds[1]}

    def shard_latents_for_sp(self, batch: Any, latents: Tensor) -> tuple[Tensor, bool]:
        group = sequence_group()
        padded = nn.functional.pad(latents, (0, 0, 0, -latents.shape[1] % group.world_size))
        return padded.chunk(group.world_size, dim=1)[group.rank_in_group].contiguous(), True

    def gather_latents_for_sp(self, latents: Tensor, batch: Any = None) -> Tensor:
        whole: Tensor = sequence_group().all_gather(latents, dim=1)
        return whole

    def slice_noise_pred(self, noise: Tensor, latents: Tensor) -> Tensor:
        return noise


class WanPipelineConfig(FluxPipelineConfig):
    """Another pipeline of the engine."""


@dataclass(slots=True)
class DenoisingContext:
    scheduler: Any
    extra_step_kwargs: dict[str, Any]
    target_dtype: torch.dtype
    autocast_enabled: bool
    timesteps: Tensor
    num_inference_steps: int
    num_warmup_steps: int
    image_kwargs: dict[str, Any]
    pos_cond_kwargs: dict[str, Any]
    neg_cond_kwargs: dict[str, Any]
    latents: Tensor
    boundary_timestep: float | None
    z: Tensor | None
    reserved_frames_mask: Tensor | None
    seq_len: int | None
    guidance: Tensor
    is_warmup: bool
    cfg_policy: Any = None
    trajectory_timesteps: list[Tensor] = field(default_factory=list)
    trajectory_latents: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class DenoisingStepState:
    step_index: int
    t_host: Tensor
    t_device: Tensor
    t_int: int
    current_model: Any
    current_guidance_scale: Any
    attn_metadata: Any


class DenoisingStage:
    """The engine's loop. `passed` records data of each guided network call for tests."""

    def __init__(
        self, transformer: Any, scheduler: Any, pipeline: Any = None, transformer_2: Any = None, vae: Any = None
    ) -> None:
        self.server_args = SERVER.args
        self.transformer, self.transformer_2, self.scheduler = transformer, transformer_2, scheduler
        self._cache_dit_enabled = False
        self.attn_backend = SimpleNamespace(get_enum=lambda: AttentionBackendEnum.TORCH_SDPA)
        self.passed: list[dict[str, Any]] = []

    def _sp_world_size(self) -> int:
        return sequence_group().world_size

    def _get_transformer_attr(self, name: str) -> Any:
        return getattr(self.transformer, name)

    def _prepare_denoising_loop(self, batch: Any, server_args: Any) -> DenoisingContext:
        config, scheduler = server_args.pipeline_config, self.scheduler
        batch.extra["mu"] = calculate_shift(batch.raw_latent_shape[1])
        sigmas = config.prepare_sigmas(None, batch.num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=batch.extra["mu"])
        if self._sp_world_size() > 1:
            batch.latents, batch.did_sp_shard_latents = config.shard_latents_for_sp(batch, batch.latents)
        rotary = self._get_transformer_attr("rotary_emb")
        positive = config.prepare_pos_cond_kwargs(batch, "cpu", rotary, torch.float32)
        negative = config.prepare_neg_cond_kwargs(batch, "cpu", rotary, torch.float32)
        return DenoisingContext(
            scheduler=scheduler,
            extra_step_kwargs={},
            target_dtype=next(self.transformer.parameters()).dtype,
            autocast_enabled=False,
            timesteps=scheduler.timesteps,
            num_inference_steps=batch.num_inference_steps,
            num_warmup_steps=0,
            image_kwargs={},
            pos_cond_kwargs=positive,
            neg_cond_kwargs=negative,
            latents=batch.latents,
            boundary_timestep=None,
            z=None,
            reserved_frames_mask=None,
            seq_len=None,
            guidance=torch.full((len(batch.latents),), 1000 * config.embedded_cfg_scale, dtype=batch.latents.dtype),
            is_warmup=batch.is_warmup,
            cfg_policy=config.cfg_policy.build(batch, {}, positive, negative),
        )

    def _before_denoising_loop(self, ctx: Any, batch: Any, server_args: Any) -> None:
        ctx.scheduler.set_begin_index(0)
        is_active = batch.cfg_gate_step is not None and batch.cfg_gate_step < 1.0
        ctx.extra["cfg_gate_state"] = {"fraction": batch.cfg_gate_step, "active": is_active}

    def _prepare_step_state(
        self, ctx: Any, batch: Any, server_args: Any, step_index: int, t_host: Tensor, timesteps_cpu: Tensor
    ) -> DenoisingStepState:
        return DenoisingStepState(
            step_index=step_index,
            t_host=t_host,
            t_device=ctx.timesteps[step_index],
            t_int=int(t_host),
            current_model=self.transformer,
            current_guidance_scale=batch.guidance_scale,
            attn_metadata=None,
        )

    def _run_denoising_step(self, ctx: Any, step: Any, batch: Any, server_args: Any) -> None:
        predicted = self._predict_noise_with_cfg(
            current_model=step.current_model,
            latent_model_input=ctx.latents.to(ctx.target_dtype),
            timestep=step.t_device.repeat(len(ctx.latents)),
            batch=batch,
            timestep_index=step.step_index,
            attn_metadata=step.attn_metadata,
            target_dtype=ctx.target_dtype,
            current_guidance_scale=step.current_guidance_scale,
            cfg_policy=ctx.cfg_policy,
            cfg_gate_state=ctx.extra.get("cfg_gate_state"),
            server_args=server_args,
            guidance=ctx.guidance,
            latents=ctx.latents,
        )
        ctx.latents = ctx.scheduler.step(predicted, step.t_device, ctx.latents, return_dict=False)[0]

    def _predict_noise_with_cfg(
        self,
        current_model: Any,
        latent_model_input: Tensor,
        timestep: Tensor,
        batch: Any,
        timestep_index: int,
        attn_metadata: Any,
        target_dtype: torch.dtype,
        current_guidance_scale: Any,
        cfg_policy: Any,
        cfg_gate_state: Any,
        server_args: Any,
        guidance: Tensor,
        latents: Tensor,
    ) -> Tensor:
        config = server_args.pipeline_config
        self.passed.append({"tokens": latent_model_input.shape[1], "timestep": timestep, "gate": cfg_gate_state})

        def predicted(branch: Any) -> Tensor:
            branch.configure_batch(batch)
            made = self._predict_noise(
                current_model, latent_model_input, timestep, target_dtype, guidance, **branch.kwargs
            )
            sliced: Tensor = config.slice_noise_pred(made, latents)
            return sliced

        branches, group = cfg_policy.branches, GroupCoordinator()
        if server_args.enable_cfg_parallel and len(branches) == group.world_size:
            predictions = group.all_gather(predicted(branches[group.rank_in_group]), separate_tensors=True)
        else:
            predictions = [predicted(branch) for branch in branches]
        scale = config.get_classifier_free_guidance_scale(batch, current_guidance_scale)
        combined: Tensor = cfg_policy.combine(
            predictions, batch, scale, config, cfg_parallel=server_args.enable_cfg_parallel
        )
        return combined

    def _predict_noise(
        self,
        current_model: Any,
        latent_model_input: Tensor,
        timestep: Tensor,
        target_dtype: torch.dtype,
        guidance: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        made: Tensor = current_model(hidden_states=latent_model_input, timestep=timestep, guidance=guidance, **kwargs)
        return made

    @torch.no_grad()
    def forward(self, batch: Any, server_args: Any) -> Any:
        ctx = self._prepare_denoising_loop(batch, server_args)
        self._before_denoising_loop(ctx, batch, server_args)
        timesteps = ctx.timesteps.cpu()
        for index, t_host in enumerate(timesteps):
            step = self._prepare_step_state(ctx, batch, server_args, index, t_host, timesteps)
            self._run_denoising_step(ctx, step, batch, server_args)
            ctx.trajectory_latents.append(ctx.latents)
        whole = server_args.pipeline_config.gather_latents_for_sp(ctx.latents, batch=batch)
        batch.latents = whole[:, : batch.raw_latent_shape[1]]
        batch.counted, batch.parts = ctx.num_inference_steps, [x.shape[1] for x in ctx.trajectory_latents]
        return batch


class FluxProgressiveDenoisingStage(DenoisingStage):
    """The engine's own method with fewer tokens, of which only the name is needed here."""


def served(pipe: Any, *, pipeline_config: Any = None, stage: type = DenoisingStage, **server_args: Any) -> Any:
    """Returns the engine's stage with the network and scheduler of a diffusers pipeline."""
    SERVER.args = SimpleNamespace(
        **{
            "pipeline_config": FluxPipelineConfig() if pipeline_config is None else pipeline_config,
            "enable_cfg_parallel": False,
            "enable_breakable_cuda_graph": None,
            "comfyui_mode": False,
            **server_args,
        }
    )
    return stage(FluxTransformer2DModel(pipe.transformer), pipe.scheduler)


def request_of(
    batch: int = 1, scale: float = 1.0, seed: int = 0, grid: tuple[int, int] = tiny.GRID, **given: Any
) -> SimpleNamespace:
    """Returns a request with embedded prompts, or several requests as merged by the engine."""
    from tests.support import engines  # which imports this module

    of_omni = engines.request_of(batch, scale, seed)
    latents = torch.cat([tiny.start(seed + image, grid) for image in range(batch)])
    return SimpleNamespace(
        **{
            "prompt_embeds": [None, of_omni.prompt_embeds],
            "negative_prompt_embeds": [None, of_omni.negative_prompt_embeds],
            "pooled_embeds": [of_omni.pooled_prompt_embeds],
            "neg_pooled_embeds": [of_omni.negative_pooled_prompt_embeds],
            "control": {},
            "latents": latents,
            "raw_latent_shape": latents.shape,
            "did_sp_shard_latents": False,
            "image_latent": None,
            "extra": {},
            "is_warmup": False,
            "height": grid[0] * tiny.PIXELS_PER_TOKEN,
            "width": grid[1] * tiny.PIXELS_PER_TOKEN,
            "num_inference_steps": 6,
            "guidance_scale": 3.5,
            "true_cfg_scale": scale,
            "do_classifier_free_guidance": scale > 1,
            "progressive_mode": "fullres",
            "enable_teacache": False,
            "enable_spectrum": False,
            "guidance_rescale": 0.0,
            "cfg_normalization": 0.0,
            "cfg_gate_step": None,
            "rollout": False,
            **given,
        }
    )


def cast(request: Any, network: torch.dtype, latents: torch.dtype) -> Any:
    """Returns a request with prompts in the dtype of the network and latents in another dtype."""
    for name in ("prompt_embeds", "negative_prompt_embeds", "pooled_embeds", "neg_pooled_embeds"):
        setattr(request, name, [x if x is None else x.to(network) for x in getattr(request, name)])
    request.latents = request.latents.to(latents)
    return request


def made(stage: Any, request: Any) -> Tensor:
    """Returns the latents (B, N, D) of a request after the engine's loop."""
    latents: Tensor = stage.forward(request, stage.server_args).latents
    return latents
