"""Compiled stages: the eager image, one static graph for each stage and batch signature, and none that is stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.compile import Compiler, compile_options
from tests import tiny
from tests.tiny import GRID, SHORT, generate, relative_error

GUIDED: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 3.0}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(
    ("preset", "call"), [(SHORT, GUIDED), ("7x", {}), ("4x", {})], ids=["guided", "7x", "4x"]
)
def test_compiled_makes_the_eager_image_with_one_graph_a_stage(pipe: Any, preset: Any, call: dict[str, Any]) -> None:
    with jitaccel.apply(pipe, preset, execution="packed"):
        eager = generate(pipe, **call)
    count = Counting()
    with jitaccel.apply(pipe, preset, compile={"backend": count}, strict=True) as handle:
        assert relative_error(generate(pipe, **call), eager) < 1e-6
        stats = handle.stats().compiled
    steps = len(jitaccel.noise_levels(jitaccel.PRESETS[preset] if isinstance(preset, str) else preset)) - 1
    assert count.graphs == 3 and stats is not None
    assert (stats.signatures, stats.graphs, stats.calls, stats.eager_calls) == (3, 3, steps, 0)


def test_alternating_sizes_and_batches_never_compile_again(pipe: Any) -> None:
    count = Counting()
    calls: list[dict[str, Any]] = [
        {"seed": (1,)},
        {"seed": (1,), "grid": (6, 8)},
        {"seed": (1, 2, 3), "prompt": ["a", "red", "circle"]},
    ]
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        eager = [generate(pipe, **call) for call in calls]
    with jitaccel.apply(pipe, SHORT, compile={"backend": count}, strict=True) as handle:
        for turn in range(10):
            call = calls[turn % 3]
            assert relative_error(generate(pipe, **call), eager[turn % 3]) < 1e-5
            assert count.graphs == 3 * min(turn + 1, 3)
        assert handle.stats().compiled.graphs == 9


def test_more_signatures_than_a_compiler_keeps_of_one_function_still_work(pipe: Any) -> None:
    count = Counting()
    with jitaccel.apply(pipe, SHORT, compile={"backend": count}, strict=True):
        for _ in range(2):
            for width in (6, 9, 11, 14):
                generate(pipe, grid=(4, width))
    shapes = {tokens for width in (6, 9, 11, 14) for tokens in SHORT.token_counts(4 * width)}
    assert count.graphs == len(shapes) > torch._dynamo.config.recompile_limit


@pytest.mark.skipif(" " in torch.__file__, reason="torch's inductor does not quote its own path to the C++ compiler")
def test_inductor_makes_the_eager_image(pipe: Any) -> None:
    config = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
    with jitaccel.apply(pipe, config, execution="packed"):
        eager = generate(pipe, grid=(6, 6))
    with jitaccel.apply(pipe, config, compile=True, strict=True) as handle:
        assert relative_error(generate(pipe, grid=(6, 6)), eager) < 1e-5
        assert "compiled: 2 graphs for 2 signatures" in str(handle.stats())


# Nothing stale


def test_weights_that_change_in_place_are_used(pipe: Any) -> None:
    count = Counting()
    with jitaccel.apply(pipe, SHORT, compile={"backend": count}, strict=True), torch.no_grad():
        before = generate(pipe)
        pipe.transformer.proj_out.weight.mul_(0.5)
        after = generate(pipe)
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        assert relative_error(after, generate(pipe)) < 1e-6
    assert relative_error(after, before) > 1e-3 and count.graphs == 3


def test_lora_added_scaled_and_removed_is_used(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    count = Counting()

    def eager() -> Tensor:
        with jitaccel.apply(other, SHORT, execution="packed"):
            return generate(other)

    with jitaccel.apply(pipe, SHORT, compile={"backend": count}, strict=True):
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
        pipe.transformer.delete_adapters(["one"])
        assert relative_error(generate(pipe), plain) < 1e-6


def test_exception_inside_a_compiled_generation_leaves_no_trace(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, compile={"backend": Counting()}, strict=True):
        clean = generate(pipe)

        def stop(*_: Any) -> dict[str, Any]:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            generate(pipe, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), clean)


# Warm-up


def test_warmup_compiles_all_that_requests_need(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    count, config = Counting(), SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
    sizes = [(4 * GRID[0], 4 * GRID[1]), (24, 32)]
    with jitaccel.apply(pipe, config, compile={"backend": count}, strict=True) as handle:
        state = torch.get_rng_state()
        stats = handle.warmup(sizes, [1, 2], progress=False, max_sequence_length=tiny.TEXT_TOKENS, **GUIDED)
        assert torch.equal(torch.get_rng_state(), state)
        assert stats.compiled.graphs == count.graphs == 8
        generate(pipe, **GUIDED)
        generate(pipe, (1, 2), prompt=["a", "red"], grid=(6, 8), **{**GUIDED, "negative_prompt": ["green"] * 2})
        assert count.graphs == 8
    assert capfd.readouterr().out == ""


def test_warmup_of_a_bare_transformer_is_refused() -> None:
    model = tiny.transformer()
    with jitaccel.apply(model, SHORT) as handle, pytest.raises(ConfigError, match="must be a pipeline"):
        handle.warmup([(48, 48)])


# What is not compiled


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


def test_offloaded_blocks_run_eagerly(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
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
        ({"bakend": "eager"}, "must hold backend, mode or options, got bakend"),
        (3, "must be True, False, a mode or a dict"),
    ],
)
def test_bad_options_are_refused(pipe: Any, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        jitaccel.apply(pipe, SHORT, compile=value)


def test_compiling_the_models_own_forward_is_refused(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="compile the model yourself before apply"):
        jitaccel.apply(pipe, SHORT, compile=True, execution="indexed")


def test_options_are_what_torch_takes() -> None:
    assert compile_options(False) is None and compile_options(True) == {}
    assert compile_options("max-autotune") == {"mode": "max-autotune"}
    assert compile_options({"backend": "eager"}) == {"backend": "eager"}


def test_copies_of_one_function_do_not_share_graphs() -> None:
    count = Counting()
    compiler = Compiler({"backend": count})

    def double(x: Tensor) -> Tensor:
        return 2 * x

    for size in (2, 3, 2, 3):
        assert torch.equal(compiler.run(size, double, torch.ones(size)), torch.full((size,), 2.0))
    assert count.graphs == 2 and compiler.stats.graphs == 2 and compiler.stats.calls == 4
