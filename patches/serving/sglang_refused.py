"""Settings of a request or server with which SGLang's own FLUX.1 cannot be accelerated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jitaccel.errors import ConfigError
from jitaccel.method.config import JiTConfig

from ..flux.arguments import grid_of_ids
from ..ranks import check_divided

CONDITIONS = ("freqs_cis", "pooled_projections", "encoder_hidden_states")
"""The network's arguments other than the state, its level and its embedded guidance."""
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def refused(
    stage: Any, ctx: Any, batch: Any, server_args: Any, config: JiTConfig, ids: Tensor, ranks: int
) -> list[str]:
    """Returns why a request cannot be accelerated; empty if it can. The result is the same on all ranks of a server.

    Args:
        stage: The engine's DenoisingStage.
        ctx: The engine's DenoisingContext, before the loop.
        batch: The request, or several that the engine has merged.
        server_args: Arguments of the engine.
        config: The configuration to run, including its number of steps.
        ids: (N, 3), position ids of every token.
        ranks: Number of ranks that divide the tokens.
    """
    return [*_of_server(stage, ctx, server_args), *_of_request(stage, ctx, batch), *_of_size(config, ids, ranks)]


def _of_server(stage: Any, ctx: Any, server_args: Any) -> list[str]:
    kind, attention = type(ctx.scheduler).__name__, stage.attn_backend.get_enum()
    is_stochastic = bool(getattr(ctx.scheduler.config, "stochastic_sampling", False))
    return _told(
        (kind != _SCHEDULER, f"scheduler must be {_SCHEDULER}, got {kind}; use the model's own"),
        (is_stochastic, "scheduler must not draw noise, got stochastic_sampling; leave it out"),
        (
            bool(server_args.enable_breakable_cuda_graph),
            "enable_breakable_cuda_graph must be off, got on, but a graph has a fixed number of tokens; turn it off",
        ),
        (bool(server_args.comfyui_mode), "comfyui_mode must be off, got on; use jitaccel's node for ComfyUI"),
        (attention.is_sparse, f"attention must be dense, got {attention}, which depends on positions; choose another"),
    )


def _of_request(stage: Any, ctx: Any, batch: Any) -> list[str]:
    gate = ctx.extra.get("cfg_gate_state") or {"active": False}
    others = {name for each in ctx.cfg_policy.branches for name, x in each.kwargs.items() if x is not None}
    beside = ", ".join(sorted(others.difference(CONDITIONS)))
    is_divided = stage._sp_world_size() == 1 or batch.did_sp_shard_latents
    return _told(
        (
            type(stage).__name__ != "DenoisingStage",
            f"progressive_mode must be fullres, got {batch.progressive_mode!r}; both skip tokens in early steps",
        ),
        (bool(stage._cache_dit_enabled), "cache-dit must be off, got on, which reuses earlier results; turn it off"),
        (bool(batch.enable_teacache), "enable_teacache must be False, got True; leave it out"),
        (bool(batch.enable_spectrum), "enable_spectrum must be False, got True; leave it out"),
        (
            bool(gate["active"]),
            f"cfg_gate_step must be 1, got {gate.get('fraction')}, which reuses results of other tokens; leave it out",
        ),
        (
            bool(batch.guidance_rescale),
            f"guidance_rescale must be 0, got {batch.guidance_rescale}, which needs every token; leave it out",
        ),
        (
            bool(batch.cfg_normalization),
            f"cfg_normalization must be 0, got {batch.cfg_normalization}, which needs every token; leave it out",
        ),
        (
            type(ctx.cfg_policy).__name__ != "CFGPolicy",
            f"cfg_policy must be CFGPolicy, got {type(ctx.cfg_policy).__name__}; use the model's own",
        ),
        (bool(beside), f"the network must get only the prompt, got {beside}; leave out ControlNet and images"),
        (batch.image_latent is not None, "image_latent must be None, got an image; only text to image is covered"),
        (bool(batch.rollout), "rollout must be False, got True; leave it out"),
        (not is_divided, "the state must be divided among ranks, got it whole; set enable_sequence_shard to False"),
    )


def _of_size(config: JiTConfig, ids: Tensor, ranks: int) -> list[str]:
    grid = grid_of_ids(ids, len(ids))
    try:
        check_divided(ranks, config, lambda: grid, len(ids), text_tokens=0, references=0)
        config.stage_tokens(grid, multiple=ranks)
    except ConfigError as error:
        return [str(error)]
    return []


def _told(*checks: tuple[bool, str]) -> list[str]:
    return [f"jitaccel: {text}" for is_wrong, text in checks if is_wrong]
