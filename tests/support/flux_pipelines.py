"""The expected results of a tiny FluxPipeline, from the reference, and the attributes `jitaccel.apply` might change."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import jitaccel
from jitaccel import JiTConfig
from tests.support import reference, tiny
from tests.support.tiny import GRID, generate

GUIDED: dict[str, Any] = {"negative_prompt": "blue square", "true_cfg_scale": 3.0}


def velocity_of(pipe: Any, prompt: str = "a red circle", scale: float = 1.0, grid: tuple[int, int] = GRID) -> Any:
    """Returns the network as the reference calls it: one image, guided by `GUIDED` if `scale` is above 1."""
    text = [prompt] if scale == 1.0 else [prompt, GUIDED["negative_prompt"]]
    encoded = [pipe.encode_prompt(each, None, max_sequence_length=tiny.TEXT_TOKENS) for each in text]
    positions = tiny.ids(grid)

    def run(tokens: Tensor, anchors: Tensor, level: float) -> Tensor:
        branches = [
            pipe.transformer(
                hidden_states=tokens,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([level * 1000.0]) / 1000.0,
                img_ids=positions[anchors],
                txt_ids=text_ids,
                guidance=torch.tensor([3.5]),
                return_dict=False,
            )[0]
            for embeds, pooled, text_ids in encoded
        ]
        guided: Tensor = branches[0]
        return guided if scale == 1.0 else branches[1] + scale * (branches[0] - branches[1])

    return run


def expected(pipe: Any, config: JiTConfig, seed: int = 0, grid: tuple[int, int] = GRID, **kwargs: Any) -> Tensor:
    """Returns the reference's result with an unpatched pipeline's network."""
    edit = kwargs.pop("edit", lambda state: state)
    levels = jitaccel.noise_levels(config)
    with torch.no_grad():
        network = velocity_of(pipe, grid=grid, **kwargs)
        return reference.denoise(network, config, grid, noise_of(pipe, seed, grid), levels, edit=edit).states[-1]


def noise_of(pipe: Any, seed: int, grid: tuple[int, int] = GRID) -> Tensor:
    """Returns the packed noise that the pipeline draws from a seed."""
    height, width = (2 * side for side in grid)
    noise = torch.randn(1, tiny.CHANNELS // 4, height, width, generator=torch.Generator().manual_seed(seed))
    packed: Tensor = FluxPipeline._pack_latents(noise, 1, tiny.CHANNELS // 4, height, width)
    return packed


def attributes(pipe: Any) -> dict[str, Any]:
    """Returns all attributes of the pipeline's parts and of the modules in them, by name."""
    parts: dict[str, Any] = {"pipe": pipe, "scheduler": pipe.scheduler}
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        parts |= {f"{name}.{path}": module for path, module in getattr(pipe, name).named_modules()}
    return {f"{part}:{name}": value for part, owner in parts.items() for name, value in vars(owner).items()}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    missing = object()
    return [k for k in before.keys() | after.keys() if before.get(k, missing) is not after.get(k, missing)]


def signatures(pipe: Any) -> list[inspect.Signature]:
    methods = (pipe.transformer.forward, pipe.scheduler.set_timesteps, pipe.scheduler.step, pipe.__call__)
    return [inspect.signature(method) for method in methods]


def in_bfloat16(pipe: Any) -> Any:
    """Returns a copy in bfloat16; a copy because tests share parts."""
    parts: dict[str, Any] = {k: part for k, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return tiny.pipeline(**copy.deepcopy(parts)).to(torch.bfloat16)


class Breaks(RuntimeError):
    pass


class BreakingScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """A scheduler that fails at a given step."""

    breaks_at = -1

    def step(self, *args: Any, **kwargs: Any) -> Any:
        if (self.step_index or 0) == self.breaks_at:
            raise Breaks
        return super().step(*args, **kwargs)


def abort(pipe: Any, where: str, step: int) -> None:
    """Runs a generation that fails at a step in one of three places."""
    calls = iter(range(100))

    def fail(*_: Any) -> dict[str, Any]:
        if next(calls) == step:
            raise Breaks
        return {}

    if where == "scheduler":
        pipe.scheduler.breaks_at = step
    hook = None
    if where == "transformer":
        hook = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: fail() or None)
    with pytest.raises(Breaks):
        generate(pipe, seed=3, callback_on_step_end=fail if where == "callback" else None)
    if hook is not None:
        hook.remove()
    if where == "scheduler":
        del pipe.scheduler.breaks_at


# Pipelines that share parts


def sharing(pipe: Any, *, scheduler: bool = False) -> Any:
    """Returns another pipeline of the same parts, with the same scheduler or its own."""
    return tiny.pipeline(**{**pipe.components, **({} if scheduler else {"scheduler": tiny.scheduler()})})
