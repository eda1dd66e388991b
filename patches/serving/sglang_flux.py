"""SGLang-Diffusion's own FLUX.1 pipeline: hooks around its denoising stage. **Not run on the engine.**

Written for sglang 0.5.23, from its source code (docs/engines.md). The engine divides the state among ranks before its
loop. Here each rank gathers the whole state once and keeps it, so that all ranks make the same decisions. Each rank
gives the network its part of the anchors. The guided velocity is then gathered again, so that ranks stay bitwise equal.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.generation.ranks import ALONE, Ranks, begun_alike, eight_bytes
from jitaccel.generation.route import Answer
from jitaccel.method.config import JiTConfig
from jitaccel.method.lift import LiftPlan
from jitaccel.method.pool import PooledPlan
from jitaccel.method.run import Run

from .flux_loop import FluxLoop, config_of, own_levels
from .sglang_refused import refused

STAGE = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage"
PIPELINE = "FluxPipelineConfig"
_KEY = "jitaccel"  # key of the request's generation in the engine's `ctx.extra`
_log = logging.getLogger(__name__)


def around_init(settings: Mapping[str, Any], original: Callable[..., None], stage: Any, *args: Any, **kw: Any) -> None:
    """Initialises the engine's DenoisingStage, and logs whether its pipeline is accelerated.

    Args:
        settings: Arguments of `jitaccel.apply`.
        original: The engine's `__init__`.
        stage: The DenoisingStage to initialise.
        *args: The engine's positional arguments.
        **kw: The engine's keyword arguments.

    Raises:
        ConfigError: If no pipeline could have these settings; the engine then does not start.
    """
    original(stage, *args, **kw)
    config, pipeline = config_of(settings), type(stage.server_args.pipeline_config).__name__
    if pipeline != PIPELINE:
        _log.error("jitaccel: SGLang runs dense, because only FLUX.1 of its pipelines is supported, got %s", pipeline)
    elif type(stage).__name__ == "DenoisingStage":  # stages of other modes refuse every request
        _log.warning("jitaccel: SGLang's FLUX.1 is accelerated, %s", config)


def around_beginning(
    settings: Mapping[str, Any], original: Callable[..., None], stage: Any, ctx: Any, batch: Any, server_args: Any
) -> None:
    """Prepares the engine's loop, with our steps and levels instead of the request's. Warm-up requests stay dense.

    Args:
        settings: Arguments of `jitaccel.apply`. With `strict`, a refusal is raised on every rank.
        original: The engine's `_before_denoising_loop`.
        stage: The engine's DenoisingStage.
        ctx: The engine's DenoisingContext.
        batch: The request.
        server_args: Arguments of the engine.

    Raises:
        ConfigError: On every rank, if the ranks start differently.
        UnsupportedModelError: With `strict`, if the request is refused.
    """
    original(stage, ctx, batch, server_args)
    if ctx.is_warmup or type(server_args.pipeline_config).__name__ != PIPELINE:
        return
    ranks, device = _replica(), ctx.latents.device

    def wanted() -> _Wanted:
        ids = server_args.pipeline_config._prepare_latent_image_ids(batch.height, batch.width, device)
        size, asked = stage._sp_world_size(), config_of(settings)
        try:
            config = asked.replace(steps=len(ctx.timesteps)) if asked.steps == "caller" else asked
        except ConfigError as error:
            return _Wanted(asked, ids, [str(error)])
        return _Wanted(config, ids, refused(stage, ctx, batch, server_args, config, ids, size))

    # Exchanged before anything is gathered, so that a rank that refuses or fails does not leave others waiting.
    found = begun_alike(ranks, device, wanted, lambda found: eight_bytes(found.problems, found.config))
    if not found.problems:
        ctx.extra[_KEY] = _begun(stage, ctx, batch, server_args, found, ranks)
        return
    said = "\n".join(found.problems)
    if settings.get("strict"):
        raise UnsupportedModelError(said)
    _log.error("jitaccel: SGLang runs this request dense, because %s", said)


def around_step(original: Callable[..., None], stage: Any, ctx: Any, step: Any, batch: Any, server_args: Any) -> None:
    """Makes one step of the engine's loop: an accelerated one if the request began so, otherwise the engine's.

    Args:
        original: The engine's `_run_denoising_step`.
        stage: The engine's DenoisingStage.
        ctx: The engine's DenoisingContext; `latents` is this rank's part of the state, padded as in the engine.
        step: The engine's DenoisingStepState.
        batch: The request.
        server_args: Arguments of the engine.
    """
    begun: _Begun | None = ctx.extra.get(_KEY)
    if begun is None:
        original(stage, ctx, step, batch, server_args)
        return
    branches = ctx.cfg_policy.branches

    def network(run: Run, state: Tensor) -> Answer:
        shown = run.show(state)
        rows = [slice(None)] if run.has_shared_anchors else [slice(row, row + 1) for row in range(len(shown))]
        return Answer(torch.cat([velocity(run, shown[row], row) for row in rows]).to(state.dtype))

    def velocity(run: Run, shown: Tensor, row: slice) -> Tensor:
        own = begun.part(shown, dim=1)
        level = step.t_device if run.factor == 1 else torch.full_like(step.t_device, 1000 * run.shown_level)
        changed = [dataclasses.replace(branch, kwargs=begun.conditions(run, branch.kwargs, row)) for branch in branches]
        predicted = stage._predict_noise_with_cfg(
            current_model=step.current_model,
            latent_model_input=own.to(ctx.target_dtype),
            timestep=level.repeat(len(own)),
            batch=batch,
            timestep_index=step.step_index,
            attn_metadata=step.attn_metadata,
            target_dtype=ctx.target_dtype,
            current_guidance_scale=step.current_guidance_scale,
            cfg_policy=dataclasses.replace(ctx.cfg_policy, branches=changed),
            cfg_gate_state=None,
            server_args=server_args,
            guidance=None if ctx.guidance is None else _rows(ctx.guidance, row),
            latents=own,
        )
        return _gathered(server_args, batch, begun.ranks, predicted)

    state = begun.loop.advance(step.step_index, network, len(branches))
    ctx.latents = state if begun.ranks == 1 else server_args.pipeline_config.shard_latents_for_sp(batch, state)[0]
    if step.step_index == len(ctx.timesteps) - 1:
        shown = begun.loop.tokens()
        _log.info("jitaccel: %d steps, image tokens %s", len(shown), shown)


class _Wanted(NamedTuple):
    """What to run for a request: position ids (N, 3) of every token, and reasons against acceleration."""

    config: JiTConfig
    ids: Tensor
    problems: list[str]


class _Begun:
    """One request's generation and its network inputs in a stage, on `rank` of `ranks`, which divide the tokens."""

    def __init__(self, loop: FluxLoop, ids: Tensor, rotary: Callable[..., Any], rank: int, ranks: int) -> None:
        self.loop, self.ranks = loop, ranks
        self._ids, self._rotary, self._rank = ids, rotary, rank
        self._plan: LiftPlan | PooledPlan | None = None
        self._tables: dict[int | None, tuple[Tensor, Tensor]] = {}

    def part(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's part of a tensor with the anchors along `dim`; the ranks divide their number evenly."""
        return x.chunk(self.ranks, dim=dim)[self._rank]

    def conditions(self, run: Run, kwargs: Mapping[str, Any], row: slice) -> dict[str, Any]:
        """Returns a branch's network arguments for some rows of the batch, with the stage's positions."""
        text = kwargs["encoder_hidden_states"].shape[1]
        halves = zip(kwargs["freqs_cis"], self._table(run, row), strict=True)
        joined = [torch.cat([whole[:text], own]) for whole, own in halves]
        others = {name: x if x is None else _rows(x, row) for name, x in kwargs.items() if name != "freqs_cis"}
        return {**others, "freqs_cis": tuple(joined)}

    def _table(self, run: Run, row: slice) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine (M / ranks, C) for the anchors of one row or of all rows; computed once per stage."""
        if self._plan is not run.plan:
            self._plan, self._tables = run.plan, {}
        if row.start not in self._tables:
            positions = run.plan.positions[row][0]
            cosine, sine = self._rotary(self._ids[self.part(positions, dim=0)])
            self._tables[row.start] = (cosine.to(self._ids.device), sine.to(self._ids.device))
        return self._tables[row.start]


def _begun(stage: Any, ctx: Any, batch: Any, server_args: Any, wanted: _Wanted, ranks: Ranks) -> _Begun:
    """Returns a request's generation from its whole state, and sets the number of steps in the engine's loop."""
    config, ids = wanted.config, wanted.ids
    levels = _levels(ctx, batch, server_args, config)
    size = stage._sp_world_size()
    state = _gathered(server_args, batch, size, ctx.latents)[:, : len(ids)].contiguous()
    text_tokens = ctx.cfg_policy.branches[0].kwargs["encoder_hidden_states"].shape[1]
    loop = FluxLoop(config, levels, state, ids, text_tokens, multiple=size, ranks=ranks)
    return _Begun(loop, ids, stage._get_transformer_attr("rotary_emb").forward, _rank(size), size)


def _levels(ctx: Any, batch: Any, server_args: Any, config: JiTConfig) -> tuple[float, ...]:
    """Returns the noise levels, the final 0 included, and sets the timesteps of the engine's loop."""
    levels, steps = own_levels(config), config.steps
    assert isinstance(steps, int)
    if levels is not None:
        ctx.timesteps = torch.tensor([1000 * level for level in levels[:-1]]).to(ctx.timesteps)
    elif len(ctx.timesteps) != steps:
        shift = {"mu": batch.extra["mu"]} if "mu" in batch.extra else {}
        sigmas = server_args.pipeline_config.prepare_sigmas(None, steps)
        ctx.scheduler.set_timesteps(sigmas=sigmas, device=ctx.timesteps.device, **shift)
        ctx.timesteps = ctx.scheduler.timesteps
    ctx.num_inference_steps, ctx.num_warmup_steps = steps, 0
    return tuple(ctx.scheduler.sigmas.tolist()) if levels is None else levels


def _gathered(server_args: Any, batch: Any, ranks: int, x: Tensor) -> Tensor:
    """Returns all ranks' parts (B, M / ranks, D), joined in rank order, (B, M, D)."""
    whole: Tensor = x if ranks == 1 else server_args.pipeline_config.gather_latents_for_sp(x, batch=batch)
    return whole


def _rows(x: Tensor, row: slice) -> Tensor:
    """Returns rows of the batch of `x`; a single row serves every image."""
    return x[row] if x.shape[0] > 1 else x


def _replica() -> Ranks:
    """Returns all processes that serve one request together, however they divide the work."""
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return ALONE
    group = parallel_state.get_replica_group()
    return ALONE if group.world_size == 1 else Ranks(group.world_size, group.device_group)


def _rank(ranks: int) -> int:
    """Returns the index of this process among the ranks that divide the tokens."""
    if ranks == 1:
        return 0
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    rank: int = parallel_state.get_sp_parallel_rank()
    return rank
