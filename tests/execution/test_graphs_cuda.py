"""CUDA graphs of compiled stages on a device: the eager image, one memory pool, nothing stale, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import jitaccel
from jitaccel.execution.graphs import Counts, CudaGraphs, Replayed
from tests.support import tiny
from tests.support.tiny import SHORT, generate, relative_error

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def pipe() -> Any:
    return tiny.pipeline().to("cuda")


@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_captured_stages_make_the_eager_image(pipe: Any, lifter: Any) -> None:
    config = SHORT.replace(lifter=lifter)
    calls: list[dict[str, Any]] = [
        {"seed": (1,)},
        {"seed": (1, 2, 3), "grid": (6, 8), "prompt": ["a", "red", "circle"]},
        {"negative_prompt": "green", "true_cfg_scale": 3.0},
    ]
    with jitaccel.apply(pipe, config, execution="packed"):
        eager = [generate(pipe, **call) for call in calls]
    with jitaccel.apply(pipe, config, compile=True, strict=True) as handle:
        for _ in range(3):
            for call, expected in zip(calls, eager, strict=True):
                assert relative_error(generate(pipe, **call), expected) < 1e-4
        stats = handle.stats().compiled
    assert (stats.graphs, stats.captures, stats.dropped, stats.eager_calls) == (9, 9, 0, 0)
    assert stats.replays == 3 * 3 * 5 - 9


def test_weights_that_move_are_recorded_anew(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT, compile=True, strict=True) as handle:
        generate(pipe)
        pipe.transformer.to("cpu")
        pipe.transformer.to("cuda")
        weight = pipe.transformer.proj_out.weight
        weight.data = 0.5 * weight.data
        after = generate(pipe)
        assert handle.stats().compiled.dropped >= 3
    with jitaccel.apply(pipe, SHORT, execution="packed"):
        assert relative_error(after, generate(pipe)) < 1e-4


def test_two_pipelines_in_two_threads_and_streams() -> None:
    pipes = [tiny.pipeline(seed).to("cuda") for seed in (0, 1)]
    expected = []
    for pipe in pipes:
        with jitaccel.apply(pipe, SHORT, execution="packed"):
            expected.append([generate(pipe, seed) for seed in range(4)])
    handles = [jitaccel.apply(pipe, SHORT, compile=True, strict=True) for pipe in pipes]

    def run(pipe: Any) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            images = [generate(pipe, seed) for seed in range(4)]
            torch.cuda.current_stream().synchronize()
        return images

    with ThreadPoolExecutor(2) as threads:
        made = [*threads.map(run, pipes)]
    for images, eager, handle in zip(made, expected, handles, strict=True):
        assert all(relative_error(image, other) < 1e-4 for image, other in zip(images, eager, strict=True))
        assert handle.stats().compiled.captures == 3


def test_graphs_of_one_recorder_share_memory() -> None:
    recorder, counts = CudaGraphs(torch.device("cuda", torch.cuda.current_device())), Counts()

    def work(x: torch.Tensor) -> tuple[torch.Tensor]:
        for _ in range(8):
            x = torch.cat([x, x]).chunk(2)[0] + 1.0
        return (x,)

    def reserved_by(number: int) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        replayed = [Replayed(work, recorder, counts, pytest.fail) for _ in range(number)]
        for run in replayed:
            x = torch.ones(4 << 20, device="cuda")
            with torch.no_grad():
                assert torch.equal(run(x)[0], run(2 * x)[0] - 1.0)
        del x
        torch.cuda.empty_cache()
        kept.extend(replayed)
        return torch.cuda.memory_reserved() - before

    kept: list[Replayed] = []
    one, four = reserved_by(1), reserved_by(4)
    assert four < 4 * one and counts == Counts(captures=5, replays=5)


def test_call_that_cannot_be_captured_runs_as_it_is() -> None:
    reasons: list[str] = []
    recorder, counts = CudaGraphs(torch.device("cuda", torch.cuda.current_device())), Counts()
    replayed = Replayed(lambda x: (x * x.sum().item(),), recorder, counts, reasons.append)
    with torch.no_grad():
        for value in (1.0, 2.0, 3.0):
            assert replayed(torch.full((2,), value, device="cuda"))[0][0].item() == 2 * value * value
    assert counts == Counts() and len(reasons) == 1
