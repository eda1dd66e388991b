"""Models that packed execution does not cover run indexed, and say why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.patches.flux.packed import reasons_unpackable
from tests.support import tiny
from tests.support.tiny import DENSE, SHORT, WIDTH, counted, generate, relative_error


def custom_processor(pipe: Any) -> None:
    class Mine(FluxAttnProcessor):  # type: ignore[misc]
        pass

    pipe.transformer.transformer_blocks[0].attn.set_processor(Mine())


def chosen_backend(pipe: Any) -> None:
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = diffusers.models.attention_dispatch.AttentionBackendName.NATIVE


def forward_hook(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: None)


def replaced_forward(pipe: Any) -> None:
    block = pipe.transformer.transformer_blocks[0]
    block.forward = block.forward


def compiled_block(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].compile(backend="eager")


def derived_model(pipe: Any) -> None:
    class Mine(type(pipe.transformer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    pipe.transformer.__class__ = Mine


def checkpointing(pipe: Any) -> None:
    pipe.transformer.enable_gradient_checkpointing()


FALLBACKS: dict[str, tuple[Callable[[Any], None], str]] = {
    "processor": (custom_processor, "an attention processor is a Mine"),
    "backend": (chosen_backend, "set_attention_backend chose"),
    "hook": (forward_hook, "single_transformer_blocks.0 has forward hooks"),
    "forward": (replaced_forward, "forward of transformer_blocks.0 is replaced"),
    "derived": (derived_model, "Mine has a forward that is not diffusers'"),
    "compiled": (compiled_block, "a FluxSingleTransformerBlock is compiled"),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_model_that_is_not_covered_runs_indexed_and_says_why(pipe: Any, case: str, when: str) -> None:
    change, reason = FALLBACKS[case]
    with jitaccel.apply(pipe, SHORT, execution="indexed"):
        expected = generate(pipe)
    if when == "before":
        change(pipe)
    with jitaccel.apply(pipe, SHORT) as handle:
        if when == "after":
            change(pipe)
        assert relative_error(generate(pipe), expected) < 1e-5
        stats = handle.stats()
    assert stats.execution == "indexed" and stats.attention is None
    assert any(reason in note for note in stats.notes) and reason in str(stats)


@pytest.mark.parametrize("case", FALLBACKS)
def test_strict_makes_a_fallback_an_error(pipe: Any, case: str) -> None:
    change, reason = FALLBACKS[case]
    with jitaccel.apply(pipe, SHORT, strict=True) as handle:
        change(pipe)
        with pytest.raises(UnsupportedModelError, match=reason):
            generate(pipe)
        handle.remove()
        with pytest.raises(UnsupportedModelError, match=f"{reason}.*use strict=False"):
            jitaccel.apply(pipe, SHORT, strict=True)
    assert "_diffusers_hook" not in vars(pipe.transformer) or not pipe.transformer._diffusers_hook.hooks


def test_gradient_checkpointing_runs_indexed() -> None:
    model = tiny.transformer()
    model.enable_gradient_checkpointing()
    assert reasons_unpackable(model) == ["gradient checkpointing is on"]
    with torch.no_grad():
        assert reasons_unpackable(model) == []


def test_ip_adapter_runs_indexed_and_is_honoured(pipe: Any) -> None:
    """The adapter's own image tokens, for any subset of the picture's."""
    model = pipe.transformer
    torch.manual_seed(0)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(WIDTH, WIDTH, 2)])
    for block in model.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(
            hidden_size=2 * 16, cross_attention_dim=WIDTH, num_tokens=(2,), scale=[1.0]
        )
        block.attn.set_processor(processor)
    faces = [torch.randn(2, 1, WIDTH), torch.randn(2, 1, WIDTH)]
    pipe.encode_image = None

    def image(face: Tensor, seeds: tuple[int, ...], **call: Any) -> Tensor:
        return generate(
            pipe, seeds, prompt=["a"] * len(seeds), joint_attention_kwargs={"ip_adapter_image_embeds": [face]}, **call
        )

    plain = image(faces[0], (1, 2), num_inference_steps=3)
    assert relative_error(image(faces[1], (1, 2), num_inference_steps=3), plain) > 1e-3
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(image(faces[0], (1, 2), num_inference_steps=3), plain)
    with jitaccel.apply(pipe, SHORT) as handle:
        together = image(faces[0], (1, 2))
        assert relative_error(image(faces[0][1:], (2,)), together[1:]) < 1e-5
        assert relative_error(image(faces[1], (1, 2)), together) > 1e-3
        stats = handle.stats()
    assert stats.execution == "indexed" and any("FluxIPAdapterAttnProcessor" in note for note in stats.notes)


def test_dense_configuration_keeps_the_models_own_forward_unless_asked(pipe: Any) -> None:
    with jitaccel.apply(pipe, DENSE, strict=True) as handle:
        generate(pipe, num_inference_steps=2)
        assert handle.stats().execution == "indexed" and handle.stats().notes == ()
    with jitaccel.apply(pipe, DENSE, execution="packed") as handle:
        generate(pipe, num_inference_steps=2)
        assert handle.stats().execution == "packed"


def test_fallback_of_what_was_asked_for_is_logged(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    custom_processor(pipe)
    with caplog.at_level(logging.INFO, logger="jitaccel"):
        jitaccel.apply(pipe, SHORT, execution="packed").remove()
        jitaccel.apply(pipe, SHORT).remove()
    levels = [record.levelno for record in caplog.records if "indexed execution" in record.message]
    assert levels == [logging.WARNING, logging.INFO]


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"execution": "pakced"},
            "execution must be one of auto, packed, indexed, got 'pakced'; did you mean \"packed\"",
        ),
        ({"attention": "flash"}, "attention must be one of"),
        ({"attention": "flashattn"}, 'did you mean "flash_attn"'),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(pipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        jitaccel.apply(pipe, SHORT, **options)
    assert "_diffusers_hook" not in vars(pipe.transformer)


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn", "torch_varlen", "xformers"])
def test_backend_that_cannot_be_used_is_refused_before_the_network_runs(pipe: Any, name: Any) -> None:
    with jitaccel.apply(pipe, SHORT, execution="packed", attention=name), counted(pipe.transformer) as seen:
        with pytest.raises(ConfigError, match=name):
            generate(pipe)
        assert seen == []
    assert generate(pipe, num_inference_steps=1).isfinite().all()
