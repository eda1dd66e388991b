"""Stages that cannot be compiled or captured, and invalid options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.execution.compile import Compiler
from tests.support import tiny
from tests.support.compiling import Counting, Failing
from tests.support.tiny import SHORT, generate, relative_error

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_exception_inside_a_compiled_generation_leaves_no_trace(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, compile={"backend": Counting()}, strict=True):
        clean = generate(pipe)

        def stop(*_: Any) -> dict[str, Any]:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            generate(pipe, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), clean)


def test_failed_replay_leaves_no_trace(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Failing()
    monkeypatch.setattr("jitaccel.execution.compile.RepeatedCalls", lambda: recorder)
    with jitaccel.apply(pipe, SHORT, compile={"backend": Counting(), "graphs": True}, strict=True) as handle:
        clean = generate(pipe)
        recorder.replays = 1
        with pytest.raises(RuntimeError, match="replay failed"):
            generate(pipe, seed=1)
        assert torch.equal(generate(pipe), clean)
        stats = handle.stats().compiled
    assert (stats.graphs, stats.captures, stats.dropped) == (3, 4, 1)


def test_stage_that_cannot_be_captured_runs_compiled_and_says_why(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jitaccel.execution.compile.RepeatedCalls", lambda: Failing(captures=True))
    options = {"backend": Counting(), "graphs": True}
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        eager = generate(pipe)
    with jitaccel.apply(pipe, SHORT, compile=options) as handle:
        assert relative_error(generate(pipe), eager) < 1e-6
        stats = handle.stats()
        assert (stats.compiled.calls, stats.compiled.captures, stats.compiled.replays) == (5, 0, 0)
        assert any("cannot be recorded: operation not permitted when stream" in note for note in stats.notes)
    with (
        jitaccel.apply(pipe, SHORT, compile=options, strict=True),
        pytest.raises(UnsupportedModelError, match="must be captured with strict=True"),
    ):
        generate(pipe)


def test_stage_that_cannot_be_compiled_runs_eagerly_and_says_why(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        eager = generate(pipe)

    def broken(graph: Any, inputs: list[Tensor]) -> Any:
        raise ValueError("no such instruction")

    with jitaccel.apply(pipe, SHORT, compile={"backend": broken}) as handle:
        assert relative_error(generate(pipe), eager) < 1e-6
        stats = handle.stats()
    assert stats.compiled.eager_calls == 5 and stats.compiled.calls == 0
    assert any("not compiled, since BackendCompilerFailed" in note for note in stats.notes)
    with (
        jitaccel.apply(pipe, SHORT, compile={"backend": broken}, strict=True),
        pytest.raises(UnsupportedModelError, match="one graph with strict=True"),
    ):
        generate(pipe)


@pytest.mark.parametrize("why", ["the backend refuses regions", "more kinds of blocks than regions may have"])
def test_stage_that_cannot_have_regions_is_compiled_whole(why: str) -> None:
    model = tiny.transformer(num_single_layers=10)
    count = Counting()

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        has_regions = any("invoke_subgraph" in str(node.target) for node in graph.graph.nodes)
        if has_regions and why.startswith("the backend"):
            raise ValueError("no regions")
        return count(graph, inputs)

    if why.startswith("more"):
        peft = pytest.importorskip("peft")
        ranks = {f"single_transformer_blocks.{k}.proj_mlp": k + 1 for k in range(10)}
        lora = peft.LoraConfig(r=1, init_lora_weights=False, target_modules=["proj_mlp"], rank_pattern=ranks)
        model.add_adapter(lora, adapter_name="one")
    pipe = tiny.pipeline(transformer=model)
    config = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
    with jitaccel.apply(pipe, config, execution="packed"):
        eager = generate(pipe)
    with jitaccel.apply(pipe, config, compile={"backend": backend}, strict=True) as handle:
        assert relative_error(generate(pipe), eager) < 1e-6
        assert handle.stats().compiled.eager_calls == 0
        if why.startswith("the backend"):
            assert any("without regions, since BackendCompilerFailed" in note for note in handle.stats().notes)
    assert count.graphs == 2


def test_stage_that_ran_eagerly_for_a_reason_is_compiled_once_the_reason_is_gone() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    compiler, x = Compiler({"backend": Counting()}), torch.ones(3)
    for reason in (None, "blocks are offloaded", "blocks are offloaded", "a hook is set", None):
        assert torch.equal(compiler.run("stage", double, x, reason=reason), 2 * x)
    assert (compiler.stats.calls, compiler.stats.eager_calls) == (2, 3)
    assert compiler.notes == ("not compiled, since blocks are offloaded", "not compiled, since a hook is set")


def test_stage_whose_compilation_failed_is_not_tried_again() -> None:
    tries = []

    def broken(graph: Any, inputs: list[Tensor]) -> Any:
        tries.append(graph)
        raise ValueError("no such instruction")

    def double(x: Tensor) -> Tensor:
        return 2 * x

    compiler, x = Compiler({"backend": broken}), torch.ones(3)
    for _ in range(3):
        assert torch.equal(compiler.run("stage", double, x), 2 * x)
    assert len(tries) == 1 and compiler.stats.eager_calls == 3


def test_offloaded_blocks_run_eagerly(pipe: Any) -> None:
    tiny.offload_groups(pipe.transformer, "block_level")
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        eager = generate(pipe)
    with jitaccel.apply(pipe, SHORT, compile={"backend": Counting()}) as handle:
        assert relative_error(generate(pipe), eager) < 1e-6
        assert handle.stats().compiled.eager_calls == 5 and "offloading" in handle.stats().notes[-1]


def test_error_of_the_model_itself_is_raised(pipe: Any) -> None:
    """An error that no compiler made is the user's to see, not a reason to run again."""
    with jitaccel.apply(pipe, SHORT, compile={"backend": Counting()}):
        generate(pipe)
        pipe.transformer.proj_out = None
        with pytest.raises((TypeError, AttributeError)):
            generate(pipe)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("max-autotun", 'did you mean "max-autotune"'),
        ({"dynamic": True}, "shapes are static"),
        ({"fullgraph": False}, "every stage is one graph"),
        ({"bakend": "eager"}, "must hold backend, mode, options, graphs, regions, got bakend"),
        ({"graphs": "yes"}, "graphs as True or False, got 'yes'"),
        ({"options": {"max_autotun": True}}, 'did you mean "max_autotune"'),
        ({"mode": "default", "options": {"max_autotune": True}}, "mode or options, got both"),
        (3, "must be True, False, a mode or a dict"),
    ],
)
def test_bad_options_are_refused(pipe: Any, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        jitaccel.apply(pipe, SHORT, compile=value)


def test_compiling_the_models_own_forward_is_refused(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="compile the model yourself before apply"):
        jitaccel.apply(pipe, SHORT, compile=True, execution="indexed")
