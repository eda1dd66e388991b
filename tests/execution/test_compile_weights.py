"""Compiled stages never use stale weights after the weights change."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel.execution.compile import CompileStats
from jitaccel.execution.graphs import Counts, RepeatedCalls, Replayed
from tests.support import tiny
from tests.support.compiling import Counting
from tests.support.tiny import SHORT, generate, relative_error

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_weights_that_change_in_place_are_used(pipe: Any) -> None:
    count = Counting()
    with jitaccel.apply(pipe, SHORT, compile={"backend": count, "graphs": True}, strict=True), torch.no_grad():
        before = generate(pipe)
        pipe.transformer.proj_out.weight.mul_(0.5)
        after = generate(pipe)
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        assert relative_error(after, generate(pipe)) < 1e-6
    assert relative_error(after, before) > 1e-3 and count.graphs == 3


def test_weights_that_move_are_recorded_anew(pipe: Any) -> None:
    count = Counting()
    with jitaccel.apply(pipe, SHORT, compile={"backend": count, "graphs": True}, strict=True) as handle:
        before = generate(pipe)
        weight = pipe.transformer.proj_out.weight
        weight.data = 0.5 * weight.data
        after = generate(pipe)
        stats = handle.stats().compiled
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        assert relative_error(after, generate(pipe)) < 1e-6
    assert relative_error(after, before) > 1e-3
    assert (count.graphs, stats.captures, stats.dropped, stats.replays) == (3, 6, 3, 4)


def test_lora_added_scaled_and_removed_is_used(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("jitaccel.execution.compile._MAX_VARIANTS", 2)

    def eager() -> Tensor:
        with jitaccel.apply(other, SHORT, execution="packed"):
            return generate(other)

    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager", "graphs": True}, strict=True) as handle:
        other = tiny.pipeline(transformer=pipe.transformer)
        plain = generate(pipe)
        pipe.transformer.add_adapter(
            peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "proj_mlp"]), adapter_name="one"
        )
        with_lora = generate(pipe)
        assert relative_error(with_lora, plain) > 1e-3 and relative_error(with_lora, eager()) < 1e-6
        pipe.transformer.set_adapters(["one"], [0.3])
        scaled = generate(pipe)
        assert relative_error(scaled, with_lora) > 1e-3 and relative_error(scaled, eager()) < 1e-6
        assert handle.stats().compiled == CompileStats(
            signatures=3, graphs=11, calls=15, captures=11, replays=4, dropped=9
        )
        pipe.transformer.delete_adapters(["one"])
        assert relative_error(generate(pipe), plain) < 1e-6


def test_replayed_function_reads_parameters_in_place_and_copies_the_rest() -> None:
    weight, counts = torch.nn.Parameter(torch.ones(3)), Counts()
    replayed = Replayed(lambda w, x: (w * x,), RepeatedCalls(), counts, pytest.fail)
    with torch.no_grad():
        (first,) = replayed(weight, torch.full((3,), 2.0))
        (second,) = replayed(weight, torch.full((3,), 3.0))
        weight.mul_(10.0)
        (third,) = replayed(weight, torch.full((3,), 4.0))
        weight.data = torch.zeros(3)
        (fourth,) = replayed(weight, torch.full((3,), 5.0))
    assert [x[0].item() for x in (first, second, third, fourth)] == [2.0, 3.0, 40.0, 0.0]
    assert counts == Counts(captures=2, replays=2, dropped=1)


def test_gradients_are_not_replayed() -> None:
    weight, counts = torch.nn.Parameter(torch.ones(3)), Counts()
    replayed = Replayed(lambda w, x: (w * x,), RepeatedCalls(), counts, pytest.fail)
    for _ in range(2):
        replayed(weight, torch.ones(3))[0].sum().backward()
    assert weight.grad.tolist() == [2.0] * 3 and counts == Counts()


def test_removed_handle_lets_go_of_its_graphs(pipe: Any) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, Replayed) for thing in gc.get_objects())

    before = alive()
    with jitaccel.apply(pipe, SHORT, compile={"backend": "eager", "graphs": True}) as handle:
        generate(pipe)
        assert alive() == before + 3
    assert alive() == before
    assert handle.stats().compiled.captures == 3
