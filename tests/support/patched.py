"""A target for every registered patch, including the tutorial's, and one picture from each."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jitaccel
from jitaccel import patches
from tests.support import comfy_models, tiny
from tests.support import comfy_stand_in as comfy
from tests.support.comfy_stand_in import BaseModel, ModelPatcher
from tests.support.every_model import CASES as MODELS
from tests.support.every_model import wan_transformer
from tests.support.models import chroma_transformer, flux2_transformer, noise
from tests.support.pipelines import chroma_pipeline, flux2_pipeline
from tests.support.subjects import SUBJECTS
from tests.support.tiny import CHANNELS, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH
from tests.support.video import generate as wan_generate
from tests.support.video import wan_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
LEVELS = jitaccel.noise_levels(SHORT)


@dataclass(frozen=True)
class Case:
    """A target of one patch.

    Attributes:
        patch: The index of the patch in the registry.
        make: Returns a new target.
        generate: Returns a picture from a target and a seed.
        parts: Returns the modules that hold its weights.
    """

    patch: str
    make: Callable[[], Any]
    generate: Callable[[Any, int], Tensor]
    parts: Callable[[Any], list[nn.Module]] = lambda target: [target]


@functools.cache
def _tutorial() -> tuple[type[nn.Module], patches.Patch]:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(next(block for block in blocks if "class Toy" in block), names)
    return names["Toy"], patches._REGISTERED[0]


def _toy() -> Any:
    kind, patch = _tutorial()
    patches.register(patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def _bfl() -> Any:
    from tests.support.bfl_wrapped import Flux

    return Flux().eval()


def _comfy() -> Any:
    model = comfy.Flux(tiny.transformer(), patch_size=2, channels=CHANNELS // 4).eval()
    return ModelPatcher(BaseModel(model))


def _by_pipeline(**call: Any) -> Callable[[Any, int], Tensor]:
    side = 4 * tiny.GRID[0]
    settings = {"height": side, "width": side, "num_inference_steps": 5, "output_type": "latent", **call}

    def generate(pipe: Any, seed: int) -> Tensor:
        latents: Tensor = pipe(**settings, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]
        return latents

    return generate


def _by_loop(name: str) -> Callable[[Any, int], Tensor]:
    """Returns the named subject's loop, with the target in place of its model."""

    @torch.no_grad()
    def generate(model: Any, seed: int) -> Tensor:
        return replace(_subject(name), model=model).loop(tiny.start(seed))

    return generate


@functools.cache
def _subject(name: str) -> Any:
    return SUBJECTS[name]()


@torch.no_grad()
def _wan_loop(model: Any, seed: int) -> Tensor:
    grid = (3, 4, 4)
    given = MODELS["WanTransformer3DModel"].call(grid, 1)
    state = noise(seed, *given.pop("hidden_states").shape)
    for level, after in itertools.pairwise(LEVELS):
        given["timestep"] = torch.full((1,), 1000.0 * level)
        state = state + (after - level) * model(hidden_states=state, **given, return_dict=False)[0]
    return state


@torch.no_grad()
def _bfl_loop(model: Any, seed: int) -> Tensor:
    img = tiny.start(seed)
    given = {
        "img_ids": tiny.ids()[None], "txt": noise(1, 1, TEXT_TOKENS, WIDTH), "txt_ids": torch.zeros(1, TEXT_TOKENS, 3),
        "y": noise(2, 1, WIDTH), "guidance": torch.full((1,), 3.5),
    }  # fmt: skip
    for level, after in itertools.pairwise(LEVELS):
        img = img + (after - level) * model(img=img, timesteps=torch.full((1,), level), **given)
    return img


def _comfy_sampling(patcher: Any, seed: int) -> Tensor:
    return comfy_models.sample(patcher, comfy_models.start(patcher.model.diffusion_model, seed))


@torch.no_grad()
def _toy_loop(model: Any, seed: int) -> Tensor:
    state = noise(seed, 1, NUM_TOKENS, 4)
    for level, after in itertools.pairwise(LEVELS):
        state = state + (after - level) * model(state, tiny.ids(), torch.full((1,), level))
    return state


_EMBEDS = {"prompt_embeds": noise(1, 1, TEXT_TOKENS, WIDTH)}
_MASK = torch.ones(1, TEXT_TOKENS)
CASES = {
    "FluxPipeline": Case(
        "diffusers FluxPipeline", tiny.pipeline, _by_pipeline(prompt="a red circle", max_sequence_length=TEXT_TOKENS),
        lambda pipe: [pipe.transformer],
    ),
    "Flux2Pipeline": Case(
        "diffusers FluxPipeline", lambda: flux2_pipeline("Flux2Pipeline"), _by_pipeline(**_EMBEDS),
        lambda pipe: [pipe.transformer],
    ),
    "ChromaPipeline": Case(
        "diffusers FluxPipeline", lambda: chroma_pipeline("ChromaPipeline"),
        _by_pipeline(
            **_EMBEDS, prompt_attention_mask=_MASK, negative_prompt_embeds=noise(2, 1, TEXT_TOKENS, WIDTH),
            negative_prompt_attention_mask=_MASK,
        ),
        lambda pipe: [pipe.transformer],
    ),
    "FLUX.1 transformer": Case("diffusers FluxTransformer2DModel", tiny.transformer, _by_loop("FLUX.1")),
    "FLUX.2 transformer": Case("diffusers FluxTransformer2DModel", flux2_transformer, _by_loop("FLUX.2")),
    "Chroma transformer": Case("diffusers FluxTransformer2DModel", chroma_transformer, _by_loop("Chroma")),
    "WanPipeline": Case(
        "diffusers WanPipeline", lambda: wan_pipeline(boundary=0.8), lambda pipe, seed: wan_generate(pipe, seed=seed),
        lambda pipe: [pipe.transformer, pipe.transformer_2],
    ),
    "Wan transformer": Case("diffusers WanTransformer3DModel", wan_transformer, _wan_loop),
    "BFL Flux": Case("black-forest-labs", _bfl, _bfl_loop),
    "ComfyUI": Case("ComfyUI", _comfy, _comfy_sampling, lambda patcher: [patcher.model.diffusion_model]),
    "tutorial": Case("toy", _toy, _toy_loop),
}  # fmt: skip


def picture_of(target: Any) -> dict[str, Any]:
    """Returns all instance attributes of a target that a patch could change."""
    owners = [target, *(getattr(target, name, None) for name in ("transformer", "transformer_2", "scheduler"))]
    found: dict[str, Any] = {}
    for place, owner in enumerate(owners):
        if owner is None:
            continue
        own = {name: value for name, value in vars(owner).items() if not isinstance(value, torch.Tensor)}
        found |= {f"{place}.{name}": _shown(value) for name, value in own.items()}
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, dict):  # ComfyUI keeps an empty entry for a key whose wrappers were removed
        return {key: _shown(each) for key, each in value.items() if each != {}}
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else (type(value).__name__, id(value))


