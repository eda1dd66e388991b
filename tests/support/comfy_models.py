"""Tiny models for the stand-in of ComfyUI, and one sampling of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import jitaccel
from jitaccel.patches.layout import to_picture, to_tokens
from tests.support import tiny
from tests.support.comfy_stand_in import KSAMPLER, BaseModel, CFGGuider, Flux, ModelPatcher
from tests.support.models import flux2_transformer, noise
from tests.support.reference import denoise
from tests.support.tiny import CHANNELS, GRID, SHORT, TEXT_TOKENS, WIDTH

LEVELS = torch.tensor(jitaccel.noise_levels(SHORT))
SIZE = (2 * GRID[0], 2 * GRID[1])


def flux1(extra: int = 0) -> Flux:
    """Returns a FLUX.1 with patches of 2 x 2 of 4 channels, and `extra` further channels per token."""
    inner = tiny.transformer(in_channels=CHANNELS + extra, out_channels=CHANNELS)
    return Flux(inner, patch_size=2, channels=CHANNELS // 4).eval()


def flux2() -> Flux:
    """Returns a FLUX.2 with patches of one, four axes of ids, and no pooled text."""
    return Flux(flux2_transformer(), patch_size=1, channels=CHANNELS, global_modulation=True).eval()


def condition(seed: int = 1, model: Any = None) -> dict[str, Any]:
    given = {"context": noise(seed, 1, TEXT_TOKENS, WIDTH), "guidance": torch.tensor([3.5])}
    return given if model is not None and model.axes == 4 else {**given, "y": noise(seed + 1, 1, WIDTH)}


def start(model: Any, seed: int = 0, batch: int = 1) -> Tensor:
    patch = model.patch_size
    return noise(seed, batch, CHANNELS // patch**2, GRID[0] * patch, GRID[1] * patch)


@contextmanager
def applied(model: Any, *given: Any, **more: Any) -> Iterator[jitaccel.Handle]:
    """Applies to a patcher and keeps it alive within this context, because a handle does not."""
    patcher = ModelPatcher(BaseModel(model))
    with jitaccel.apply(patcher, *given, **more) as handle:
        yield handle


def sample(patcher: Any, x: Tensor, levels: Tensor = LEVELS, *, sampler: Any = None, **more: Any) -> Tensor:
    """Runs one sampling; `more` has further arguments of the guider and its `sample`."""
    guider = {name: more.pop(name) for name in ("conds", "cfg", "in_turn") if name in more}
    guider.setdefault("conds", {"positive": [condition(model=patcher.model.diffusion_model)]})
    kind = more.pop("guider", CFGGuider)
    return kind(patcher, **guider).sample(x, sampler or KSAMPLER(), levels, **more)


def by_hand(model: Any, x: Tensor, velocity_of: Any) -> Tensor:
    """Runs the method with calls of the model on tokens gathered by hand."""
    state = to_tokens(x, model.patch_size)
    with torch.no_grad():
        final = denoise(velocity_of, SHORT, GRID, state, LEVELS.tolist()).states[-1]
    return to_picture(final, GRID, model.patch_size, x.shape[2:])


def on_tokens(model: Any, given: dict[str, Any]) -> Any:
    ids = model.process_img(start(model))[1]

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        return model.forward_orig(
            tokens, ids[:, at], given["context"], torch.zeros(1, TEXT_TOKENS, model.axes), torch.tensor([level]),
            given.get("y"), given["guidance"],
        )  # fmt: skip

    return velocity
