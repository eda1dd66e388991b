"""ComfyUI: refused samplings, interrupted samplings, and other patches of the same model."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from tests.support import comfy_stand_in as comfy
from tests.support.comfy_models import LEVELS, SIZE, applied, condition, flux1, sample, start
from tests.support.comfy_stand_in import KSAMPLER, BaseModel, CFGGuider, ModelPatcher
from tests.support.models import noise
from tests.support.tiny import NUM_TOKENS, SHORT, relative_error


def test_late_start_places_the_stages_on_the_steps_that_run() -> None:
    model = flux1()
    levels = torch.tensor(jitaccel.noise_levels(SHORT, 10))[-6:]
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model), levels, latent_image=noise(4, 1, 4, *SIZE))
        assert [step.tokens for step in handle.stats().steps] == [50, 50, 93, 144, 144]
        with pytest.raises(ConfigError, match="every stage at least one step, got 2"):
            sample(handle.target, start(model), levels[-3:], latent_image=noise(4, 1, 4, *SIZE))
        sample(handle.target, start(model), torch.linspace(1, 0, 9))
        assert "sampler takes 8 steps" in handle.stats().notes[0]


class OtherGuider(CFGGuider):
    def predict_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().predict_noise(*args, **kwargs)


def renormalise(args: Any) -> Tensor:
    return args["denoised"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heun": ({"sampler": KSAMPLER(comfy.sample_heun)}, "the sampler must be 'euler'"),
    "churn": ({"sampler": KSAMPLER(extra_options={"s_churn": 0.5})}, "must add no noise"),
    "guider": ({"guider": OtherGuider}, "the guider must be one of CFGGuider, Guider_DualCFG"),
    "renormalised": ({"sampler_post_cfg_function": [renormalise]}, "sampler_post_cfg_function renormalise"),
    "windows": ({"context_handler": object()}, "context_handler object"),
    "split levels": ({"levels": LEVELS[:-1]}, "sigmas must fall from a level"),
    "goes on": ({"x": torch.zeros(1, 4, *SIZE)}, "must start from new noise"),
    "areas": ({"conds": {"positive": [{**condition(), "area": (8, 8, 0, 0)}]}}, "conditions must apply to the whole"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_or_runs_dense_on_request(name: str, caplog: pytest.LogCaptureFixture) -> None:
    given, message = REFUSED[name]
    model = flux1()
    call = {"x": start(model), **given}
    expected = sample(ModelPatcher(BaseModel(model)), **call)
    with applied(model, SHORT) as handle:
        with pytest.raises(UnsupportedModelError, match=message):
            sample(handle.target, **call)
        assert sample(handle.target, start(model)).isfinite().all()
    with applied(model, SHORT, on_unsupported="dense") as handle:
        with caplog.at_level(logging.WARNING):
            assert torch.equal(sample(handle.target, **call), expected)
        assert message in caplog.text and "ran dense" in handle.stats().notes[0]
        assert sample(handle.target, start(model)).isfinite().all()
        assert len(handle.stats().steps) == 5 and not handle.stats().notes


def test_other_models_and_other_predictions_are_refused() -> None:
    model = flux1()
    base = BaseModel(model)
    patcher = ModelPatcher(base)
    with jitaccel.apply(patcher, SHORT) as handle:
        base.diffusion_model = model.inner
        with pytest.raises(UnsupportedModelError, match=r"must be one of FLUX.1, FLUX.2 and Chroma, got FluxTransf"):
            CFGGuider(handle.target, {"positive": [condition()]}).sample(start(model), KSAMPLER(), LEVELS)
        base.diffusion_model, base.model_sampling = model, object()  # type: ignore[assignment]
        with pytest.raises(UnsupportedModelError, match="must predict velocities"):
            CFGGuider(handle.target, {"positive": [condition()]}).sample(start(model), KSAMPLER(), LEVELS)


def test_an_exception_ends_the_sampling_and_leaves_the_model_whole() -> None:
    model = flux1()

    def interrupt(state: dict[str, Any]) -> None:
        if state["i"] == 2:
            raise InterruptedError

    with applied(model, SHORT) as handle:
        clean = sample(handle.target, start(model))
        with pytest.raises(InterruptedError):
            sample(handle.target, start(model), callback=interrupt)
        assert "forward_orig" not in vars(model)
        assert torch.equal(sample(handle.target, start(model)), clean)


def test_forward_of_another_node_runs_on_the_anchors_and_is_put_back() -> None:
    model = flux1()
    seen = []
    original = model.forward_orig

    def other(img: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(img.shape[1])
        return original(img, *args, **kwargs)

    model.forward_orig = other  # type: ignore[method-assign]
    with applied(model, SHORT) as handle:
        sample(handle.target, start(model))
    assert vars(model)["forward_orig"] is other and seen[0] in (50, NUM_TOKENS)


def test_cache_that_answers_in_place_of_the_model_is_told() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        cache = lambda executor, x, *rest, **more: torch.zeros_like(x)  # noqa: E731
        handle.target.wrappers["diffusion_model"] = {"cache": [cache], **handle.target.wrappers["diffusion_model"]}
        with pytest.raises(RuntimeError, match="another node answered"):
            sample(handle.target, start(model))
        ours = handle.target.wrappers["diffusion_model"].pop("jitaccel")  # and a cache that was added after us
        handle.target.wrappers["diffusion_model"] = {"jitaccel": ours, "cache": [cache]}
        with pytest.raises(RuntimeError, match="another node answered"):
            sample(handle.target, start(model))
        assert "forward_orig" not in vars(model)


def test_not_finite_is_told() -> None:
    for step in (0, 4):
        model = flux1()

        def spoil(state: dict[str, Any], step: int = step, model: Any = model) -> None:
            if state["i"] + 1 == step:
                model.inner.proj_out.weight.data.fill_(float("nan"))

        spoil({"i": -1})
        with (
            applied(model, SHORT) as handle,
            pytest.raises(jitaccel.NonFiniteVelocityError, match=f"at step {step}"),
        ):
            sample(handle.target, start(model), callback=spoil)


def test_model_that_is_compiled_whole_gives_the_same_picture() -> None:
    model = flux1()
    with applied(model, SHORT) as handle:
        expected = sample(handle.target, start(model))
        handle.target.model.diffusion_model = torch.compile(model, backend="eager")
        assert relative_error(sample(handle.target, start(model)), expected) < 1e-5


def test_blocks_that_are_compiled_one_by_one_stay_compiled() -> None:
    model, calls = flux1(), []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    with applied(model, SHORT) as handle:
        expected = sample(handle.target, start(model))
        model.inner.transformer_blocks[0].compile(backend=backend, dynamic=False)
        assert relative_error(sample(handle.target, start(model)), expected) < 1e-5
    assert len(calls) >= 3  # a graph for each stage
    torch._dynamo.reset()
