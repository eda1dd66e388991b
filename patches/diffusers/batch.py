"""`generate_batch` for diffusers' `FluxPipeline`: requests of any size and stage in lock step, one forward for all.

The pipeline encodes prompts, draws noise and decodes as it always does; only its denoising loop is taken over.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.attention.choice import choose_backend
from jitaccel.execution.options import Execution
from jitaccel.generation.batch import OnBatchStep, OnOutcome, Outcome, OutputType, Request
from jitaccel.generation.route import Answer, Generation
from jitaccel.method.config import JiTConfig
from jitaccel.method.run import Run
from jitaccel.method.schedule import noise_levels
from jitaccel.method.steps import KnownLevels, Step

from ..diffusers_private import execution_device, unpack_latents
from ..flux.flops import flux_flops
from ..flux.hooks import model_hooks
from ..flux.kinds import FLUX
from ..flux.packed import Conditions, Pack, make_pack, run_packed
from ..flux.unpackable import reasons_unpackable
from ..network import Result
from .hook import hook_of
from .pipelines import check_text_to_image

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

_log = logging.getLogger(__name__)
_OF_THE_CALLER = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)  # who wants all of it to end


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One branch of a request: text (L, E), pooled (P,), text_ids (L, 3)."""

    text: Tensor
    pooled: Tensor
    text_ids: Tensor


@dataclass(eq=False)
class Job:
    """One request under way. state: (1, N, D). guidance: (1,) or None."""

    request: Request
    clock: KnownLevels
    generation: Generation
    state: Tensor
    ids: Tensor
    prompts: tuple[EncodedPrompt, ...]
    guidance: Tensor | None
    index: int = 0
    token_steps: int = 0

    @property
    def step(self) -> Step:
        """The step under way."""
        return self.clock.step(self.index)

    @property
    def run(self) -> Run:
        """The run of the method."""
        return self.generation.run

    def level(self) -> Tensor:
        """Returns the stage's level (1,) as FluxPipeline hands it to the model: rounded as a timestep, then divided."""
        timestep = torch.tensor([1000 * self.run.shown_level], dtype=torch.float32, device="cpu")
        return timestep.to(self.state.dtype).to(self.state.device) / 1000

    def advance(self, branches: Sequence[Tensor]) -> bool:
        """Takes the Euler step of the branches' velocities (M, D), guided first; returns whether it was the last."""
        step, generation = self.step, self.generation
        velocity = branches[0]
        if len(branches) > 1:
            velocity = branches[1] + self.request.true_cfg_scale * (branches[0] - branches[1])
        self.token_steps += self.run.num_active
        full = generation.leave(step, self.state, Answer(velocity[None]))
        change = float(np.float32(step.next_level) - np.float32(step.noise_level))  # as a scheduler of diffusers has it
        moved = self.state.float() + change * full
        self.state = moved.to(full.dtype)
        self.index += 1
        if self.index == self.clock.num_steps:
            self.run.check_finite()
            return True
        self.state = generation.enter(self.step, self.state)
        return False


def generate_batch(
    pipeline: FluxPipeline,
    requests: Sequence[tuple[Request, JiTConfig]],
    how: Execution,
    output_type: OutputType,
    on_step: OnBatchStep | None = None,
    on_outcome: OnOutcome | None = None,
) -> list[Outcome]:
    """Returns the outcome of each request; `jitaccel.generate_batch` says what holds."""
    check_text_to_image(pipeline)
    if hook_of(pipeline.transformer) is not None:
        raise ConfigError(
            "generate_batch: target must not be patched, got a pipeline whose transformer is; "
            "remove() its handle first, requests name their presets themselves"
        )
    forward = _forward_of(pipeline, how)
    _check_sizes(pipeline, requests)
    outcomes = _Outcomes(on_outcome)
    with torch.no_grad():
        jobs: dict[int, Job] = {}
        for index, (request, config) in enumerate(requests):
            job = _attempt(outcomes, index, request, functools.partial(_begin, pipeline, request, config))
            if job is not None:
                jobs[index] = job
        while jobs:
            velocities = _forward_each(forward, jobs, outcomes)
            for index, branches in velocities.items():
                job = jobs[index]
                advance = functools.partial(_advance, index, job, branches, on_step)
                is_over = _attempt(outcomes, index, job.request, advance)
                if is_over:
                    finish = functools.partial(_finish, pipeline, job, output_type)
                    image = _attempt(outcomes, index, job.request, finish)
                    if index not in outcomes:
                        outcomes[index] = Outcome(job.request, None, job.token_steps, image)
            jobs = {index: job for index, job in jobs.items() if index not in outcomes}
    pipeline.maybe_free_model_hooks()
    return [outcomes[index] for index in range(len(requests))]


class _Outcomes(dict[int, Outcome]):
    """Outcomes by the index of their request; each is told once it is known."""

    def __init__(self, on_outcome: OnOutcome | None) -> None:
        super().__init__()
        self._on_outcome = on_outcome

    def __setitem__(self, index: int, outcome: Outcome) -> None:
        super().__setitem__(index, outcome)
        if self._on_outcome is not None:
            self._on_outcome(index, outcome)


def _advance(index: int, job: Job, branches: Sequence[Tensor], on_step: OnBatchStep | None) -> bool:
    is_over = job.advance(branches)
    if on_step is not None:
        on_step(index, job.index, job.clock.num_steps)
    return is_over


def _attempt(outcomes: dict[int, Outcome], index: int, request: Request, work: Callable[[], Result]) -> Result | None:
    """Returns what `work` returns; where it fails, its request has its outcome."""
    try:
        return work()
    except _OF_THE_CALLER:
        raise
    except BaseException as error:  # the other requests go on
        outcomes[index] = Outcome(request, _as_exception(error))
        return None


def _as_exception(error: BaseException) -> Exception:
    """Returns an error that `except Exception` catches: what panics in Rust (tokenizers) is none."""
    if isinstance(error, Exception):
        return error
    what = f"{type(error).__name__}: {error}"
    wrapped = RuntimeError(f"generate_batch: the request must be one that can be run, got {what}; change its prompt")
    wrapped.__cause__ = error
    return wrapped


def _check_sizes(pipeline: FluxPipeline, requests: Sequence[tuple[Request, JiTConfig]]) -> None:
    """Raises ConfigError with every request whose size gives no token grid, or too few tokens for its first stage."""
    unit = 2 * pipeline.vae_scale_factor
    problems = []
    for index, (request, config) in enumerate(requests):
        where = f"generate_batch: requests[{index}]"
        sizes = (request.height, request.width)
        if any(not isinstance(size, int) or size < unit or size % unit for size in sizes):
            problems.append(
                f"{where}: height and width must be multiples of {unit} pixels, got {sizes[0]}x{sizes[1]}; "
                f"round them to {max(unit, int(sizes[0]) // unit * unit)}x{max(unit, int(sizes[1]) // unit * unit)}"
            )
            continue
        try:
            config.stage_tokens((sizes[0] // unit, sizes[1] // unit))
        except ConfigError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _begin(pipeline: FluxPipeline, request: Request, config: JiTConfig) -> Job:
    device = execution_device(pipeline)
    texts = [request.prompt] + ([request.negative_prompt] if request.has_true_cfg else [])
    prompts = tuple(_encode(pipeline, text, request.max_sequence_length, device) for text in texts)
    model = pipeline.transformer
    generator = torch.Generator("cpu").manual_seed(request.seed)
    channels, dtype = model.config.in_channels // 4, prompts[0].text.dtype
    state, ids = pipeline.prepare_latents(1, channels, request.height, request.width, dtype, device, generator, None)
    unit = 2 * pipeline.vae_scale_factor
    clock = KnownLevels(config, levels_of(pipeline, config, state.shape[1]))
    grid = (request.height // unit, request.width // unit)
    cost, text_tokens = functools.partial(flux_flops, model.config), len(prompts[0].text)
    generation = Generation(config, grid, clock.step(0), state, cost=cost, text_tokens=text_tokens, patch=FLUX.patch)
    guidance = None
    if model.config.guidance_embeds:
        guidance = torch.full([1], request.guidance_scale, dtype=torch.float32, device=device)
    return Job(request, clock, generation, state, ids, prompts, guidance)


def _encode(pipeline: FluxPipeline, text: str | None, length: int, device: torch.device) -> EncodedPrompt:
    words, pooled, ids = pipeline.encode_prompt(
        prompt=text, prompt_2=None, device=device, num_images_per_prompt=1, max_sequence_length=length
    )
    return EncodedPrompt(words[0], pooled[0], ids)


def levels_of(pipeline: FluxPipeline, config: JiTConfig, num_tokens: int) -> tuple[float, ...]:
    """Returns the noise levels that a pipeline's scheduler gets for pictures of so many tokens; `steps` is a number."""
    if config.schedule != "native":
        return tuple(np.asarray(noise_levels(config), dtype=np.float32).tolist())  # as a scheduler's tensor has them
    assert config.steps != "caller"
    scheduler = copy.deepcopy(pipeline.scheduler)
    settings = scheduler.config
    mu = calculate_shift(
        num_tokens,
        settings.get("base_image_seq_len", 256),
        settings.get("max_image_seq_len", 4096),
        settings.get("base_shift", 0.5),
        settings.get("max_shift", 1.15),
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / config.steps, config.steps), mu=mu)
    return tuple(scheduler.sigmas.tolist())


Forward = Callable[[Sequence[Job]], list[tuple[Tensor, ...]]]
"""Runs every branch of each job on its anchors: one tuple of velocities (M, D) a job."""


def _forward_of(pipeline: FluxPipeline, how: Execution) -> Forward:
    """Returns how forwards run. Raises ConfigError for an attention that cannot be used, before anything is run."""
    model = pipeline.transformer
    reasons = ["execution='indexed' was asked for"] if how.execution == "indexed" else reasons_unpackable(model)
    if not reasons:
        choose_backend(how.attention, execution_device(pipeline), model.dtype, model.config.attention_head_dim)
        return _Packed(model, how)
    if how.strict and how.execution != "indexed":
        raise UnsupportedModelError(
            f"generate_batch: execution must be covered with strict=True, got {'; '.join(reasons)}; "
            f"use strict=False to run request after request"
        )
    level = logging.INFO if how.execution == "indexed" else logging.WARNING
    _log.log(level, "jitaccel: requests run one after the other, since %s", "; ".join(reasons))
    return functools.partial(_one_by_one, model)


def _forward_each(
    forward: Forward, jobs: dict[int, Job], outcomes: dict[int, Outcome]
) -> dict[int, tuple[Tensor, ...]]:
    """Returns the velocities of each job, in one forward; where that fails, of each alone, that one fails alone."""
    try:
        return dict(zip(jobs, forward([*jobs.values()]), strict=True))
    except _OF_THE_CALLER:
        raise
    except BaseException as error:
        if len(jobs) == 1:
            index, job = next(iter(jobs.items()))
            outcomes[index] = Outcome(job.request, _as_exception(error))
            return {}
        what = f"{type(error).__name__}: {error}"
        _log.warning("jitaccel: the forward of %d requests failed (%s); trying each alone", len(jobs), what)
    found: dict[int, tuple[Tensor, ...]] = {}
    for index, job in jobs.items():
        found |= _forward_each(forward, {index: job}, outcomes)
    return found


class _Packed:
    """Runs all jobs packed; the pack is made anew where a job is over or in a new stage."""

    def __init__(self, model: FluxTransformer2DModel, how: Execution) -> None:
        self._model, self._how = model, how
        self._key: tuple[Hashable, ...] = ()
        self._pack: Pack | None = None

    def __call__(self, jobs: Sequence[Job]) -> list[tuple[Tensor, ...]]:
        model, state = self._model, jobs[0].state
        attention = choose_backend(self._how.attention, state.device, state.dtype, model.config.attention_head_dim)
        each = [(job, prompt) for job in jobs for prompt in job.prompts]
        tokens = torch.cat([job.run.show(job.state)[0] for job, _ in each])
        given = Conditions(
            text=torch.cat([prompt.text for _, prompt in each]),
            pooled=torch.stack([prompt.pooled for _, prompt in each]),
            level=torch.cat([job.level() for job, _ in each]),
            guidance=None if jobs[0].guidance is None else torch.cat([job.guidance for job, _ in each]),  # type: ignore[misc]
        )
        with model_hooks(model, None, None):
            velocity = run_packed(model, self._pack_of(jobs), tokens, given, attention)
        parts = iter(velocity.split([job.run.num_active for job, _ in each]))
        return [tuple(next(parts) for _ in job.prompts) for job in jobs]

    def _pack_of(self, jobs: Sequence[Job]) -> Pack:
        key = tuple(job.run.plan for job in jobs)
        if (
            self._pack is None
            or len(key) != len(self._key)
            or any(a is not b for a, b in zip(key, self._key, strict=True))
        ):
            each = [(job, prompt) for job in jobs for prompt in job.prompts]
            text_ids = [prompt.text_ids for _, prompt in each]
            self._key, self._pack = key, make_pack(self._model, text_ids, [_ids_of(job) for job, _ in each])
        return self._pack


def _one_by_one(model: FluxTransformer2DModel, jobs: Sequence[Job]) -> list[tuple[Tensor, ...]]:
    return [tuple(_alone(model, job, prompt) for prompt in job.prompts) for job in jobs]


def _alone(model: FluxTransformer2DModel, job: Job, prompt: EncodedPrompt) -> Tensor:
    velocity: Tensor = model(
        hidden_states=job.run.show(job.state),
        encoder_hidden_states=prompt.text[None],
        pooled_projections=prompt.pooled[None],
        timestep=job.level(),
        img_ids=_ids_of(job),
        txt_ids=prompt.text_ids,
        guidance=job.guidance,
        return_dict=False,
    )[0]
    return velocity[0]


def _ids_of(job: Job) -> Tensor:
    return job.ids if job.run.is_dense else job.ids[job.run.plan.positions[0]]


def _finish(pipeline: FluxPipeline, job: Job, output_type: OutputType) -> Any:
    if output_type == "latent":
        return job.state[0]
    vae = pipeline.vae
    latents = unpack_latents(pipeline, job.state, job.request.height, job.request.width)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")[0]
