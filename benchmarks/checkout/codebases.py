"""Measures the gain of 7x in every codebase, for the same generation, against its gain in diffusers' pipeline.

All use the same weights and noise. Dense runs do not involve jitaccel. Black Forest Labs' network and ComfyUI are the
stand-ins in tests/, because their packages are not on any index: loops and calls match those codebases, but the times
of their networks do not. Each sparse result is compared with the pipeline's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import jitaccel
from jitaccel.generation.stopwatch import wait_for

from ..cases.denoise import no_embedded
from ..pipelines import FLUX_QUARTER, Subject, embedded_subject, random_subject
from ..registry import Case, Measurement, Options, percentiles

_GUIDANCE, _STEPS = 3.5, 50


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of every codebase: noise (1, N, D), text (1, T, width), pooled (1, width), ids (N, 3)."""

    pipe: Any
    grid: tuple[int, int]
    noise: Tensor
    text: Tensor
    pooled: Tensor
    ids: Tensor

    @property
    def guidance(self) -> Tensor | None:
        if not self.pipe.transformer.config.guidance_embeds:
            return None
        return torch.full((1,), _GUIDANCE, device=self.noise.device, dtype=self.noise.dtype)

    @property
    def text_ids(self) -> Tensor:
        return self.ids.new_zeros(self.text.shape[1], 3)


Generate = Callable[[Sequence[float]], Tensor]
"""Maps noise levels, 0 included, to the final latents (1, N, D)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A codebase: the `target` to patch, a function to `generate`, and the `options` of `apply` from the levels."""

    target: Any
    generate: Generate
    options: Callable[[Sequence[float]], Mapping[str, Any]] = lambda levels: {"noise_levels": levels}


def _pipeline(inputs: Inputs, **options: Any) -> Setup:
    def generate(levels: Sequence[float]) -> Tensor:
        latents: Tensor = inputs.pipe(
            prompt_embeds=inputs.text,
            pooled_prompt_embeds=inputs.pooled,
            latents=inputs.noise,
            guidance_scale=_GUIDANCE,
            num_inference_steps=len(levels) - 1,
            height=inputs.grid[0] * 2 * inputs.pipe.vae_scale_factor,
            width=inputs.grid[1] * 2 * inputs.pipe.vae_scale_factor,
            output_type="latent",
        ).images
        return latents

    return Setup(target=inputs.pipe, generate=generate, options=lambda levels: options)


def _loop(velocity: Callable[[Tensor, Tensor], Tensor], state: Tensor, levels: Sequence[float]) -> Tensor:
    for level, after in pairwise(levels):
        state = state + (after - level) * velocity(state, torch.full((1,), level, device=state.device))
    return state


def _transformer(inputs: Inputs) -> Setup:
    model = inputs.pipe.transformer

    def velocity(state: Tensor, level: Tensor) -> Tensor:
        answer: Tensor = model(
            hidden_states=state,
            encoder_hidden_states=inputs.text,
            pooled_projections=inputs.pooled,
            timestep=level.to(state.dtype),
            img_ids=inputs.ids,
            txt_ids=inputs.text_ids,
            guidance=inputs.guidance,
            return_dict=False,
        )[0]
        return answer

    return Setup(target=model, generate=lambda levels: _loop(velocity, inputs.noise, levels))


def _bfl(inputs: Inputs) -> Setup:
    from tests.support.bfl_model import flux_of

    model = flux_of(inputs.pipe.transformer).to(inputs.noise.device, inputs.noise.dtype)

    def velocity(state: Tensor, level: Tensor) -> Tensor:
        answer: Tensor = model(
            img=state,
            img_ids=inputs.ids[None],
            txt=inputs.text,
            txt_ids=inputs.text_ids[None],
            timesteps=level.to(state.dtype),
            y=inputs.pooled,
            guidance=inputs.guidance,
        )
        return answer

    return Setup(target=model, generate=lambda levels: _loop(velocity, inputs.noise, levels))


def _comfyui(inputs: Inputs) -> Setup:
    from jitaccel.patches.layout import to_picture, to_tokens
    from tests.support import comfy_stand_in as comfy

    config = inputs.pipe.transformer.config
    model = comfy.Flux(inputs.pipe.transformer, patch_size=2, channels=config.in_channels // 4).eval()
    patcher = comfy.ModelPatcher(comfy.BaseModel(model, inputs.noise.dtype))
    given = {"context": inputs.text, "y": inputs.pooled}
    if inputs.guidance is not None:
        given["guidance"] = inputs.guidance
    noise = to_picture(inputs.noise.float(), inputs.grid, 2, (2 * inputs.grid[0], 2 * inputs.grid[1]))

    def generate(levels: Sequence[float]) -> Tensor:
        sigmas = torch.tensor(levels, dtype=torch.float32, device=noise.device)
        return to_tokens(comfy.CFGGuider(patcher, {"positive": [given]}).sample(noise, comfy.KSAMPLER(), sigmas), 2)

    return Setup(target=patcher, generate=generate, options=lambda levels: {})


WAYS: Mapping[str, Callable[[Inputs], Setup]] = {
    "diffusers pipeline": _pipeline,
    "diffusers pipeline, indexed": functools.partial(_pipeline, execution="indexed"),
    "diffusers transformer in a loop": _transformer,
    "Black Forest Labs' Flux in a loop": _bfl,
    "ComfyUI": _comfyui,
}


@dataclass
class _Measured:
    way: Setup
    dense: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    latents: Tensor | None = None


@torch.no_grad()
def measure(options: Options, make: Callable[[Options], Subject], timed_steps: int) -> Iterator[Measurement]:
    """Yields one row for each codebase: its median dense time divided by its median sparse time."""
    import pytest

    from tests.support import comfy_stand_in

    subject = make(options)
    inputs = _inputs(subject, options)
    levels = jitaccel.noise_levels(jitaccel.PRESETS["7x"])
    few = [1.0 - k / timed_steps for k in range(timed_steps + 1)]
    ways = {name: _Measured(prepare(inputs)) for name, prepare in WAYS.items()}
    with pytest.MonkeyPatch.context() as patch, tqdm(total=(1 + options.repeat) * len(ways), leave=False) as bar:
        comfy_stand_in.install(patch)
        for turn in range(1 + options.repeat):  # the first warms up
            for name, measured in ways.items():
                bar.set_description(name)
                dense, _ = _timed(measured.way.generate, few, options.device)
                with jitaccel.apply(measured.way.target, "7x", **measured.way.options(levels)):
                    sparse, measured.latents = _timed(measured.way.generate, levels, options.device)
                if turn > 0:
                    measured.dense.append(dense * _STEPS / timed_steps)
                    measured.sparse.append(sparse)
                bar.update()
    reference = ways["diffusers pipeline"]
    for name, measured in ways.items():
        yield _row(name, measured, reference, subject, options, timed_steps)


def _timed(generate: Generate, levels: Sequence[float], device: torch.device) -> tuple[float, Tensor]:
    wait_for(device)
    start = time.perf_counter()
    latents = generate(levels)
    wait_for(device)
    return time.perf_counter() - start, latents


def _inputs(subject: Subject, options: Options) -> Inputs:
    pipe, call = subject.pipe, subject.call
    if "prompt_embeds" in call:
        text, pooled = call["prompt_embeds"], call["pooled_prompt_embeds"]
    else:
        text, pooled, _ = pipe.encode_prompt(
            prompt=call["prompt"], prompt_2=None, max_sequence_length=subject.text_tokens
        )
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in subject.grid), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    shape = (1, subject.grid[0] * subject.grid[1], pipe.transformer.config.in_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    return Inputs(
        pipe=pipe,
        grid=subject.grid,
        noise=noise.to(text.device, text.dtype),
        text=text,
        pooled=pooled,
        ids=ids.to(text.device, text.dtype),
    )


def _row(
    name: str, measured: _Measured, reference: _Measured, subject: Subject, options: Options, timed_steps: int
) -> Measurement:
    (median, low, high), dense = percentiles(measured.sparse), percentiles(measured.dense)[0]
    ratio = dense / median
    of_reference = percentiles(reference.dense)[0] / percentiles(reference.sparse)[0]
    assert measured.latents is not None and reference.latents is not None
    difference = (measured.latents.float() - reference.latents.float()).abs().max()
    fields: dict[str, Any] = {
        "method": "7x",
        "way": name,
        "steps": jitaccel.PRESETS["7x"].steps,
        "timed_steps": timed_steps,
        "batch": 1,
        "grid": subject.grid,
        "text_tokens": subject.text_tokens,
        "dtype": str(subject.pipe.transformer.dtype).removeprefix("torch."),
        "seed": options.seed,
        "repeats": options.repeat,
        "denoise_median_s": round(median, 5),
        "denoise_p20_s": round(low, 5),
        "denoise_p80_s": round(high, 5),
        "dense_50_s": round(dense, 5),
        "speedup_to_dense": round(ratio, 3),
        "speedup_over_pipelines": round(ratio / of_reference, 4),
        "difference_to_pipeline": float(difference / reference.latents.float().abs().max()),
    }
    line = (
        f"{name:34}{median:8.3f} s ({low:.3f} to {high:.3f})  dense 50 {dense:8.3f} s  {ratio:5.2f}x  "
        f"{ratio / of_reference:.3f} of the pipeline's  differs by {fields['difference_to_pipeline']:.1e}"
    )
    return Measurement(line=line, fields=fields)


def _embedded(options: Options) -> Subject:
    return embedded_subject(options.device, (32, 32), options.seed)


def _quarter(options: Options) -> Subject:
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    return random_subject(FLUX_QUARTER, options.device, dtype, (64, 64), options.seed, text_tokens=128)


CASES: tuple[Case, ...] = (
    Case(
        group="codebases",
        size="small",
        name="embedded model, 32x32 tokens",
        run=functools.partial(measure, make=_embedded, timed_steps=10),
        why_not=no_embedded,
    ),
    Case(
        group="codebases",
        size="large",
        name="random transformer of width 768 and 3 blocks, 64x64 tokens",
        run=functools.partial(measure, make=_quarter, timed_steps=3),
        why_not=lambda options: None,
    ),
)
