"""The same weights in two layouts: Black Forest Labs' patch makes the same image as the diffusers routes.

`to_bfl` maps the keys. The network that gets its result shares no code with diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, Stats
from tests.support import tiny
from tests.support.bfl_model import Flux, flux_of, to_bfl
from tests.support.tiny import CHANNELS, NUM_TOKENS, TEXT_TOKENS

SCALE, EMBEDDED = 3.0, 3.5  # of true CFG; of a distilled model's embedded guidance
BATCH, CONTEXT, POOLED = 2, 24, 20
TOLERANCE = 1e-4
GUIDANCE = ("distilled", "sequential", "batched")

Weights = dict[str, Tensor]
Text = tuple[Tensor, Tensor]
"""Token embeddings (B, T, CONTEXT) and a pooled one (B, POOLED) of each image."""
Network = Callable[[Tensor, Sequence[float], Text], Tensor]
"""(state, level of each image, text) -> velocity."""


def transformer(distilled: bool) -> FluxTransformer2DModel:
    """Returns a random FLUX of two blocks of each kind, with distinct attention and different widths."""
    model = tiny.transformer(
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=distilled,
    )
    for name, parameter in model.named_parameters():
        if ".attn.norm_" in name:
            parameter.data += 1.0
    return model


def text(seed: int) -> Text:
    """Returns a prompt for each image."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(BATCH, TEXT_TOKENS, CONTEXT, generator=generator)
    return embeds, torch.randn(BATCH, POOLED, generator=generator)


PROMPT, NEGATIVE = text(1), text(2)


def called_as_bfl(flux: Flux) -> Network:
    """Position ids for each image, levels and guidance as they are."""

    def network(state: Tensor, levels: Sequence[float], text: Text) -> Tensor:
        batch = len(state)
        return flux(
            img=state,
            img_ids=tiny.ids().expand(batch, -1, -1),
            txt=text[0],
            txt_ids=torch.zeros(batch, TEXT_TOKENS, 3),
            timesteps=torch.tensor(levels),
            y=text[1],
            guidance=torch.full((batch,), EMBEDDED),
        )

    return network


def called_as_diffusers(model: FluxTransformer2DModel) -> Network:
    """Position ids for all images, levels and guidance as they are."""

    def network(state: Tensor, levels: Sequence[float], text: Text) -> Tensor:
        return model(
            hidden_states=state,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=torch.tensor(levels),
            img_ids=tiny.ids(),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            guidance=torch.full((len(state),), EMBEDDED) if model.config.guidance_embeds else None,
            return_dict=False,
        )[0]

    return network


def loop(network: Network, levels: Sequence[float], guidance: str) -> Tensor:
    """The Euler loop of BFL's sampling; `guidance`: of a distilled model, or true CFG in two calls or in one batch."""
    both = tuple(torch.cat(parts) for parts in zip(NEGATIVE, PROMPT, strict=True))
    state = tiny.start(batch=BATCH)
    for level, after in pairwise(levels):
        if guidance == "batched":
            negative, velocity = network(state.repeat(2, 1, 1), [level] * 2 * BATCH, both).chunk(2)
        else:
            velocity = network(state, [level] * BATCH, PROMPT)
        if guidance == "sequential":
            negative = network(state, [level] * BATCH, NEGATIVE)
        if guidance != "distilled":
            velocity = negative + SCALE * (velocity - negative)
        state = state + (after - level) * velocity
    return state


def through_bfl(model: FluxTransformer2DModel, preset: str, guidance: str, **options: Any) -> tuple[Tensor, Stats]:
    """Returns the images of the patched `Flux` with these weights, and its statistics."""
    flux = flux_of(model)
    with jitaccel.apply(flux, preset, **options) as handle:
        images = loop(called_as_bfl(flux), jitaccel.noise_levels(PRESETS[preset]), guidance)
        return images, handle.stats()


def through_loop(model: FluxTransformer2DModel, preset: str, guidance: str) -> tuple[Tensor, Stats]:
    """Returns the images of the patched transformer in the same loop, and its statistics."""
    levels = jitaccel.noise_levels(PRESETS[preset])
    with jitaccel.apply(model, preset, noise_levels=levels) as handle:
        return loop(called_as_diffusers(model), levels, guidance), handle.stats()


def through_pipeline(model: FluxTransformer2DModel, preset: str, guidance: str) -> tuple[Tensor, Stats]:
    """Returns the images of the patched pipeline, which has its own loop, and its statistics."""
    pipe = tiny.pipeline(transformer=model)
    call: dict[str, Any] = {"prompt_embeds": PROMPT[0], "pooled_prompt_embeds": PROMPT[1]}
    if guidance != "distilled":
        call |= {"negative_prompt_embeds": NEGATIVE[0], "negative_pooled_prompt_embeds": NEGATIVE[1]}
        call |= {"true_cfg_scale": SCALE}
    with jitaccel.apply(pipe, preset) as handle:
        images = tiny.generate(pipe, prompt=None, latents=tiny.start(batch=BATCH), guidance_scale=EMBEDDED, **call)
        return images, handle.stats()


def anchors_of(stats: Stats) -> list[Tensor]:
    """Returns each stage's anchors (BATCH, M); branches of guidance that come in one batch must share them."""
    for anchors in stats.anchors:
        assert torch.equal(anchors, anchors[:BATCH].repeat(len(anchors) // BATCH, 1))
    return [anchors[:BATCH] for anchors in stats.anchors]


def assert_same(made: tuple[Tensor, Stats], expected: tuple[Tensor, Stats], preset: str) -> None:
    """Same images, same steps on the preset's numbers of anchors, and for each image the same anchors."""
    (images, stats), (expected_images, expected_stats) = made, expected
    config, levels = PRESETS[preset], jitaccel.noise_levels(PRESETS[preset])
    counts = config.token_counts(NUM_TOKENS)
    stages = [config.stage_of_step(i, len(levels) - 1) for i in range(len(levels) - 1)]
    for each in (stats, expected_stats):
        assert [(step.noise_level, step.next_level) for step in each.steps] == list(pairwise(levels))
        assert [(step.stage, step.tokens) for step in each.steps] == [(stage, counts[stage]) for stage in stages]
    for anchors, expected_anchors in zip(anchors_of(stats), anchors_of(expected_stats), strict=True):
        assert torch.equal(anchors, expected_anchors)
    assert images.shape == (BATCH, NUM_TOKENS, CHANNELS)
    torch.testing.assert_close(images, expected_images, rtol=0.0, atol=TOLERANCE)


def test_diffusers_own_converter_takes_the_mapping_back() -> None:
    """The result of `to_bfl` has the layout of published checkpoints, bit for bit and key for key.

    The converter knows one width, FLUX.1's, and stacks rows alone; so does the mapping, and one column is enough.
    """
    loading = pytest.importorskip("diffusers.loaders.single_file_utils")  # no documented interface
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    generator = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(value.shape[0], generator=generator) for key, value in model.state_dict().items()}
    back = loading.convert_flux_transformer_checkpoint_to_diffusers(to_bfl(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "undistilled"])
@torch.no_grad()
def test_dense_networks_agree(distilled: bool) -> None:
    """One forward in which each image has its own level and text."""
    model = transformer(distilled)
    arguments = (tiny.start(batch=BATCH), [1.0, 0.37], PROMPT)
    made, expected = called_as_bfl(flux_of(model))(*arguments), called_as_diffusers(model)(*arguments)
    torch.testing.assert_close(made, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("preset", ["4x-paper", "7x-paper", "7x"])
@torch.no_grad()
def test_bfl_makes_the_pipelines_images(preset: str, guidance: str, given: bool) -> None:
    """Whether the loop's levels are given to `apply` or predicted: they are the preset's own."""
    model = transformer(distilled=guidance == "distilled")
    options = {"noise_levels": jitaccel.noise_levels(PRESETS[preset])} if given else {}
    made = through_bfl(model, preset, guidance, **options)
    assert_same(made, through_pipeline(model, preset, guidance), preset)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("preset", ["4x-paper", "7x-paper", "7x"])
@torch.no_grad()
def test_bfl_makes_the_images_of_a_bare_transformer_in_the_same_loop(preset: str, guidance: str) -> None:
    model = transformer(distilled=guidance == "distilled")
    made = through_bfl(model, preset, guidance, noise_levels=jitaccel.noise_levels(PRESETS[preset]))
    assert_same(made, through_loop(model, preset, guidance), preset)
