"""`generate_batch` for diffusers' `FluxPipeline`: requests of any size and stage share one forward per step.

The pipeline itself encodes prompts, draws noise and decodes; only its denoising loop is replaced. Requests with
options, and requests to other pipelines, run one by one.
"""

from __future__ import annotations

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

from .. import is_instance_of
from ..diffusers_private import execution_device, unpack_latents
from ..flux.flops import flux_flops
from ..flux.hooks import model_hooks
from ..flux.kinds import FLUX
from ..flux.packed import Conditions, Pack, make_pack, run_packed
from ..flux.unpackable import reasons_unpackable
from .one_by_one import Asked, check_arguments, check_unpatched, default_of, one_by_one
from .one_by_one import generate_batch as generate_one_by_one
from .outcomes import OF_THE_CALLER, Outcomes, as_exception, attempt
from .pipelines import check_text_to_image

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

_log = logging.getLogger(__name__)
_MAX_TEXT = 512  # FluxPipeline's limit of T5 tokens


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """The encoded prompt of one branch of a request: text (L, E), pooled (P,), text_ids (L, 3)."""

    text: Tensor
    pooled: Tensor
    text_ids: Tensor


@dataclass(eq=False)
class Job:
    """One running request. `state` is (1, N, D), `guidance` (1,) or None, `scale` that of true CFG."""

    request: Request
    clock: KnownLevels
    generation: Generation
    state: Tensor
    ids: Tensor
    prompts: tuple[EncodedPrompt, ...]
    guidance: Tensor | None
    scale: float
    index: int = 0
    token_steps: int = 0

    @property
    def step(self) -> Step:
        """The current step."""
        return self.clock.step(self.index)

    @property
    def run(self) -> Run:
        """The run of the method for this request."""
        return self.generation.run

    def level(self) -> Tensor:
        """Returns the stage's level (1,) as FluxPipeline passes it to the model: rounded as a timestep, divided."""
        timestep = torch.tensor([1000 * self.run.shown_level], dtype=torch.float32, device="cpu")
        return timestep.to(self.state.dtype).to(self.state.device) / 1000

    def advance(self, branches: Sequence[Tensor]) -> bool:
        """Takes an Euler step along the branches' velocities (M, D), guided first; returns whether it was the last."""
        step, generation = self.step, self.generation
        velocity = branches[0]
        if len(branches) > 1:
            velocity = branches[1] + self.scale * (branches[0] - branches[1])
        self.token_steps += self.run.num_active
        full = generation.leave(step, self.state, Answer(velocity[None]))
        change = float(np.float32(step.next_level) - np.float32(step.noise_level))  # as in diffusers' scheduler
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
    """Returns the outcome of each request; see `jitaccel.generate_batch`."""
    if not is_instance_of(pipeline, "diffusers", "FluxPipeline"):
        return generate_one_by_one(pipeline, requests, how, output_type, on_step, on_outcome)
    check_text_to_image(pipeline)
    check_unpatched(pipeline)
    forward = _forward_of(pipeline, how)
    each = dict(enumerate(requests))
    alone = {index: asked for index, asked in each.items() if asked[0].options}
    together = {index: asked for index, asked in each.items() if index not in alone}
    check_arguments(pipeline, each)
    _check_requests(pipeline, each)
    outcomes = Outcomes(on_outcome)
    _together(pipeline, together, forward, output_type, outcomes, on_step)
    if alone:
        one_by_one(pipeline, alone, how, output_type, outcomes, on_step)
    return [outcomes[index] for index in range(len(requests))]


def _together(
    pipeline: FluxPipeline,
    requests: Asked,
    forward: Forward,
    output_type: OutputType,
    outcomes: Outcomes,
    on_step: OnBatchStep | None,
) -> None:
    """Runs requests that share each forward, and stores the outcome of each."""
    with torch.no_grad():
        jobs: dict[int, Job] = {}
        for index, (request, config) in requests.items():
            job = attempt(outcomes, index, request, functools.partial(_begin, pipeline, request, config))
            if job is not None:
                jobs[index] = job
        while jobs:
            velocities = _forward_each(forward, jobs, outcomes)
            for index, branches in velocities.items():
                job = jobs[index]
                advance = functools.partial(_advance, index, job, branches, on_step)
                is_over = attempt(outcomes, index, job.request, advance)
                if is_over:
                    finish = functools.partial(_finish, pipeline, job, output_type)
                    image = attempt(outcomes, index, job.request, finish)
                    if index not in outcomes:
                        outcomes[index] = Outcome(job.request, None, job.token_steps, image)
            jobs = {index: job for index, job in jobs.items() if index not in outcomes}
    pipeline.maybe_free_model_hooks()


def _advance(index: int, job: Job, branches: Sequence[Tensor], on_step: OnBatchStep | None) -> bool:
    is_over = job.advance(branches)
    if on_step is not None:
        on_step(index, job.index, job.clock.num_steps)
    return is_over


def _check_requests(pipeline: FluxPipeline, requests: Asked) -> None:
    """Raises ConfigError, listing every problem: text beyond T5's limit, or sizes without a valid token grid.

    A size is also refused if it has too few tokens for its first stage.
    """
    unit = 2 * pipeline.vae_scale_factor
    problems = []
    for index, (request, config) in requests.items():
        where = f"generate_batch: requests[{index}]"
        if (request.max_sequence_length or 1) > _MAX_TEXT:
            problems.append(
                f"{where}: max_sequence_length must be at most {_MAX_TEXT}, got {request.max_sequence_length}; "
                f"leave it out for {_MAX_TEXT}"
            )
        sizes = size_of(pipeline, request)
        if any(size < unit or size % unit for size in sizes):
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
    scale = _or_default(pipeline, request.true_cfg_scale, "true_cfg_scale")
    has_branches = request.negative_prompt is not None and scale > 1
    texts = [request.prompt, *([request.negative_prompt] if has_branches else [])]
    length = _or_default(pipeline, request.max_sequence_length, "max_sequence_length")
    prompts = tuple(_encode(pipeline, text, length, device) for text in texts)
    model = pipeline.transformer
    generator = torch.Generator("cpu").manual_seed(request.seed)
    channels, dtype = model.config.in_channels // 4, prompts[0].text.dtype
    height, width = size_of(pipeline, request)
    state, ids = pipeline.prepare_latents(1, channels, height, width, dtype, device, generator, None)
    unit = 2 * pipeline.vae_scale_factor
    clock = KnownLevels(config, levels_of(pipeline, config, state.shape[1]))
    grid = (height // unit, width // unit)
    cost, text_tokens = functools.partial(flux_flops, model.config), len(prompts[0].text)
    generation = Generation(config, grid, clock.step(0), state, cost=cost, text_tokens=text_tokens, patch=FLUX.patch)
    guidance = None
    if model.config.guidance_embeds:
        embedded = _or_default(pipeline, request.guidance_scale, "guidance_scale")
        guidance = torch.full([1], embedded, dtype=torch.float32, device=device)
    return Job(request, clock, generation, state, ids, prompts, guidance, scale)


def size_of(pipeline: FluxPipeline, request: Request) -> tuple[int, int]:
    """Returns height and width in pixels, with the pipeline's defaults if a request does not set them."""
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    return (side if request.height is None else request.height, side if request.width is None else request.width)


def _or_default(pipeline: FluxPipeline, value: float | None, name: str) -> Any:
    return default_of(pipeline, name) if value is None else value


def _encode(pipeline: FluxPipeline, text: str | None, length: int, device: torch.device) -> EncodedPrompt:
    words, pooled, ids = pipeline.encode_prompt(
        prompt=text, prompt_2=None, device=device, num_images_per_prompt=1, max_sequence_length=length
    )
    return EncodedPrompt(words[0], pooled[0], ids)


def levels_of(pipeline: FluxPipeline, config: JiTConfig, num_tokens: int) -> tuple[float, ...]:
    """Returns the levels of a pipeline's scheduler for pictures of `num_tokens` tokens; `steps` must be a number."""
    if config.schedule != "native":
        return tuple(np.asarray(noise_levels(config), dtype=np.float32).tolist())  # as in a scheduler's tensor
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
"""Runs every branch of each job on its anchors; returns one tuple of velocities (M, D) per job."""


def _forward_of(pipeline: FluxPipeline, how: Execution) -> Forward:
    """Returns the function that runs forwards.

    Raises:
        ConfigError: If the requested attention cannot be used; raised before anything is run.
    """
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
    _log.log(level, "jitaccel: requests run one after the other, because %s", "; ".join(reasons))
    return functools.partial(_one_by_one, model)


def _forward_each(
    forward: Forward, jobs: dict[int, Job], outcomes: dict[int, Outcome]
) -> dict[int, tuple[Tensor, ...]]:
    """Returns each job's velocities from one forward. If it fails, runs each job alone, so that only one job fails."""
    try:
        return dict(zip(jobs, forward([*jobs.values()]), strict=True))
    except OF_THE_CALLER:
        raise
    except BaseException as error:
        if len(jobs) == 1:
            index, job = next(iter(jobs.items()))
            outcomes[index] = Outcome(job.request, as_exception(error))
            return {}
        what = f"{type(error).__name__}: {error}"
        _log.warning("jitaccel: the forward of %d requests failed (%s); trying each alone", len(jobs), what)
    found: dict[int, tuple[Tensor, ...]] = {}
    for index, job in jobs.items():
        found |= _forward_each(forward, {index: job}, outcomes)
    return found


class _Packed:
    """Runs all jobs packed. The pack is rebuilt when a job ends or enters a new stage."""

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
    latents = unpack_latents(pipeline, job.state, *size_of(pipeline, job.request))
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")[0]
