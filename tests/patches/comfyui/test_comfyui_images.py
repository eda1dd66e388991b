"""ComfyUI: the pictures that a patched model makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel.method.run import Run
from jitaccel.patches.flux.flops import chroma_flops, flux_flops
from jitaccel.patches.layout import to_picture, to_tokens
from tests.support import comfy_stand_in as comfy
from tests.support import tiny
from tests.support.comfy_models import LEVELS, SIZE, applied, by_hand, condition, flux1, flux2, on_tokens, sample, start
from tests.support.comfy_stand_in import KSAMPLER, BaseModel, CFGGuider, ModelPatcher
from tests.support.models import chroma_transformer, noise
from tests.support.pooled import POOLED, denoise_pooled
from tests.support.tiny import CHANNELS, DENSE, GRID, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH, relative_error


@pytest.mark.parametrize("make", [flux1, flux2], ids=["FLUX.1", "FLUX.2"])
def test_dense_is_the_models_own_and_remove_leaves_nothing(make: Any) -> None:
    patcher = ModelPatcher(BaseModel(make()))
    x = start(patcher.model.diffusion_model)
    expected = sample(patcher, x)
    with jitaccel.apply(patcher, DENSE) as handle:
        assert torch.equal(sample(patcher, x), expected)
        assert [step.tokens for step in handle.stats().steps] == [NUM_TOKENS] * 5
    assert not any(patcher.get_wrappers(kind, "jitaccel") for kind in patcher.wrappers)
    assert "forward_orig" not in vars(patcher.model.diffusion_model)


@pytest.mark.parametrize("make", [flux1, flux2], ids=["FLUX.1", "FLUX.2"])
def test_sparse_is_the_method_written_out_by_hand(make: Any) -> None:
    model = make()
    patcher = ModelPatcher(BaseModel(model))
    x, given = start(model), condition(model=model)
    expected = by_hand(model, x, on_tokens(model, given))
    with jitaccel.apply(patcher, SHORT) as handle:
        assert relative_error(sample(patcher, x), expected) < 1e-5
        stats = handle.stats()
    assert [step.tokens for step in stats.steps] == [50, 50, 93, 144, 144]
    assert (stats.grid, stats.text_tokens, stats.batch) == (GRID, TEXT_TOKENS, 1)
    assert stats.flops < 5 * stats.dense_step_flops


@pytest.mark.parametrize("preset", ["4x-paper", "7x-paper", "7x"])
@pytest.mark.parametrize("guided", [False, True])
def test_picture_is_the_one_of_diffusers_pipeline_route(preset: str, guided: bool) -> None:
    """The same weights, noise and levels; latents are patches of 2 x 2 in both, channel by channel."""
    model, positive, negative = flux1(), condition(1), condition(5)
    call: dict[str, Any] = {"prompt_embeds": positive["context"], "pooled_prompt_embeds": positive["y"]}
    if guided:
        call |= {"negative_prompt_embeds": negative["context"], "negative_pooled_prompt_embeds": negative["y"]}
        call |= {"true_cfg_scale": 3.0}
    pipe = tiny.pipeline(transformer=model.inner)
    with jitaccel.apply(pipe, preset) as handle:
        latents = to_tokens(start(model), 2)
        expected = tiny.generate(pipe, prompt=None, latents=latents, guidance_scale=3.5, **call)
        anchors = handle.stats().anchors
    levels = torch.tensor(jitaccel.noise_levels(jitaccel.PRESETS[preset]))
    with applied(model, preset) as handle:
        conds = {"positive": [positive], "negative": [negative]}
        made = sample(handle.target, start(model), levels, conds=conds, cfg=3.0 if guided else 1.0)
        assert all(torch.equal(a, b) for a, b in zip(handle.stats().anchors, anchors, strict=True))
    assert relative_error(to_tokens(made, 2), expected) < 1e-4


def test_costs_are_those_of_diffusers_on_the_same_network() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model))
        comfy_flops = handle.stats().dense_step_flops
    cost = flux_flops(model.inner.config, NUM_TOKENS, TEXT_TOKENS)
    assert comfy_flops == cost


@pytest.mark.parametrize("in_turn", [False, True], ids=["one batch", "in turn"])
def test_guided_branches_share_anchors_and_the_move_is_made_once(in_turn: bool) -> None:
    model = flux1()
    positive, negative = condition(1), condition(5)
    one, other = on_tokens(model, positive), on_tokens(model, negative)

    def guided(*call: Any) -> Tensor:
        first, second = one(*call), other(*call)
        return second + (first - second) * 3.0

    expected = by_hand(model, start(model), guided)
    with applied(model, SHORT) as handle:
        conds = {"positive": [positive], "negative": [negative]}
        made = sample(handle.target, start(model), conds=conds, cfg=3.0, in_turn=in_turn)
        assert {step.calls for step in handle.stats().steps} == {2}
    assert relative_error(made, expected) < 1e-5


def test_each_picture_of_a_batch_is_the_one_made_alone() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        pictures = [start(model, seed) for seed in (1, 2)]
        alone = [sample(handle.target, x) for x in pictures]
        together = sample(handle.target, torch.cat(pictures))
        first, second = handle.stats().anchors[1]
    assert relative_error(together, torch.cat(alone)) < 1e-5 and not torch.equal(first, second)


def test_half_precision_network_keeps_the_samplers_state_in_float32() -> None:
    """What sparse steps add to the rounding of a dense sampling stays within it."""
    model, half = flux1(), flux1().to(torch.bfloat16)

    def error(config: Any) -> float:
        made = []
        for each, dtype in ((half, torch.bfloat16), (model, torch.float32)):
            patcher = ModelPatcher(BaseModel(each, dtype))
            with jitaccel.apply(patcher, config) as handle:
                made.append(sample(handle.target, start(model)))
        assert made[0].dtype == torch.float32
        return relative_error(*made)

    assert error(SHORT) < 1.2 * error(DENSE)


def test_picture_with_an_odd_side_is_padded_as_comfy_pads_it() -> None:
    model = flux1()
    x = noise(3, 1, 4, 23, 21)
    dense = sample(ModelPatcher(BaseModel(model)), x)
    with applied(model, SHORT) as handle:
        made = sample(handle.target, x)
        assert made.shape == x.shape and handle.stats().grid == (12, 11)
    with applied(model, DENSE) as handle:
        assert torch.equal(sample(handle.target, x), dense)


def test_chroma() -> None:
    params = {"in_dim": 8, "hidden_dim": 16, "n_layers": 2}
    model = comfy.Chroma(chroma_transformer(), patch_size=2, channels=CHANNELS // 4, **params).eval()
    given = {"context": noise(1, 1, TEXT_TOKENS, WIDTH), "guidance": torch.tensor([0.0])}
    ids = model.process_img(start(model))[1]

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        return model.forward_orig(
            tokens, ids[:, at], given["context"], torch.zeros(1, TEXT_TOKENS, 3), torch.tensor([level])
        )

    expected = by_hand(model, start(model), velocity)
    with applied(model, SHORT) as handle:
        assert relative_error(sample(handle.target, start(model), conds={"positive": [given]}), expected) < 1e-5
        cost = chroma_flops(model.inner.config, NUM_TOKENS, TEXT_TOKENS)
        assert handle.stats().dense_step_flops == cost


@pytest.mark.parametrize("make", [flux1, flux2], ids=["FLUX.1", "FLUX.2"])
@torch.no_grad()
def test_pooled_stages_are_the_smaller_picture_made_by_hand(make: Any) -> None:
    model = make()
    x, given = start(model), condition(model=model)

    def velocity(tokens: Tensor, grid: tuple[int, int], level: float) -> Tensor:
        small = torch.zeros(1, 1, grid[0] * model.patch_size, grid[1] * model.patch_size)
        return model.forward_orig(
            tokens, model.process_img(small)[1], given["context"], torch.zeros(1, TEXT_TOKENS, model.axes),
            torch.tensor([level]), given.get("y"), given["guidance"],
        )  # fmt: skip

    levels = jitaccel.noise_levels(POOLED)
    state, patch = to_tokens(x, model.patch_size), model.patch_size
    end = denoise_pooled(velocity, lambda y, level: velocity(y, GRID, level), POOLED, state, levels, GRID, patch)
    with applied(model, POOLED) as handle:
        made = sample(handle.target, x, torch.tensor(levels))
    assert relative_error(made, to_picture(end, GRID, patch, x.shape[2:])) < 1e-5


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_preview_of_a_step_is_what_the_network_takes_the_picture_for(solver: Any) -> None:
    model, previews = flux1(), []
    config = SHORT.replace(solver=solver)
    levels, seen = LEVELS.tolist(), []

    def keep(state: dict[str, Any]) -> None:
        previews.append(state["denoised"].clone())

    with applied(model, config) as handle:
        remembered = Run.remember

        def remember(self: Run, step: Any, state: Tensor, velocity: Tensor) -> Tensor:
            seen.append(state - levels[step.index] * velocity)
            return remembered(self, step, state, velocity)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "remember", remember)
            final = sample(handle.target, start(model), callback=keep)
        assert torch.equal(final, sample(handle.target, start(model)))
    assert len(previews) == len(levels) - 1
    for preview, clean in zip(previews, seen, strict=True):
        torch.testing.assert_close(preview, to_picture(clean, GRID, 2, SIZE), rtol=1e-4, atol=1e-4)


def test_callback_of_four_arguments_gets_the_preview_too() -> None:
    model, previews = flux1(), []
    with applied(model, SHORT) as handle:
        guider = CFGGuider(handle.target, {"positive": [condition(model=model)]})

        class Sampler(KSAMPLER):
            def sample(self, guider: Any, sigmas: Any, extra: Any, callback: Any, *rest: Any) -> Tensor:
                shown = lambda x: callback(x["i"], x["denoised"], x["x"], len(sigmas) - 1)  # noqa: E731
                return super().sample(guider, sigmas, extra, shown, *rest)

        final = guider.sample(start(model), Sampler(), LEVELS, callback=lambda *given: previews.append(given))
    assert [(given[0], given[3]) for given in previews] == [(i, len(LEVELS) - 1) for i in range(len(LEVELS) - 1)]
    # A preview that carried the move would be far from the picture; all are estimates of one and the same.
    spread = [float(given[1].square().mean().sqrt()) for given in previews]
    assert max(spread) < 2.5 * float(final.square().mean().sqrt())
