"""ComfyUI: further inputs of a call are cut together with its tokens, and masks decide the anchors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import UnsupportedModelError
from jitaccel.patches.layout import to_tokens
from tests.support import tiny
from tests.support.comfy_models import LEVELS, SIZE, applied, by_hand, condition, flux1, flux2, sample, start
from tests.support.models import noise
from tests.support.tiny import CHANNELS, GRID, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH, relative_error


def test_residuals_references_and_further_channels_go_with_their_tokens() -> None:
    model = flux1(extra=CHANNELS)
    beside, reference = noise(7, 1, 4, *SIZE), noise(8, 1, 8, 10, 8)
    residual = noise(9, 1, NUM_TOKENS, WIDTH)
    given = condition()
    ids = model.process_img(noise(0, 1, 8, *SIZE))[1]
    extra = to_tokens(beside, 2)
    more, more_ids = model.process_img(reference, 1)

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        img = torch.cat([torch.cat([tokens, extra[:, at]], dim=2), more], dim=1)
        padded = torch.cat([residual[:, at], torch.zeros(1, more.shape[1], WIDTH)], dim=1)
        return model.forward_orig(
            img, torch.cat([ids[:, at], more_ids], dim=1), given["context"], torch.zeros(1, TEXT_TOKENS, 3),
            torch.tensor([level]), given["y"], given["guidance"], control={"input": [padded], "output": [-padded]},
        )[:, : len(at)]  # fmt: skip

    expected = by_hand(model, start(model), velocity)
    whole = torch.cat([residual, torch.zeros(1, more.shape[1], WIDTH)], dim=1)
    control = {"input": [whole], "output": [-whole]}
    conds = {"positive": [{**given, "c_concat": beside, "ref_latents": [reference], "control": control}]}
    with applied(model, SHORT) as handle:
        assert relative_error(sample(handle.target, start(model), conds=conds), expected) < 1e-5


def test_stretches_of_references_are_counted_from_the_anchors() -> None:
    model = flux2()
    given = {**condition(model=model), "ref_latents": [noise(8, 1, CHANNELS, 5, 4)]}
    conds = {"positive": [{**given, "ref_latents_method": "index_timestep_zero"}]}
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model), conds=conds)
    assert model.stretches == [(n + 20, [[n, n + 20]]) for n in (50, 50, 93, 144, 144)]


def test_residuals_that_are_none_stay_and_those_of_other_sizes_are_refused() -> None:
    model = flux1()
    control = {"input": [None, noise(9, 1, NUM_TOKENS, WIDTH)], "output": []}
    conds = {"positive": [{**condition(), "control": control}]}
    with applied(model, SHORT) as handle:
        model.inner.transformer_blocks.append(tiny.transformer(seed=1).transformer_blocks[0])
        control["input"].reverse()
        assert sample(handle.target, start(model), conds=conds).isfinite().all()
        control["input"][0] = noise(9, 1, 7, WIDTH)
        with pytest.raises(UnsupportedModelError, match="residuals must cover every image token, 144 or 144, got 7"):
            sample(handle.target, start(model), conds=conds)


def test_attention_mask_between_text_and_tokens() -> None:
    model = flux1()
    total = TEXT_TOKENS + NUM_TOKENS
    mask, given = torch.zeros(total, total), condition()
    mask[TEXT_TOKENS + 20 :, :3] = -4.0
    mask[:, TEXT_TOKENS + 70 :] += 0.7

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        rows = torch.cat([torch.arange(TEXT_TOKENS), TEXT_TOKENS + at])
        return model.forward_orig(
            tokens, model.process_img(start(model))[1][:, at], given["context"], torch.zeros(1, TEXT_TOKENS, 3),
            torch.tensor([level]), given["y"], given["guidance"], attn_mask=mask[rows][:, rows],
        )  # fmt: skip

    expected = by_hand(model, start(model), velocity)
    conds = {"positive": [{**given, "attention_mask": mask[None]}]}
    with applied(model, SHORT) as handle:
        assert relative_error(sample(handle.target, start(model), conds=conds), expected) < 1e-5
        with pytest.raises(UnsupportedModelError, match="attn_mask must be square over 152 text and image tokens"):
            sample(handle.target, start(model), conds={"positive": [{**given, "attention_mask": mask[None, :7, :7]}]})


def test_inpainting_mask_places_the_anchors_and_keeps_the_rest_of_the_picture() -> None:
    model = flux1()
    mask, latents = torch.zeros(1, 1, *SIZE), noise(4, 1, 4, *SIZE)
    mask[..., 6:16, 4:12] = 1.0
    mask[..., 6:8, 4:12] = 0.3  # soft: partly repainted
    seen: list[Tensor] = []
    model.inner.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with applied(model, SHORT) as handle:
        made = sample(handle.target, start(model), latent_image=latents, denoise_mask=mask)
        anchors = handle.stats().anchors
    outside = (to_tokens(mask, 2) == 0).all(dim=2)[0]
    known = to_tokens(LEVELS[2] * start(model) + (1 - LEVELS[2]) * latents, 2)[0]
    place = {int(token): k for k, token in enumerate(anchors[1][0])}
    kept = [token for token in place if outside[token]]
    assert torch.allclose(seen[2][0][[place[t] for t in kept]], known[kept], atol=1e-5)  # nothing has moved there
    inside = to_tokens(mask, 2).any(dim=2)[0].nonzero().squeeze(1)
    assert set(inside.tolist()) < set(anchors[0][0].tolist()) and anchors[0].shape[1] == 20 + int(0.35 * 124)
    assert torch.allclose(made * (mask == 0), latents * (mask == 0), atol=1e-5)
    assert not torch.allclose(made * mask, latents * mask, atol=0.1)


def test_mask_of_a_fill_model_places_the_anchors() -> None:
    """The model also gets a masked picture and 8 x 8 mask values per latent; nothing else keeps the rest."""
    model = flux1(extra=5 * CHANNELS)
    shown = torch.cat([noise(4, 1, 4, *SIZE), torch.zeros(1, 16, *SIZE)], dim=1)
    shown[:, 4:, 6:16, 4:12] = 1.0
    given = {**condition(), "c_concat": shown, "model_conds": {"c_concat": SimpleNamespace(cond=shown)}}
    with applied(model, SHORT) as handle:
        made = sample(handle.target, start(model), conds={"positive": [given]})
        anchors = handle.stats().anchors
        still = jitaccel.apply(handle.target, SHORT, micro_flow="none")
        assert not torch.allclose(sample(still.target, start(model), conds={"positive": [given]}), made, atol=1e-3)
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[3:8, 2:6] = True
    assert set(inside.flatten().nonzero().squeeze(1).tolist()) < set(anchors[0][0].tolist())
    assert anchors[0].shape[1] == 20 + int(0.35 * 124)
