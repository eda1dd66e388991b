"""Samples the embedded model with a variant."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jitaccel.evaluation.comparison import Method, generate
from jitaccel.evaluation.pictures import to_bytes
from jitaccel.evaluation.scenes.captions import Claims
from jitaccel.method.pool import PooledPlan
from jitaccel.method.run import Run
from jitaccel.method.schedule import noise_levels
from jitaccel.method.steps import KnownLevels
from jitaccel.patches.diffusers_private import pack_latents, unpack_latents
from jitaccel.tokens import put_tokens_

from .network import CachedNetwork, SparseNetwork, StaleNetwork, Texts, watching
from .variant import Variant, start, words_attended

GRID, TEXT_TOKENS, SIDE_PX = (32, 32), 48, 256
PATCH = 2  # latents along a token's side
BATCH = 8


@dataclass(frozen=True)
class Bench:
    """A pipeline with encoded prompts and their noise; the noise of prompt k has the seed `seed` + k."""

    pipe: Any
    prompts: Sequence[tuple[str, Claims]]
    texts: Texts
    noise: Tensor
    seed: int

    @classmethod
    def of(cls, pipe: Any, prompts: Sequence[tuple[str, Claims]], seed: int = 0) -> Bench:
        """Encodes the prompts and draws the noise, as FluxPipeline does with one generator per picture."""
        with torch.no_grad():
            found = [pipe.encode_prompt(text, None, max_sequence_length=TEXT_TOKENS)[:2] for text, _ in prompts]
        words, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
        latents = []
        shape = (pipe.transformer.config.in_channels // 4, 2 * GRID[0], 2 * GRID[1])
        for k in range(len(prompts)):
            generator = torch.Generator().manual_seed(seed + k)
            latents.append(pack_latents(pipe, torch.randn(1, *shape, generator=generator)))
        return cls(pipe, prompts, Texts(words=words, pooled=pooled), torch.cat(latents), seed)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Pictures (P, 256, 256, 3) uint8, the cost of each, and the stage in which each token was activated, (P, 32, 32).

    `latents` (P, N, D) are the latents of the pictures, if the lab sampled them itself.
    """

    pictures: NDArray[np.uint8]
    gflop: NDArray[np.float64]
    stages: NDArray[np.int64]
    latents: NDArray[np.float32] | None = None


def sample(bench: Bench, variant: Variant, *, mixed: bool = True) -> Sampled:
    """Returns a variant's pictures for every prompt. With `mixed`, matrix products run in bfloat16 (autocast)."""
    alone = variant.stale_keys or variant.cache_threshold is not None or variant.scores is words_attended
    size = 1 if alone else BATCH
    pictures, cost, stages, latents = [], [], [], []
    for first in range(0, len(bench.prompts), size):
        chosen = slice(first, first + size)
        with torch.no_grad():
            state, activated, flops = _denoise(bench, variant, chosen, mixed)
        pictures.append(decode(bench.pipe, state))
        latents.append(state.numpy())
        stages.append(activated.unflatten(1, GRID).numpy())
        cost += [flops / len(state) / 1e9] * len(state)
    return Sampled(np.concatenate(pictures), np.array(cost), np.concatenate(stages), np.concatenate(latents))


def sample_by_pipeline(bench: Bench, method: Method, *, mixed: bool = True) -> Sampled:
    """Returns the pipeline's own pictures with a method of `jitaccel eval`, such as a rival, from the same noise."""
    bench.pipe.set_progress_bar_config(disable=True)
    call = {"height": SIDE_PX, "width": SIDE_PX, "max_sequence_length": TEXT_TOKENS, "output_type": "np"}
    pictures, cost = [], []
    for k, (text, _) in enumerate(bench.prompts):
        generator = torch.Generator().manual_seed(bench.seed + k)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            made = generate(bench.pipe, method, prompt=[text], generator=[generator], **call)
        pictures.append(to_bytes(made.pictures[0]))
        cost.append(made.flops / 1e9)
    return Sampled(np.stack(pictures), np.array(cost), np.zeros((len(pictures), *GRID), np.int64))


def _denoise(bench: Bench, variant: Variant, chosen: slice, mixed: bool) -> tuple[Tensor, Tensor, float]:
    state, texts, model = bench.noise[chosen], bench.texts.part(chosen), bench.pipe.transformer
    watches = variant.stale_keys or variant.scores is words_attended
    with watching(model, texts.words.shape[1]) if watches else nullcontext([]) as processors:
        if variant.cache_threshold is not None:
            with CachedNetwork(model, texts, GRID, mixed, variant.cache_threshold) as network:
                return *_integrate(network, variant, state, processors), network.flops
        network = (StaleNetwork if variant.stale_keys else SparseNetwork)(model, texts, GRID, mixed)
        return *_integrate(network, variant, state, processors), network.flops


def _integrate(
    network: SparseNetwork, variant: Variant, state: Tensor, processors: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Returns the final state, and the stage in which each token was activated, (B, N)."""
    levels = noise_levels(variant.config)
    clock = KnownLevels(variant.config, levels)
    run, watched = start(variant, GRID, clock.step(0), state, PATCH)
    stage = 0
    activated = torch.full(state.shape[:2], variant.config.num_stages - 1)
    if variant.scores is words_attended:
        processors[len(network.transformer.transformer_blocks) - 1].is_watched = True
    for index in range(len(levels) - 1):
        step = clock.step(index)
        state = run.enter(step, state)
        if step.stage != stage and isinstance(network, CachedNetwork):
            network.forget()
        if index == 0 or step.stage != stage:
            already = activated.gather(1, run.anchors)
            activated.scatter_(1, run.anchors, already.clamp(max=step.stage))
        stage = step.stage
        if index == 0 and variant.stale_keys:
            everything = torch.arange(state.shape[1]).expand(len(state), -1)
            velocity = network(state, everything, step.noise_level)
            run.remember(step, state, velocity)
        else:
            velocity = run.leave(step, state, network(run.show(state), _places(run), run.shown_level))
        for share in (p.words_share for p in processors if p.words_share is not None):
            assert not isinstance(run.plan, PooledPlan)
            filled = share.gather(1, run.plan.nearest)
            watched.words = put_tokens_(filled.contiguous(), share, run.anchors)
        state = state + (step.next_level - step.noise_level) * velocity
    run.check_finite()
    return state, activated


def _places(run: Run) -> Tensor:
    """Returns the indices in the grid, (B, M), of the position ids of the network's tokens."""
    return run.plan.positions if isinstance(run.plan, PooledPlan) else run.anchors


def decode(pipe: Any, state: Tensor) -> NDArray[np.uint8]:
    """Returns the pictures (B, 256, 256, 3) of final states (B, N, D)."""
    with torch.no_grad():
        latents = unpack_latents(pipe, state, SIDE_PX, SIDE_PX)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pictures = (pipe.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    return (255 * pictures.permute(0, 2, 3, 1)).round().byte().numpy()
