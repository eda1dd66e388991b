"""Packed execution through a pipeline, with LoRA, offloading and fused projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import jitaccel
from tests.support import tiny
from tests.support.packed import CPU, GUIDED, conditions
from tests.support.tiny import DENSE, SHORT, TEXT_TOKENS, counted, generate, ids, relative_error, start


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
    """A callback that changes the negative prompt between two steps changes the input of the second call."""

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
