"""Compiled stages: the eager image, one static graph for each stage and batch signature, and none that is stale."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError, UnsupportedModelError
from jitaccel.execution.compile import Compiler, CompileStats, compile_options
from jitaccel.execution.graphs import Counts, Recording, RepeatedCalls, Replayed
from tests.support import tiny
from tests.support.tiny import GRID, SHORT, generate, relative_error

CLEAN = SHORT.replace(lifter="clean", micro_flow="none")
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


@pytest.fixture(params=[False, True], ids=["compiled", "captured"])
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `apply` gets: graphs as they are, without and with the stand-in of CUDA graphs."""
    return {"backend": Counting(), "graphs": request.param}


@pytest.mark.parametrize(
    ("preset", "call", "graphs"),
    [
        (SHORT, GUIDED, False),
        (SHORT, GUIDED, True),
        (CLEAN, GUIDED, True),
        (CLEAN, {}, False),
        ("7x", {}, True),
        ("7x-paper", {}, True),
        ("4x-paper", {}, True),
    ],
    ids=["guided", "guided, captured", "guided clean, captured", "clean", "7x", "7x-paper", "4x-paper"],
)
def test_compiled_makes_the_eager_image_with_one_graph_a_stage(
    pipe: Any, preset: Any, call: dict[str, Any], graphs: bool
) -> None:
    with jitaccel.apply(pipe, preset, execution="packed"):
        eager = generate(pipe, **call)
    count = Counting()
    with jitaccel.apply(pipe, preset, compile={"backend": count, "graphs": graphs}, strict=True) as handle:
        assert relative_error(generate(pipe, **call), eager) < 1e-6
        stats = handle.stats().compiled
    config = jitaccel.PRESETS[preset] if isinstance(preset, str) else preset
    steps, stages = len(jitaccel.noise_levels(config)) - 1, config.num_stages
    calls = steps * (2 if "negative_prompt" in call else 1)  # both branches of guidance run on one graph
    recorded = {"captures": stages, "replays": calls - stages} if graphs else {}
    assert stats == CompileStats(signatures=stages, graphs=stages, calls=calls, **recorded)
    assert count.graphs == stages


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's inductor does not quote its own path to the C++ compiler")
@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_inductor_is_as_exact_as_eager(pipe: Any, lifter: Any) -> None:
    """At two sizes and batches, in bfloat16: at most twice the dtype's own error, told by float32."""
    # Two steps: the first stage and the last, since every graph takes seconds to compile.
    config = SHORT.replace(densities=(0.35, 1.0), boundaries=(0.5, 1.0), steps=2, lifter=lifter)
    calls: list[dict[str, Any]] = [
        {"seed": (1,), "grid": (8, 8)},
        {"seed": (1, 2, 3), "grid": (6, 9), "prompt": ["a", "red", "circle"]},
    ]
    with jitaccel.apply(pipe, config, execution="packed"):
        exact = [generate(pipe, **call) for call in calls]
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    with jitaccel.apply(half, config, execution="packed"):
        eager = [generate(half, **call) for call in calls]
    with jitaccel.apply(half, config, compile={"graphs": True}, strict=True) as handle:
        compiled = [generate(half, **call) for call in calls]
        assert handle.stats().compiled.graphs == 4
        assert "compiled stages: 4 graphs for 4 signatures, 4 calls, 0 eager; 4 captured" in str(handle.stats())
    for made, usual, expected in zip(compiled, eager, exact, strict=True):
        assert relative_error(made, expected) <= 2 * relative_error(usual, expected)


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
            for width in (6, 9, 11):
                generate(pipe, grid=(4, width))
    assert count.graphs == 3 * 3 > torch._dynamo.config.recompile_limit


# Nothing stale


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


def test_exception_inside_a_compiled_generation_leaves_no_trace(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, compile={"backend": Counting()}, strict=True):
        clean = generate(pipe)

        def stop(*_: Any) -> dict[str, Any]:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            generate(pipe, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), clean)


class Failing(RepeatedCalls):
    """Fails at the first replays, or at every capture."""

    def __init__(self, replays: int = 0, captures: bool = False) -> None:
        super().__init__()
        self.replays, self.captures = replays, captures

    def record(self, call: Any) -> Recording:
        if self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        recording = super().record(call)

        def replay() -> None:
            if self.replays:
                self.replays -= 1
                raise RuntimeError("replay failed")
            recording.replay()

        return Recording(recording.outputs, replay)


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


def test_two_handles_in_two_threads_do_not_disturb_each_other() -> None:
    pipes = [tiny.pipeline(seed) for seed in (0, 1)]
    options = {"backend": "eager", "graphs": True}
    expected = []
    for pipe in pipes:
        with jitaccel.apply(pipe, SHORT, execution="packed"):
            expected.append([generate(pipe, seed) for seed in range(4)])
    handles = [jitaccel.apply(pipe, SHORT, compile=options, strict=True) for pipe in pipes]
    with ThreadPoolExecutor(2) as threads:
        made = threads.map(lambda pipe: [generate(pipe, seed) for seed in range(4)], pipes)
    for images, eager, handle in zip(made, expected, handles, strict=True):
        assert all(relative_error(image, other) < 1e-6 for image, other in zip(images, eager, strict=True))
        assert handle.stats().compiled.captures == 3 and handle.stats().compiled.replays == 4 * 5 - 3


def test_guided_call_between_unguided_ones_shares_their_graphs(pipe: Any, compiled: dict[str, Any]) -> None:
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        plain, guided = generate(pipe), generate(pipe, **GUIDED)
    with jitaccel.apply(pipe, SHORT, compile=compiled, strict=True):
        for _ in range(2):
            assert relative_error(generate(pipe), plain) < 1e-6
            assert relative_error(generate(pipe, **GUIDED), guided) < 1e-6
    assert compiled["backend"].graphs == 3


def test_velocity_that_somebody_writes_is_lifted_again(pipe: Any, compiled: dict[str, Any]) -> None:
    """A compiled stage returns its velocity lifted; what is edited on the way counts at the anchors alone, as ever."""

    def doubled(model: Any, inputs: Any, output: Any) -> None:
        output[0].mul_(2.0)

    with jitaccel.apply(pipe, SHORT, execution="packed"):
        pipe.transformer.register_forward_hook(doubled)
        eager = generate(pipe)
    with jitaccel.apply(pipe, SHORT, compile=compiled, strict=True):
        assert relative_error(generate(pipe), eager) < 1e-6


@pytest.mark.parametrize("config", [SHORT, CLEAN], ids=["velocity", "clean"])
def test_bare_transformer_is_compiled_with_its_lift(config: Any, compiled: dict[str, Any]) -> None:
    model = tiny.transformer()
    levels = jitaccel.noise_levels(config)

    def loop() -> Tensor:
        state = tiny.start()
        conditions = {
            "encoder_hidden_states": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)),
            "pooled_projections": torch.randn(1, 32, generator=torch.Generator().manual_seed(2)),
            "guidance": torch.tensor([3.5]),
            "txt_ids": torch.zeros(8, 3),
            "img_ids": tiny.ids(),
            "return_dict": False,
        }
        for level, after in itertools.pairwise(levels):
            state = state + (after - level) * model(state, timestep=torch.tensor([level]), **conditions)[0]
        return state

    with torch.no_grad():
        with jitaccel.apply(model, config, noise_levels=levels, execution="packed"):
            eager = loop()
        with jitaccel.apply(model, config, noise_levels=levels, compile=compiled, strict=True) as handle:
            for _ in range(2):
                assert relative_error(loop(), eager) < 1e-6
            assert handle.stats().compiled.graphs == 3


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
