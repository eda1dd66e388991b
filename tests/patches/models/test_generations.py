"""Properties of whole generations in every pipeline of a cut model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitaccel
from jitaccel.errors import UnsupportedModelError
from jitaccel.patches.models import MODELS, model_of
from tests.support.generations import GENERATIONS, Generation
from tests.support.qwen import LAYERED, small_references
from tests.support.tiny import DENSE, SHORT, offload_groups, relative_error

ELSEWHERE = {"WanImageToVideoPipeline", "WanVACEPipeline"}  # test_wan.py
ONE_PROMPT = {"QwenImageEditPipeline", "QwenImageEditPlusPipeline"}
RESIZED = {*ONE_PROMPT, LAYERED}  # they choose the size themselves
LATE = {"QwenImageImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"}  # they start among the levels


@pytest.fixture(params=GENERATIONS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in RESIZED:
        small_references(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def subject(name: str) -> Generation:
    return GENERATIONS[name]


def test_every_pipeline_is_here() -> None:
    known = {pipeline for model in MODELS for pipeline in model.pipelines}
    assert known == {name.partition(",")[0] for name in GENERATIONS} | ELSEWHERE


def test_density_one_is_the_unpatched_pipeline_bit_for_bit(name: str, subject: Generation) -> None:
    pipe = subject.make()
    calls: list[dict[str, Any]] = [{}, subject.unguided, *([] if name in ONE_PROMPT else [{"batch": 2}])]
    plain = [subject.generate(pipe, **call) for call in calls]
    with jitaccel.apply(pipe, DENSE):
        for call, latents in zip(calls, plain, strict=True):
            assert torch.equal(subject.generate(pipe, **call), latents)
    assert torch.equal(subject.generate(pipe), plain[0])


def test_image_of_a_batch_is_the_one_made_alone(name: str, subject: Generation) -> None:
    if name in ONE_PROMPT:
        pytest.skip("the pipeline takes one prompt")
    pipe, steps = subject.make(), {"steps": 7} if name in LATE else {}
    with jitaccel.apply(pipe, "few-steps" if name in LATE else SHORT) as handle:
        together = subject.generate(pipe, batch=2, **steps)
        stats = handle.stats()
        for image in range(2):
            alone = subject.generate(pipe, seed=image, **subject.alone(image), **steps)
            assert relative_error(together[image : image + 1], alone) < 1e-5
    assert stats.batch == 2
    if name not in LATE:
        assert not torch.equal(stats.anchors[1][0], stats.anchors[1][1])


@pytest.mark.parametrize("name", ["HunyuanVideoImageToVideoPipeline", "LTX2Pipeline", LAYERED])
def test_offloaded_groups_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == LAYERED:
        small_references(monkeypatch, name)
    subject = GENERATIONS[name]
    pipe = subject.make()
    with jitaccel.apply(pipe, SHORT):
        expected = subject.generate(pipe)
    offload_groups(pipe.transformer, "block_level")
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(subject.generate(pipe), expected)


def test_what_is_compiled_is_said(name: str, subject: Generation) -> None:
    if name in ONE_PROMPT | LATE:
        pytest.skip("the model is compiled through another pipeline")
    pipe = subject.make()
    known = model_of(pipe.transformer)
    if known is not None and known.uncompiled is not None:
        with pytest.raises(UnsupportedModelError, match=f"{known.name}: {known.uncompiled}; use compile=False"):
            jitaccel.apply(pipe, SHORT, compile=True, strict=True)
        with jitaccel.apply(pipe, SHORT, compile=True) as handle:
            assert subject.generate(pipe).isfinite().all()
            stats = handle.stats()
            assert stats.compiled is None and f"not compiled, because {known.uncompiled}" in stats.notes
        return
    with jitaccel.apply(pipe, SHORT):
        eager = subject.generate(pipe)
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager"}, strict=True) as handle:
        assert relative_error(subject.generate(pipe), eager) < 1e-6
        assert relative_error(subject.generate(pipe, seed=1), eager) > 1e-2
    model, compiled = model_of(pipe.transformer), handle.stats().compiled
    assert model is not None and compiled is not None
    assert compiled.what == ("blocks" if model.blocks else "stages") and compiled.eager_calls == 0
    if not model.blocks:
        assert compiled.graphs == compiled.signatures == 3
