"""`jitaccel.apply` on diffusers pipelines that share parts."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from tests.support import tiny
from tests.support.flux_pipelines import GUIDED, abort, attributes, changed, sharing
from tests.support.tiny import SHORT, generate

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


@pytest.mark.parametrize("scheduler", [False, True], ids=["own-scheduler", "shared-scheduler"])
def test_pipeline_that_shares_parts_stays_as_it_was(pipe: Any, scheduler: bool) -> None:
    other = sharing(pipe, scheduler=scheduler)
    plain = generate(other, num_inference_steps=6, **GUIDED)
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)
        sparse = generate(pipe)
        assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)
        assert torch.equal(generate(pipe), sparse)
        abort(pipe, "callback", 1)
        assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)
        assert torch.equal(generate(pipe), sparse)
    assert torch.equal(generate(other, num_inference_steps=6, **GUIDED), plain)


def test_image_to_image_with_the_same_parts_stays_as_it_was(pipe: Any) -> None:
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer and other.scheduler is pipe.scheduler
    other.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "image": torch.linspace(0, 1, 3 * 48 * 48).view(1, 3, 48, 48),
        "num_inference_steps": 6,
        "strength": 0.6,
    }
    plain = generate(other, **call)
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(other, **call), plain)
        sparse = generate(pipe)
        assert torch.equal(generate(other, **call), plain)
        assert torch.equal(generate(pipe), sparse)


def test_pipelines_that_share_a_transformer_may_run_inside_each_other(pipe: Any) -> None:
    other = sharing(pipe)
    plain = generate(other, num_inference_steps=6, **GUIDED)
    images: list[Tensor] = []

    def run_other(*_: Any) -> dict[str, Any]:
        images.append(generate(other, num_inference_steps=6, **GUIDED))
        return {}

    with jitaccel.apply(pipe, SHORT):
        alone = generate(pipe)
        assert torch.equal(generate(pipe, callback_on_step_end=run_other), alone)
        assert len(images) == 5 and all(torch.equal(image, plain) for image in images)

        def run_patched(*_: Any) -> dict[str, Any]:
            images.append(generate(pipe))
            return {}

        assert torch.equal(generate(other, num_inference_steps=6, callback_on_step_end=run_patched, **GUIDED), plain)
        assert all(torch.equal(image, alone) for image in images[5:])


def test_shared_scheduler_taken_over_inside_a_generation_is_told(pipe: Any) -> None:
    other = sharing(pipe, scheduler=True)
    plain = generate(other, num_inference_steps=2)
    images: list[Tensor] = []

    def run_other(*_: Any) -> dict[str, Any]:
        images.append(generate(other, num_inference_steps=2))
        return {}

    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        with pytest.raises(RuntimeError, match=r"jitaccel: .*scheduler"):
            generate(pipe, callback_on_step_end=run_other)
        assert torch.equal(images[0], plain)
        assert torch.equal(generate(pipe), sparse)


@pytest.mark.parametrize("first", [0, 1])
def test_two_patched_pipelines_share_a_transformer(pipe: Any, first: int) -> None:
    pipes = [pipe, sharing(pipe)]
    configs = [SHORT, SHORT.replace(densities=(0.5, 0.8, 1.0), steps=7)]
    plain = [generate(each, num_inference_steps=4) for each in pipes]
    alone = []
    for each, config in zip(pipes, configs, strict=True):
        with jitaccel.apply(each, config):
            alone.append(generate(each))
    before = [attributes(each) for each in pipes]
    handles = [jitaccel.apply(each, config) for each, config in zip(pipes, configs, strict=True)]
    for _ in range(2):
        assert all(torch.equal(generate(each), image) for each, image in zip(pipes, alone, strict=True))
    handles[first].remove()
    assert torch.equal(generate(pipes[first], num_inference_steps=4), plain[first])
    assert torch.equal(generate(pipes[1 - first]), alone[1 - first])
    handles[1 - first].remove()
    for each, image, attributes_before in zip(pipes, plain, before, strict=True):
        assert torch.equal(generate(each, num_inference_steps=4), image)
        names = changed(attributes_before, attributes(each))
        assert not [name for name in names if name.startswith("transformer")]


def test_two_patched_pipelines_cannot_share_a_scheduler(pipe: Any) -> None:
    other = sharing(pipe, scheduler=True)
    before = attributes(pipe)
    with jitaccel.apply(pipe, SHORT):
        sparse = generate(pipe)
        with pytest.raises(jitaccel.ConfigError, match="scheduler of its own"):
            jitaccel.apply(other, SHORT)
        assert torch.equal(generate(pipe), sparse)
    jitaccel.apply(other, SHORT).remove()
    assert not [name for name in changed(before, attributes(pipe)) if not name.startswith("pipe:")]


def test_patch_does_not_keep_the_pipeline_alive() -> None:
    pipe = tiny.pipeline()
    transformer, scheduler = pipe.transformer, pipe.scheduler
    handle = jitaccel.apply(pipe, SHORT)
    generate(pipe)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert handle.stats().generations == 1 and "FluxPipeline" in repr(handle)
    handle.remove()
    assert "set_timesteps" not in vars(scheduler) and "forward" not in vars(transformer)


def test_parts_of_a_pipeline_that_is_gone_may_be_used_again() -> None:
    plain = generate(tiny.pipeline(), num_inference_steps=4)
    pipe = tiny.pipeline()
    components = pipe.components
    jitaccel.apply(pipe, SHORT)
    sparse = generate(pipe)
    del pipe
    gc.collect()
    again = tiny.pipeline(**components)
    assert torch.equal(generate(again, num_inference_steps=4), plain)
    with jitaccel.apply(again, SHORT):
        assert torch.equal(generate(again), sparse)
    assert torch.equal(generate(again, num_inference_steps=4), plain)
    assert "set_timesteps" not in vars(again.scheduler) and "forward" not in vars(again.transformer)


def test_apply_again_follows_parts_that_were_replaced(pipe: Any) -> None:
    other = tiny.pipeline(seed=1)
    with jitaccel.apply(other, SHORT):
        target = generate(other)
    old_transformer, old_scheduler = pipe.transformer, pipe.scheduler
    jitaccel.apply(pipe, SHORT)
    pipe.transformer = tiny.transformer(seed=1)
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(pipe), target)
        pipe.scheduler = tiny.scheduler()
        with jitaccel.apply(pipe, SHORT):
            assert torch.equal(generate(pipe), target)
    for part in (old_transformer, pipe.transformer, old_scheduler, pipe.scheduler):
        assert not {"forward", "set_timesteps", "step"} & vars(part).keys()
