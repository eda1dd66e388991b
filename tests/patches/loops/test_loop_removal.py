"""A bare transformer in a custom loop: removal leaves no trace."""

from __future__ import annotations

import inspect
from itertools import pairwise

import torch

import jitaccel
from jitaccel import PRESETS, noise_levels
from tests.support import tiny
from tests.support.tiny import SHORT, generate, relative_error
from tests.support.transformer_loop import EXACT, LEVELS, UNIFORM, Loop, through_pipeline


def test_remove_restores_the_transformer(loop: Loop) -> None:
    before, keys = dict(vars(loop.model)), list(loop.model.state_dict())
    dense = loop.run(UNIFORM, tiny.start(), steps=2)[-1]
    handle = jitaccel.apply(loop.model, SHORT)
    loop.run(noise_levels(SHORT), tiny.start())
    assert list(loop.model.state_dict()) == keys
    for _ in range(2):
        handle.remove()
        assert vars(loop.model).keys() == before.keys()
        assert all(vars(loop.model)[name] is value for name, value in before.items())
        assert torch.equal(loop.run(UNIFORM, tiny.start(), steps=2)[-1], dense)


def test_applying_again_replaces_the_first(loop: Loop) -> None:
    first = jitaccel.apply(loop.model, SHORT)
    with jitaccel.apply(loop.model, "7x-paper") as second:
        assert not first.is_active and second.is_active
        loop.run(LEVELS["7x-paper"], tiny.start())
        first.remove()
        assert second.stats().steps[0].tokens == PRESETS["7x-paper"].token_counts(tiny.NUM_TOKENS)[0]
        assert first.stats().generations == 0
    assert "forward" not in vars(loop.model)


def test_transformer_and_a_pipeline_of_it_may_both_be_patched(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    alone = through_pipeline(EXACT)
    with jitaccel.apply(loop.model, SHORT):
        bare = loop.run(levels, tiny.start())[-1]
    embeds, pooled, _ = loop.texts[0]
    call = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "latents": tiny.start()}
    with jitaccel.apply(loop.model, SHORT), jitaccel.apply(loop.pipe, EXACT):
        assert torch.equal(generate(loop.pipe, **call), alone)
        assert torch.equal(loop.run(levels, tiny.start())[-1], bare)
        assert torch.equal(generate(loop.pipe, **call), alone)
    assert "forward" not in vars(loop.model)


def test_signature_stays(loop: Loop) -> None:
    before = inspect.signature(loop.model.forward)
    with jitaccel.apply(loop.model, SHORT):
        assert inspect.signature(loop.model.forward) == before
    assert inspect.signature(loop.model.forward) == before


def test_gradients_may_be_on(loop: Loop) -> None:
    levels = noise_levels(SHORT)
    embeds, pooled, text_ids = loop.texts[0]
    with jitaccel.apply(loop.model, SHORT):
        expected = loop.run(levels, tiny.start())[-1]
        state = tiny.start()
        for level, next_level in pairwise(levels):
            arguments = (state, embeds, pooled, torch.tensor([level]), tiny.ids(), text_ids, torch.tensor([3.5]))
            state = state + (next_level - level) * loop.model(*arguments).sample
    assert state.requires_grad
    assert relative_error(state.detach(), expected) < 1e-5
