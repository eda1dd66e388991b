"""Black Forest Labs' `Flux` and its copies, against diffusers on the same weights, in commonly used loops.

`Flux` here is our stand-in with their signature and conventions (keyword arguments, position ids for each image) around
a diffusers model, because theirs is not on any package index.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jitaccel
from tests.support import tiny
from tests.support.bfl_wrapped import Flux
from tests.support.models import noise
from tests.support.reference import denoise
from tests.support.tiny import CHANNELS, DENSE, GRID, NUM_TOKENS, SHORT, TEXT_TOKENS, WIDTH, relative_error

LEVELS = jitaccel.noise_levels(SHORT)


def conditions(batch: int) -> dict[str, Tensor]:
    return {
        "txt": noise(1, 1, TEXT_TOKENS, WIDTH).repeat(batch, 1, 1),
        "txt_ids": torch.zeros(batch, TEXT_TOKENS, 3),
        "y": noise(2, 1, WIDTH).repeat(batch, 1),
        "guidance": torch.full((batch,), 3.5),
    }


def loop(model: Any, img: Tensor, levels: Any = LEVELS, **more: Any) -> Tensor:
    """The loop of BFL's sampling: keyword arguments, ids for each image, Python floats as levels."""
    batch = len(img)
    given = {"img_ids": tiny.ids().expand(batch, -1, -1), **conditions(batch), **more}
    for level, after in itertools.pairwise(levels):
        velocity = model(img=img, timesteps=torch.full((batch,), level), **given)
        img = img + (after - level) * velocity
    return img


@pytest.fixture
def model() -> Flux:
    return Flux().eval()


@torch.no_grad()
def test_dense_is_the_models_own_and_remove_leaves_nothing(model: Flux) -> None:
    expected = loop(model, tiny.start())
    with jitaccel.apply(model, DENSE, noise_levels=LEVELS):
        assert torch.equal(loop(model, tiny.start()), expected)
    assert "forward" not in vars(model) and torch.equal(loop(model, tiny.start()), expected)


@pytest.mark.parametrize("levels", [LEVELS, None], ids=["given", "predicted"])
@torch.no_grad()
def test_sparse_is_what_diffusers_gives_on_the_same_weights(model: Flux, levels: Any) -> None:
    one = {name: value[:1] if name != "txt_ids" else value[0] for name, value in conditions(1).items()}
    with jitaccel.apply(model.inner, SHORT, noise_levels=LEVELS, execution="indexed"):
        state = tiny.start()
        for level, after in itertools.pairwise(LEVELS):
            velocity = model.inner(
                state, one["txt"], one["y"], torch.tensor([level]), tiny.ids(), one["txt_ids"], one["guidance"],
                return_dict=False,
            )[0]  # fmt: skip
            state = state + (after - level) * velocity
    with jitaccel.apply(model, SHORT, noise_levels=levels) as handle:
        assert relative_error(loop(model, tiny.start()), state) < 1e-5
        stats = handle.stats()
    assert [step.tokens for step in stats.steps] == [50, 50, 93, 144, 144]
    assert stats.flops < 5 * stats.dense_step_flops


@torch.no_grad()
def test_images_of_a_batch_have_their_own_anchors_in_one_forward(model: Flux) -> None:
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS) as handle:
        alone = [loop(model, tiny.start(seed)) for seed in (1, 2)]
        together = loop(model, torch.cat([tiny.start(1), tiny.start(2)]))
        first = handle.stats().anchors[1]
    assert relative_error(together, torch.cat(alone)) < 1e-5 and not torch.equal(first[0], first[1])
    assert len(calls) == 3 * 5


@torch.no_grad()
def test_batched_guidance_of_kohya(model: Flux) -> None:
    """Negative and positive prompt as two images of a batch, the negative first; both keep one set of anchors."""
    given = conditions(2)
    given["txt"] = torch.cat([noise(7, 1, TEXT_TOKENS, WIDTH), given["txt"][1:]])

    def guided(state: Tensor, apply_at: Any) -> Tensor:
        for level, after in itertools.pairwise(LEVELS):
            negative, positive = apply_at(state, level)
            state = state + (after - level) * (negative + 3.0 * (positive - negative))
        return state

    def at(state: Tensor, level: float) -> tuple[Tensor, Tensor]:
        both = model(
            img=state.repeat(2, 1, 1), img_ids=tiny.ids().expand(2, -1, -1), timesteps=torch.full((2,), level), **given
        )
        return both[:1], both[1:]

    with jitaccel.apply(model, SHORT, noise_levels=LEVELS) as handle:
        made = guided(tiny.start(), at)
        anchors = handle.stats().anchors
    assert made.isfinite().all() and all(torch.equal(each[0], each[1]) for each in anchors)


@torch.no_grad()
def test_references_further_channels_and_residuals(model: Flux) -> None:
    reference_ids = tiny.ids((5, 4))
    reference_ids[:, 0] = 1
    wide = Flux(in_channels=2 * CHANNELS, out_channels=CHANNELS).eval()
    extra, references, residual = (
        noise(4, NUM_TOKENS, CHANNELS),
        noise(3, 20, 2 * CHANNELS),
        noise(5, NUM_TOKENS + 20, WIDTH),
    )

    def call(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        rows = torch.cat([at, NUM_TOKENS + torch.arange(20)])
        hidden = torch.cat([torch.cat([tokens[0], extra[at]], dim=1), references])
        ids = torch.cat([tiny.ids()[at], reference_ids])
        out = wide(
            img=hidden[None], img_ids=ids[None], timesteps=torch.tensor([level]), **conditions(1),
            block_controlnet_hidden_states=[residual[rows][None]],
        )  # fmt: skip
        return out[:, : len(at)]

    expected = denoise(call, SHORT, GRID, tiny.start(), LEVELS).states[-1]
    state = tiny.start()
    with jitaccel.apply(wide, SHORT, noise_levels=LEVELS):
        for level, after in itertools.pairwise(LEVELS):
            out = wide(
                img=torch.cat([torch.cat([state, extra[None]], dim=2), references[None]], dim=1),
                img_ids=torch.cat([tiny.ids(), reference_ids])[None],
                timesteps=torch.tensor([level]),
                block_controlnet_hidden_states=[residual[None]],
                **conditions(1),
            )
            assert out.shape == (1, NUM_TOKENS + 20, CHANNELS)
            state = state + (after - level) * out[:, :NUM_TOKENS]
    assert relative_error(state, expected) < 1e-5


@torch.no_grad()
def test_residuals_of_blocks_that_text_and_image_pass_together(model: Flux) -> None:
    residual = noise(5, TEXT_TOKENS + NUM_TOKENS, WIDTH)

    def call(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        rows = torch.cat([torch.arange(TEXT_TOKENS), TEXT_TOKENS + at])
        return model(
            img=tokens, img_ids=tiny.ids()[at][None], timesteps=torch.tensor([level]), **conditions(1),
            block_controlnet_single_hidden_states=[residual[rows][None]],
        )  # fmt: skip

    expected = denoise(call, SHORT, GRID, tiny.start(), LEVELS).states[-1]
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS):
        made = loop(model, tiny.start(), block_controlnet_single_hidden_states=[residual[None]])
    assert relative_error(made, expected) < 1e-5


@torch.no_grad()
def test_one_row_of_ids_or_of_residuals_serves_a_whole_batch(model: Flux) -> None:
    two = torch.cat([tiny.start(1), tiny.start(2)])
    row = noise(5, 1, 1, WIDTH)
    whole = {"block_controlnet_hidden_states": [row.expand(2, NUM_TOKENS, -1)]}
    short = {"img_ids": tiny.ids()[None], "txt_ids": torch.zeros(1, TEXT_TOKENS, 3)}
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS):
        expected = loop(model, two, **whole)
        assert torch.equal(loop(model, two, **short, block_controlnet_hidden_states=[row]), expected)


@torch.no_grad()
def test_model_that_is_compiled_before_or_wrapped_after(model: Flux) -> None:
    """What another library puts around the patched forward stays when the patch is removed, and passes calls on."""
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS):
        expected = loop(model, tiny.start())
    dense = loop(model, tiny.start())
    compiled = torch.compile(model, backend="eager")
    with jitaccel.apply(compiled, SHORT, noise_levels=LEVELS):
        assert relative_error(loop(compiled, tiny.start()), expected) < 1e-5
    assert torch.equal(loop(model, tiny.start()), dense)
    handle = jitaccel.apply(model, SHORT, noise_levels=LEVELS)
    inner, calls = model.forward, []

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapper  # type: ignore[method-assign]
    assert torch.equal(loop(model, tiny.start()), expected)
    handle.remove()
    assert torch.equal(loop(model, tiny.start()), dense) and len(calls) == 10 and model.forward is wrapper


@torch.no_grad()
def test_chroma_of_kohyas_scripts_is_derived_from_flux() -> None:
    class Chroma(Flux):
        pass

    model = Chroma().eval()
    del model.params.vec_in_dim
    vars(model.params).update(approximator_in_dim=64, approximator_hidden_size=32, approximator_depth=5)
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS) as handle:
        loop(model, tiny.start())
        assert 0 < handle.stats().flops < 5 * handle.stats().dense_step_flops


@torch.no_grad()
def test_an_exception_in_the_model_ends_the_generation(model: Flux) -> None:
    with jitaccel.apply(model, SHORT, noise_levels=LEVELS):
        clean = loop(model, tiny.start())
        with pytest.raises(ValueError, match="3 dimensions"):
            loop(model, tiny.start(), txt=torch.zeros(TEXT_TOKENS, WIDTH))
        assert torch.equal(loop(model, tiny.start()), clean)


def test_applying_again_replaces_and_packed_execution_is_told_apart(model: Flux) -> None:
    first = jitaccel.apply(model, SHORT, noise_levels=LEVELS)
    second = jitaccel.apply(model, SHORT, noise_levels=LEVELS, execution="packed")
    assert not first.is_active and "does not support Flux" in second.stats().notes[-1]
    with pytest.raises(jitaccel.UnsupportedModelError, match="does not support Flux"):
        jitaccel.apply(model, SHORT, noise_levels=LEVELS, compile=True, strict=True)
    second.remove()


def test_other_models_of_that_name_are_not_taken_for_it() -> None:
    class Flux(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(jitaccel.UnsupportedModelError, match="target must be one of"):
        jitaccel.apply(Flux())
