"""`jitaccel.apply` on a diffusers FluxPipeline leaves no trace, however a generation ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

import jitaccel
from jitaccel import PRESETS
from tests.support import tiny
from tests.support.flux_pipelines import (
    GUIDED,
    BreakingScheduler,
    Breaks,
    abort,
    attributes,
    changed,
    sharing,
    signatures,
)
from tests.support.tiny import DENSE, SHORT, forwards, generate

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


@pytest.mark.parametrize("has_run", [False, True])
def test_remove_restores_everything(pipe: Any, has_run: bool) -> None:
    if has_run:
        generate(pipe, num_inference_steps=2)
    fresh = generate(tiny.pipeline(), num_inference_steps=4)
    before, keys, called = attributes(pipe), list(pipe.transformer.state_dict()), signatures(pipe)
    handle = jitaccel.apply(pipe, "7x")
    assert handle.is_active and changed(before, attributes(pipe))
    assert list(pipe.transformer.state_dict()) == keys
    assert signatures(pipe) == called
    for name in ("FluxTransformer2DModel hook 'jitaccel'", "Scheduler.set_timesteps", "Scheduler.step"):
        assert name in repr(handle)
    assert not changed(attributes(pipe), {**attributes(pipe)})
    generate(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    handle.remove()
    ran = {"pipe:_guidance_scale", "pipe:_num_timesteps", "pipe:_current_timestep", "pipe:_interrupt"}
    ran |= {"pipe:_joint_attention_kwargs"}
    assert set(changed(before, attributes(pipe))) <= ran
    assert list(pipe.transformer.state_dict()) == keys
    assert signatures(pipe) == called
    assert not handle.is_active and "removed" in repr(handle)
    assert torch.equal(generate(pipe, num_inference_steps=4), fresh)
    handle.remove()
    assert torch.equal(generate(pipe, num_inference_steps=4), fresh)


def test_remove_without_a_generation_restores_everything(pipe: Any) -> None:
    before = attributes(pipe)
    jitaccel.apply(pipe, "7x").remove()
    assert not changed(before, attributes(pipe))


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("where", ["callback", "transformer", "scheduler"])
def test_exception_inside_a_generation_leaves_no_trace(where: str, step: int) -> None:
    pipe = tiny.pipeline(scheduler=BreakingScheduler(use_dynamic_shifting=True, shift=3.0))
    plain = generate(pipe, num_inference_steps=4)
    before, called = attributes(pipe), signatures(pipe)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
    with jitaccel.apply(pipe, SHORT):
        abort(pipe, where, step)
        assert torch.equal(generate(pipe), sparse)
        abort(pipe, where, step)
        small = generate(pipe, (1, 2), grid=(6, 8), prompt=["a", "red"])
        assert small.isfinite().all()
        assert torch.equal(generate(pipe), sparse)
        abort(pipe, where, step)
    names = {name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")}
    assert not names
    assert signatures(pipe) == called
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_network_called_by_hand_after_an_aborted_generation_is_dense(pipe: Any) -> None:
    embeds, pooled, text_ids = pipe.encode_prompt("a red circle", None, max_sequence_length=tiny.TEXT_TOKENS)

    def call() -> Tensor:
        with torch.no_grad():
            velocity: Tensor = pipe.transformer(
                tiny.start(), embeds, pooled, torch.ones(1), tiny.ids(), text_ids, torch.ones(1), return_dict=False
            )[0]
        return velocity

    plain = call()
    with jitaccel.apply(pipe, SHORT):
        abort(pipe, "callback", 1)
        assert torch.equal(call(), plain)
        assert generate(pipe).isfinite().all()
        assert torch.equal(call(), plain)
        pipe.scheduler.set_timesteps(5, mu=0.5)  # a loop by hand, which fails
        assert not torch.equal(call(), plain)
        hook = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call()
        hook.remove()
        assert torch.equal(call(), plain)


def test_context_manager_removes_after_an_exception(pipe: Any) -> None:
    before = attributes(pipe)
    with pytest.raises(Breaks), jitaccel.apply(pipe, SHORT):
        raise Breaks
    assert not changed(before, attributes(pipe))


def test_remove_inside_a_generation_leaves_the_rest_dense(pipe: Any) -> None:
    plain = generate(pipe, num_inference_steps=5)
    for config in (DENSE, SHORT):
        handle = jitaccel.apply(pipe, config, execution="indexed")

        def remove(_: Any, step: int, *__: Any, handle: jitaccel.Handle = handle) -> dict[str, Any]:
            if step == 1:
                handle.remove()
            return {}

        with forwards(pipe.transformer) as seen:
            image = generate(pipe, num_inference_steps=5, callback_on_step_end=remove)
        assert image.isfinite().all() and torch.equal(image, plain) == (config is DENSE)
        assert [len(tokens) for tokens in seen[2:]] == [tiny.NUM_TOKENS] * 3
        assert torch.equal(generate(pipe, num_inference_steps=5), plain)


def test_remove_inside_another_pipelines_generation_leaves_it_alone(pipe: Any) -> None:
    other = sharing(pipe, scheduler=True)
    plain = generate(other, num_inference_steps=5)
    handle = jitaccel.apply(pipe, SHORT)
    generate(pipe)
    removed = generate(other, num_inference_steps=5, callback_on_step_end=lambda *_: handle.remove() or {})  # type: ignore[func-returns-value]
    assert torch.equal(removed, plain)
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_pipeline_may_apply_to_itself(pipe: Any) -> None:
    class Fast(FluxPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with jitaccel.apply(self, SHORT):
                return super().__call__(*args, **kwargs)

    fast = Fast(**{**pipe.components, "scheduler": tiny.scheduler()})
    fast.set_progress_bar_config(disable=True)
    before = attributes(fast)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
    assert torch.equal(generate(fast), sparse)
    assert not [name for name in changed(before, attributes(fast)) if name.startswith("scheduler")]


def test_applying_twice_is_applying_once(pipe: Any) -> None:
    before = attributes(pipe)
    other = tiny.pipeline()
    with jitaccel.apply(other, SHORT):
        once = generate(other)
    first = jitaccel.apply(pipe, SHORT)
    second = jitaccel.apply(pipe, SHORT)
    assert not first.is_active and second.is_active
    assert pipe.transformer._diffusers_hook._hook_order == ["jitaccel"]
    assert torch.equal(generate(pipe), once)
    second.remove()
    assert not [name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")]


def test_applying_another_preset_replaces_the_first(pipe: Any) -> None:
    other = tiny.pipeline()
    with jitaccel.apply(other, "4x"):
        once = generate(other)
    before = attributes(pipe)
    first = jitaccel.apply(pipe, "7x")
    generate(pipe)
    second = jitaccel.apply(pipe, "4x")
    first.remove()
    assert second.is_active and second.config == PRESETS["4x"]
    assert torch.equal(generate(pipe), once)
    first.remove()
    second.remove()
    assert not [name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")]


def test_configuration_that_is_refused_leaves_the_first_in_place(pipe: Any) -> None:
    handle = jitaccel.apply(pipe, SHORT)
    once = generate(pipe)
    with pytest.raises(jitaccel.ConfigError):
        jitaccel.apply(pipe, SHORT, densities=(0.5, 0.4, 1.0))
    assert handle.is_active and torch.equal(generate(pipe), once)
    handle.remove()


def test_interrupted_generation_leaves_no_trace(pipe: Any) -> None:
    def interrupt(running: Any, *_: Any) -> dict[str, Any]:
        running._interrupt = True
        return {}

    plain = generate(pipe, num_inference_steps=4)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        assert generate(pipe, callback_on_step_end=interrupt).isfinite().all()
        assert torch.equal(generate(pipe), sparse)
        generate(pipe, callback_on_step_end=interrupt)
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_resolution_and_batch_may_change_between_calls(pipe: Any) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"grid": (8, 20)},
        {"seed": (1, 2, 3), "prompt": ["a", "red", "blue"]},
        GUIDED,
        {"grid": (20, 8), "seed": (1, 2), "prompt": ["a", "red"]},
    ]
    alone = []
    for call in calls:
        fresh = tiny.pipeline()
        with jitaccel.apply(fresh, SHORT):
            alone.append(generate(fresh, **call))
    with jitaccel.apply(pipe, SHORT) as handle:
        for call, image in [*zip(calls, alone, strict=True), (calls[0], alone[0])]:
            assert torch.equal(generate(pipe, **call), image)
        assert handle.stats().generations == len(calls) + 1
