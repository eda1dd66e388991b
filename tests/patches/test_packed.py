"""Packed execution of diffusers' FLUX.1: the model's own result, in one forward, whatever is loaded into the model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.execution.attention.choice import choose_backend, varlen_attention
from jitaccel.patches.flux.packed import Conditions, make_pack, packed_forward, reasons_unpackable
from tests.support import tiny
from tests.support.tiny import (
    DENSE,
    GRID,
    SHORT,
    TEXT_TOKENS,
    WIDTH,
    counted,
    generate,
    ids,
    relative_error,
    start,
)

GUIDED: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 3.0}
CPU = torch.device("cpu")


# One forward


def conditions(lengths: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> list[dict[str, Tensor]]:
    """Returns the arguments of one image for each length of text; levels differ, too."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "encoder_hidden_states": torch.randn(1, length, WIDTH, generator=g).to(dtype),
            "pooled_projections": torch.randn(1, WIDTH, generator=g).to(dtype),
            "timestep": torch.tensor([0.9 - 0.2 * k], dtype=dtype),
            "guidance": torch.tensor([3.0 + k]),
            "txt_ids": torch.zeros(length, 3),
        }
        for k, length in enumerate(lengths)
    ]


def packed(model: Any, states: list[Tensor], image_ids: list[Tensor], each: list[dict[str, Tensor]]) -> list[Tensor]:
    backend = choose_backend("sdpa", CPU, states[0].dtype, 16)
    tokens = torch.cat([state[0] for state in states])
    given = Conditions(
        text=torch.cat([c["encoder_hidden_states"][0] for c in each]),
        pooled=torch.cat([c["pooled_projections"] for c in each]),
        level=torch.cat([c["timestep"] for c in each]),
        guidance=torch.cat([c["guidance"] for c in each]),
    )
    pack = make_pack(model, [c["txt_ids"] for c in each], image_ids)
    out = packed_forward(model, pack, tokens, given, lambda q, k, v, layout: varlen_attention(q, k, v, layout, backend))
    return [*out.split([state.shape[1] for state in states])]


CASES = {
    "one": ((TEXT_TOKENS,), (GRID,)),
    "same": ((TEXT_TOKENS,) * 3, (GRID,) * 3),
    "sizes": ((TEXT_TOKENS,) * 2, ((3, 4), GRID)),
    "texts": ((3, TEXT_TOKENS, 1), (GRID,) * 3),
    "all": ((3, TEXT_TOKENS, 1), ((4, 4), (2, 9), GRID)),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_segment_gets_what_the_model_gives_it_alone(case: str) -> None:
    lengths, grids = CASES[case]
    model = tiny.transformer(num_layers=2, num_single_layers=2)
    each = conditions(lengths, torch.float32)
    states = [start(k, grid) for k, grid in enumerate(grids)]
    answers = packed(model, states, [ids(grid) for grid in grids], each)
    for answer, state, grid, condition in zip(answers, states, grids, each, strict=True):
        alone = model(hidden_states=state, img_ids=ids(grid), return_dict=False, **condition)[0]
        assert relative_error(answer, alone[0]) < 1e-5


@torch.no_grad()
def test_one_segment_gets_the_models_own_bits() -> None:
    model, each = tiny.transformer(num_layers=2, num_single_layers=2), conditions((TEXT_TOKENS,), torch.float32)
    alone = model(hidden_states=start(), img_ids=ids(), return_dict=False, **each[0])[0]
    assert torch.equal(packed(model, [start()], [ids()], each)[0], alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_good_as_the_models_own(dtype: torch.dtype) -> None:
    lengths, grids = CASES["all"]
    model = tiny.transformer(num_layers=2, num_single_layers=2).to(dtype)
    exact = tiny.transformer(num_layers=2, num_single_layers=2)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    each = conditions(lengths, dtype)
    states = [start(k, grid).to(dtype) for k, grid in enumerate(grids)]
    answers = packed(model, states, [ids(grid) for grid in grids], each)
    for answer, state, grid, condition in zip(answers, states, grids, each, strict=True):
        own = model(hidden_states=state, img_ids=ids(grid), return_dict=False, **condition)[0][0]
        doubles = {name: value.double() for name, value in condition.items()}
        truth = exact(hidden_states=state.double(), img_ids=ids(grid), return_dict=False, **doubles)[0][0]
        rms = [float((x.double() - truth).square().mean().sqrt()) for x in (answer, own)]
        assert rms[0] <= 2 * rms[1]


@torch.no_grad()
def test_nothing_passes_from_one_segment_to_another() -> None:
    lengths, grids = CASES["all"]
    model = tiny.transformer()
    each, states = conditions(lengths, torch.float32), [start(k, grid) for k, grid in enumerate(grids)]
    image_ids = [ids(grid) for grid in grids]
    before = packed(model, states, image_ids, each)
    states[1] = states[1].fill_(float("nan"))
    after = packed(model, states, image_ids, each)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2]) and after[1].isnan().all()


def test_gradients_reach_the_weights() -> None:
    model = tiny.transformer()
    answer = packed(model, [start()], [ids()], conditions((TEXT_TOKENS,), torch.float32))[0]
    answer.square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


# Through the pipeline


@pytest.mark.parametrize("call", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_makes_the_indexed_image(pipe: Any, call: dict[str, Any], batch: int) -> None:
    call = {"prompt": ["a red circle", "blue", "green square"][:batch], **call}
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * batch
    images = {}
    for execution in ("packed", "indexed"):
        with jitaccel.apply(pipe, SHORT, execution=execution) as handle:
            images[execution] = generate(pipe, range(batch), **call)
            assert handle.stats().execution == execution
    assert relative_error(images["packed"], images["indexed"]) < 1e-5


@pytest.mark.parametrize(("call", "branches"), [({}, 1), (GUIDED, 2)], ids=["plain", "guided"])
def test_batch_runs_in_one_forward_a_branch(pipe: Any, call: dict[str, Any], branches: int) -> None:
    counts = SHORT.token_counts(tiny.NUM_TOKENS)
    for batch in (1, 2):
        each = {key: [value] * batch if key == "negative_prompt" else value for key, value in call.items()}
        with jitaccel.apply(pipe, SHORT) as handle, counted(pipe.transformer) as seen:
            generate(pipe, range(batch), prompt=["a red circle"] * batch, **each)
        tokens = [count * batch for count in (counts[0], counts[0], counts[1], counts[2], counts[2])]
        assert seen == [count for count in tokens for _ in range(branches)]
        stats = handle.stats()
        assert [step.calls for step in stats.steps] == [branches] * 5
        assert stats.execution == "packed" and stats.attention == "sdpa"


def test_negative_prompt_that_is_written_between_steps_counts(pipe: Any) -> None:
    """A callback that writes the negative prompt between two steps changes what the second call asks."""

    def edit(own: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            tensors["negative_prompt_embeds"].mul_(-1.0)
        return {}

    call = {**GUIDED, "callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "negative_prompt_embeds"]
    images = []
    for execution in ("packed", "indexed"):
        with jitaccel.apply(pipe, SHORT, execution=execution):
            images.append(generate(pipe, **call))
    assert relative_error(images[0], images[1]) < 1e-5


def test_guidance_that_is_dropped_half_way_is_not_run_on(pipe: Any) -> None:
    model, levels, places = pipe.transformer, jitaccel.noise_levels(SHORT), ids()
    prompts = conditions((TEXT_TOKENS, TEXT_TOKENS), torch.float32)
    images = []
    for execution in ("packed", "indexed"):
        state = start()
        with (
            jitaccel.apply(model, SHORT, noise_levels=levels, execution=execution),
            torch.no_grad(),
            counted(model) as seen,
        ):  # type: ignore[arg-type]
            for index, (level, after) in enumerate(pairwise(levels)):
                asked = prompts if index < 3 else prompts[:1]
                answers = [
                    model(
                        hidden_states=state,
                        img_ids=places,
                        return_dict=False,
                        **{**prompt, "timestep": torch.tensor([level])},
                    )[0]
                    for prompt in asked
                ]
                state = state + (after - level) * sum(answers) / len(answers)
        images.append(state)
        tokens = SHORT.token_counts(tiny.NUM_TOKENS)
    assert relative_error(images[0], images[1]) < 1e-5
    assert seen[-1] == tokens[2]


def test_inference_mode_makes_the_same_guided_image(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        plain = generate(pipe, **GUIDED)
        with torch.inference_mode():
            assert relative_error(generate(pipe, **GUIDED), plain) < 1e-5


def test_no_weight_is_copied_and_none_of_it_stays(pipe: Any) -> None:
    before = {name: parameter.data_ptr() for name, parameter in pipe.transformer.named_parameters()}
    modules = [vars(module).copy() for module in pipe.transformer.modules()]
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        generate(pipe)
    assert {name: parameter.data_ptr() for name, parameter in pipe.transformer.named_parameters()} == before
    for old, module in zip(modules, pipe.transformer.modules(), strict=True):
        assert old.keys() == vars(module).keys() and all(old[name] is vars(module)[name] for name in old)


# What else is loaded into the model


def with_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    for name, rank in (("one", 2), ("two", 3)):
        targets = ["to_q", "to_v", "proj_mlp", "add_k_proj", "net.0.proj", "norm1.linear"]
        pipe.transformer.add_adapter(
            peft.LoraConfig(r=rank, init_lora_weights=False, target_modules=targets), adapter_name=name
        )
    pipe.transformer.set_adapters(["one", "two"], [0.7, -0.4])


def with_fused_projections(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def with_model_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe._offload = accelerate.cpu_offload_with_hook(pipe.transformer, CPU)[1]


def with_sequential_offload(pipe: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, CPU)


def with_group_offload(kind: str, pipe: Any) -> None:
    tiny.offload_groups(pipe.transformer, kind)


COMPANY: dict[str, Callable[[Any], None]] = {
    "lora": with_lora,
    "fused": with_fused_projections,
    "model offload": with_model_offload,
    "sequential offload": with_sequential_offload,
    "group offload, blocks": functools.partial(with_group_offload, "block_level"),
    "group offload, leaves": functools.partial(with_group_offload, "leaf_level"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("company", COMPANY)
def test_what_is_loaded_into_the_model_is_honoured(pipe: Any, company: str, order: str) -> None:
    plain = generate(pipe, num_inference_steps=2)
    if order == "before":
        COMPANY[company](pipe)
        plain = generate(pipe, num_inference_steps=2)
    handles = [jitaccel.apply(pipe, DENSE, execution="packed")]
    if order == "after":
        COMPANY[company](pipe)
        handles[0].remove()
        plain = generate(pipe, num_inference_steps=2)
        handles = [jitaccel.apply(pipe, DENSE, execution="packed")]
    assert relative_error(generate(pipe, num_inference_steps=2), plain) < 1e-5
    assert handles[0].stats().execution == "packed", handles[0].stats().notes
    sparse = {}
    for execution in ("packed", "indexed"):
        with jitaccel.apply(pipe, SHORT, execution=execution):
            sparse[execution] = generate(pipe, (1, 2), prompt=["a", "red"])
    assert relative_error(sparse["packed"], sparse["indexed"]) < 1e-5


def test_hooks_of_blocks_bring_their_weights_in_and_out(pipe: Any) -> None:
    calls: list[str] = []

    class Spy(diffusers.hooks.ModelHook):  # type: ignore[misc,name-defined]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append("in")
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            calls.append("out")
            return output

    model = pipe.transformer
    for module in (model, *model.transformer_blocks, *model.single_transformer_blocks):
        diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(Spy(), "spy")
    with jitaccel.apply(pipe, SHORT, execution="packed", strict=True):
        generate(pipe)
    assert calls == ["in", "in", "out", "in", "out", "out"] * 5


def test_lora_scale_of_the_call_is_honoured_and_taken_back(pipe: Any) -> None:
    with_lora(pipe)
    half: dict[str, Any] = {"joint_attention_kwargs": {"scale": 0.5}, **GUIDED}
    images = {}
    for execution in ("packed", "indexed", "packed"):
        with jitaccel.apply(pipe, SHORT, execution=execution):  # type: ignore[arg-type]
            images[execution] = generate(pipe, **half)
            full = generate(pipe, **GUIDED)
    assert relative_error(images["packed"], images["indexed"]) < 1e-5
    assert relative_error(full, images["packed"]) > 1e-3


# What runs indexed instead


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
