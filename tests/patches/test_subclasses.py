"""Classes are known by what they derive from in diffusers: subclasses run, namesakes of other packages do not."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import UnsupportedModelError, generate_batch
from jitaccel.patches.diffusers.pipelines import check_text_to_image
from tests.support import tiny
from tests.support.pipelines import call_of, flux_pipeline
from tests.support.tiny import GRID, SHORT, TEXT_TOKENS


def as_own(pipe: Any, name: str = "Own") -> Any:
    """Returns a pipeline of a user's class that derives from the pipeline's."""
    own = type(name, (type(pipe),), {"__module__": __name__})(**pipe.components)
    own.set_progress_bar_config(disable=True)
    return own


def run(pipe: Any) -> Tensor:
    latents: Tensor = pipe(**call_of("FluxControlNetPipeline"), generator=torch.Generator().manual_seed(0))[0]
    return latents


def test_subclass_of_flux_shares_forwards_between_requests() -> None:
    pipe = as_own(tiny.pipeline())
    check_text_to_image(pipe)
    height, width = (side * tiny.PIXELS_PER_TOKEN for side in GRID)
    settings: dict[str, Any] = {"height": height, "width": width, "preset": SHORT, "max_sequence_length": TEXT_TOKENS}
    requests = [jitaccel.Request(prompt="a red circle", seed=seed, **settings) for seed in (1, 2)]
    with tiny.counted(pipe.transformer) as seen:
        outcomes = generate_batch(pipe, requests, output_type="latent")
    assert len(seen) == SHORT.steps
    for request, outcome in zip(requests, outcomes, strict=True):
        (alone,) = generate_batch(tiny.pipeline(), [request], output_type="latent")
        assert tiny.relative_error(outcome.image, alone.image) < 1e-5


def test_controlnet_of_a_subclass_runs_on_the_anchors() -> None:
    pipe = as_own(flux_pipeline("FluxControlNetPipeline"))
    expected = flux_pipeline("FluxControlNetPipeline")
    pipe.controlnet.__class__ = type("OwnNet", (diffusers.FluxControlNetModel,), {"__module__": __name__})
    with jitaccel.apply(pipe, SHORT, controlnet="anchors"):
        found = run(pipe)
    with jitaccel.apply(expected, SHORT, controlnet="anchors"):
        assert torch.equal(found, run(expected))


def test_namesake_of_another_package_is_told_from_diffusers_own() -> None:
    pipe = flux_pipeline("FluxControlPipeline")
    namesake = as_own(pipe, "FluxPipeline")
    with jitaccel.apply(namesake, SHORT) as handle:
        assert "FluxPipeline" in repr(handle)
    with pytest.raises(UnsupportedModelError, match="pipeline must be a FluxPipeline"):
        check_text_to_image(namesake)
