"""ControlNets, dense and on the anchors only."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from tests.support import tiny
from tests.support.pipelines import call_of, flux_pipeline, run_pipeline
from tests.support.reference import denoise
from tests.support.tiny import DENSE, GRID, NUM_TOKENS, SHORT, relative_error

NAMES = ("FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline")
CONFIG = SHORT.replace(steps=8, schedule="native")


def _tokens(network: Any) -> list[int]:
    """Collects the image tokens of each forward of a network that really runs."""
    seen: list[int] = []
    network.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_dense_preset_leaves_both_networks_as_they_are(name: str) -> None:
    pipe = flux_pipeline(name)
    before = {**vars(pipe.controlnet)}
    expected = run_pipeline(pipe)
    with jitaccel.apply(pipe, DENSE, controlnet="anchors"):
        assert torch.equal(run_pipeline(pipe), expected)
    assert {**vars(pipe.controlnet)}.keys() - before.keys() <= {"_diffusers_hook"}
    assert torch.equal(run_pipeline(pipe), expected)


@pytest.mark.parametrize("name", NAMES)
def test_controlnet_runs_on_the_anchors_of_each_step_from_the_first_on(name: str) -> None:
    pipe = flux_pipeline(name)
    seen = _tokens(pipe.controlnet)
    with jitaccel.apply(pipe, CONFIG, controlnet="anchors") as handle:
        assert run_pipeline(pipe).isfinite().all()
        assert seen == [step.tokens for step in handle.stats().steps] and seen[0] < NUM_TOKENS == seen[-1]
        assert any("without the ControlNet" in note for note in handle.stats().notes)
        if "Inpaint" in name:
            inside = torch.zeros(GRID, dtype=torch.bool)
            inside[3:8, 2:6] = True
            assert set(inside.flatten().nonzero()[:, 0].tolist()) <= set(handle.stats().anchors[0][0].tolist())
    seen.clear()
    with jitaccel.apply(pipe, CONFIG):
        run_pipeline(pipe)
    assert seen == [NUM_TOKENS] * len(seen)


@torch.no_grad()
def test_residuals_are_those_of_the_controlnet_called_by_hand_on_the_anchors() -> None:
    pipe = flux_pipeline("FluxControlNetPipeline")
    asked: dict[str, Any] = {}

    def remember(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        asked.setdefault("call", {**kwargs})

    hook = pipe.controlnet.register_forward_pre_hook(remember, with_kwargs=True)
    with jitaccel.apply(pipe, SHORT):
        run_pipeline(pipe)
    hook.remove()
    state = tiny.start(7)

    def velocity(tokens: Tensor, at: Tensor, level: float) -> Tensor:
        ids = asked["call"]["img_ids"][at]
        given = {
            **asked["call"],
            "hidden_states": tokens,
            "controlnet_cond": asked["call"]["controlnet_cond"][:, at],
            "img_ids": ids,
            "timestep": torch.tensor([level]),
        }
        double, single = pipe.controlnet(**given)
        for name in ("controlnet_cond", "controlnet_mode", "conditioning_scale"):
            given.pop(name)
        return pipe.transformer(**given, controlnet_block_samples=double, controlnet_single_block_samples=single)[0]

    levels = jitaccel.noise_levels(SHORT)
    expected = denoise(velocity, SHORT, GRID, state, levels).states[-1]
    with jitaccel.apply(pipe, SHORT, controlnet="anchors"):
        assert relative_error(run_pipeline(pipe, latents=state), expected) < 1e-4
    with jitaccel.apply(pipe, SHORT):
        assert relative_error(run_pipeline(pipe, latents=state), expected) > 1e-4  # it sees the whole picture


def test_images_of_a_batch_have_their_own_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(encoded, "sample", lambda self, generator=None: self.mode())  # else each draws its own picture
    pipe = flux_pipeline("FluxControlNetPipeline")
    states = [tiny.start(seed) for seed in (1, 2)]
    with jitaccel.apply(pipe, SHORT, controlnet="anchors") as handle:
        alone = [run_pipeline(pipe, latents=state) for state in states]
        control = call_of("FluxControlNetPipeline")["control_image"]
        call = {"prompt": ["a red circle"] * 2, "control_image": torch.cat([control] * 2)}
        together = run_pipeline(pipe, latents=torch.cat(states), **call)
        first, second = handle.stats().anchors[1]
    assert relative_error(together, torch.cat(alone)) < 1e-5 and not torch.equal(first, second)


def test_several_controlnets_all_run_on_the_anchors() -> None:
    pipe = flux_pipeline("FluxControlNetPipeline")
    other = flux_pipeline("FluxControlNetPipeline").controlnet
    pipe.controlnet = diffusers.FluxMultiControlNetModel([pipe.controlnet, other])
    image = call_of("FluxControlNetPipeline")["control_image"]
    seen = [_tokens(network) for network in pipe.controlnet.nets]
    call = {"control_image": [image, image], "control_mode": [0, 0], "controlnet_conditioning_scale": [0.5, 0.7]}
    with jitaccel.apply(pipe, SHORT, controlnet="anchors") as handle:
        run_pipeline(pipe, **call)
        assert seen == [[step.tokens for step in handle.stats().steps]] * 2


def test_two_pipelines_share_a_controlnet() -> None:
    first, second = (flux_pipeline("FluxControlNetPipeline") for _ in range(2))
    second.controlnet = first.controlnet
    seen = _tokens(first.controlnet)
    expected = run_pipeline(second)
    with jitaccel.apply(first, SHORT, controlnet="anchors"):
        seen.clear()
        assert torch.equal(run_pipeline(second), expected) and set(seen) == {NUM_TOKENS}
        run_pipeline(first)
        assert seen[-5] < NUM_TOKENS


def test_exception_ends_the_generation() -> None:
    pipe = flux_pipeline("FluxControlNetPipeline")
    with jitaccel.apply(pipe, SHORT, controlnet="anchors"):
        clean = run_pipeline(pipe)
        hook = pipe.controlnet.controlnet_blocks[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pipeline(pipe)
        hook.remove()
        assert torch.equal(run_pipeline(pipe), clean)


def test_what_has_no_such_controlnet_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a pipeline with a FluxControlNetModel, got NoneType"):
        jitaccel.apply(tiny.pipeline(), controlnet="anchors")
    with pytest.raises(ConfigError, match="controlnet must be 'dense' for a target that is not a pipeline"):
        jitaccel.apply(tiny.transformer(), controlnet="anchors")
    with pytest.raises(ConfigError, match="controlnet must be one of dense, anchors"):
        jitaccel.apply(tiny.pipeline(), controlnet="sparse")  # type: ignore[arg-type]
    pipe = flux_pipeline("FluxControlNetPipeline")
    pipe.controlnet.input_hint_block = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="reads the whole picture"):
        jitaccel.apply(pipe, controlnet="anchors")
    for network in (pipe.controlnet, pipe.transformer):
        assert "_diffusers_hook" not in vars(network)
