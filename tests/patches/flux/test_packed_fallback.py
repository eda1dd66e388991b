"""Models that packed execution does not cover run indexed, and say why."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.patches.flux.unpackable import reasons_unpackable
from tests.support import tiny
from tests.support.tiny import DENSE, SHORT, WIDTH, counted, generate, relative_error


def custom_processor(pipe: Any) -> None:
    class Mine(FluxAttnProcessor):  # type: ignore[misc]
        pass

    pipe.transformer.transformer_blocks[0].attn.set_processor(Mine())


def chosen_backend(pipe: Any) -> None:
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = diffusers.models.attention_dispatch.AttentionBackendName._NATIVE_MATH


def forward_hook(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: None)


def replaced_forward(pipe: Any) -> None:
    block = pipe.transformer.transformer_blocks[0]
    block.forward = functools.partial(block.forward)


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
    "backend": (chosen_backend, "diffusers' attention backend is '_native_math'"),
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


# Forwards that others replaced


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a forward with a further argument, like PuLID's, that doubles the velocity."""

    @functools.wraps(forward)  # gives it the name and module of diffusers' forward
    def mine(*args: Any, identity: Any = None, **kwargs: Any) -> Any:
        return (2 * forward(*args, **kwargs)[0],)

    vars(mine)["__signature__"] = inspect.Signature(
        [
            *inspect.signature(forward).parameters.values(),
            inspect.Parameter("identity", inspect.Parameter.KEYWORD_ONLY, default=None),
        ]
    )
    return mine


def on_instance(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.transformer.forward = doubled(pipe.transformer.forward)


def as_method(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipe.transformer
    model.forward = types.MethodType(doubled(type(model).forward), model)


def on_class(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(pipe.transformer)
    monkeypatch.setattr(kind, "forward", doubled(kind.forward))


def beneath_offloading(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_instance(pipe, monkeypatch)
    accelerate.hooks.add_hook_to_module(pipe.transformer, accelerate.hooks.ModelHook())


def over_offloading(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate.hooks.add_hook_to_module(pipe.transformer, accelerate.hooks.ModelHook())
    on_instance(pipe, monkeypatch)


def beneath_another_hook(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_instance(pipe, monkeypatch)
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(diffusers.hooks.ModelHook(), "mine")


REPLACED = [on_instance, as_method, on_class, beneath_offloading, over_offloading, beneath_another_hook]


@pytest.mark.parametrize("execution", ["auto", "packed", "indexed"])
@pytest.mark.parametrize("replace", REPLACED)
def test_forward_replaced_before_apply_is_called(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, replace: Callable[..., None], execution: Any
) -> None:
    with jitaccel.apply(pipe, SHORT, execution="indexed"):
        plain = generate(pipe)
    for parameter in pipe.transformer.proj_out.parameters():  # doubles the velocity through the weights
        parameter.data.mul_(2)
    with jitaccel.apply(pipe, SHORT, execution="indexed"):
        expected = generate(pipe)
    for parameter in pipe.transformer.proj_out.parameters():
        parameter.data.div_(2)
    replace(pipe, monkeypatch)
    with jitaccel.apply(pipe, SHORT, execution=execution) as handle:
        assert torch.equal(generate(pipe), expected)
        assert handle.stats().execution == "indexed"
    assert relative_error(plain, expected) > 1e-2


@pytest.mark.parametrize("execution", ["auto", "indexed"])
def test_forward_of_the_class_replaced_after_apply_is_called(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, execution: Any
) -> None:
    with monkeypatch.context() as replaced:
        on_class(pipe, replaced)
        with jitaccel.apply(pipe, SHORT, execution="indexed"):
            expected = generate(pipe)
    with jitaccel.apply(pipe, SHORT, execution=execution):
        on_class(pipe, monkeypatch)
        assert torch.equal(generate(pipe), expected)


def test_forward_of_the_class_replaced_behind_hooks_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate.hooks.add_hook_to_module(pipe.transformer, accelerate.hooks.ModelHook())
    with jitaccel.apply(pipe, SHORT):
        on_class(pipe, monkeypatch)
        with pytest.raises(UnsupportedModelError, match="forward must be replaced before apply"):
            generate(pipe)


@pytest.mark.parametrize("execution", ["auto", "indexed"])
def test_forward_that_hides_the_patch_is_an_error(pipe: Any, execution: Any) -> None:
    with jitaccel.apply(pipe, SHORT, execution=execution):
        pipe.transformer.forward = types.MethodType(type(pipe.transformer).forward, pipe.transformer)
        with pytest.raises(RuntimeError, match="its forward restored"):
            generate(pipe)


@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_replaced_method_of_a_block_or_processor_runs_indexed(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    kind: Any = type(pipe.transformer.single_transformer_blocks[0]) if name == "forward" else FluxAttnProcessor
    original = getattr(kind, name)

    @functools.wraps(original)
    def mine(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    if when == "before":
        monkeypatch.setattr(kind, name, mine)
    with jitaccel.apply(pipe, SHORT) as handle:
        monkeypatch.setattr(kind, name, mine)
        generate(pipe)
        notes = handle.stats().notes
    assert any(f"{kind.__name__} has a {name} that is not diffusers'" in note for note in notes)


def test_further_arguments_of_a_replaced_forward_reach_it(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = pipe.transformer, []
    inner = model.forward

    def mine(*args: Any, identity: Any = None, **kwargs: Any) -> Any:
        seen.append(identity)
        return inner(*args, **kwargs)

    model.forward = mine
    state = tiny.start()
    arguments = {
        "hidden_states": state,
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "encoder_hidden_states": torch.zeros(1, 2, WIDTH),
        "pooled_projections": torch.zeros(1, WIDTH),
        "txt_ids": torch.zeros(2, 3),
        "img_ids": pipe._prepare_latent_image_ids(1, *tiny.GRID, state.device, state.dtype),
    }
    with torch.no_grad(), jitaccel.apply(model, SHORT):
        model(**arguments, identity="a face")
        assert seen == ["a face"]
        with pytest.raises(TypeError, match="unknown"):
            model(**arguments, unknown=1)


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
