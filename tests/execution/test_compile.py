"""Compiled stages: the eager image, one static graph per stage and batch signature, and no stale graph."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import jitaccel
from jitaccel import ConfigError
from jitaccel.execution.compile import Compiler, CompileStats, compile_options
from tests.support import tiny
from tests.support.compiling import CLEAN, GUIDED, Counting
from tests.support.tiny import GRID, SHORT, generate, relative_error

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
    """At two sizes and batches, in bfloat16: at most twice the dtype's own error against float32."""
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
    """A compiled stage returns a lifted velocity; edits to it only count at the anchors, as without compilation."""

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
