"""What only a GPU shows of the CUDA operators: repeats, graphs, streams, synchronisation, devices, wrong indices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jitaccel import ops
from tests.support.cuda_operators import DEVICE, assert_same_bits, on_device, plan_of, randn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in ops.compiled(), reason="the CUDA operators are not built"),
]


class _Scene:
    """A picture of 32 x 32 tokens on the GPU, and the operators' calls on it."""

    grid = (32, 32)

    def __init__(self, seed: int = 0) -> None:
        self.nearest, self.anchors, self.weights = on_device(*plan_of(self.grid, 330))
        self.values, self.state, self.previous, self.velocity, self.noise = on_device(
            randn(2, 330, 64, dtype=torch.bfloat16, seed=seed),
            *(randn(2, 1024, 64, seed=seed + i) for i in range(1, 5)),
        )
        self.levels = torch.tensor([0.9, 0.7], device=DEVICE)

    def transition(self) -> tuple[Tensor, ...]:
        """Runs a stage boundary into `state` and returns the result of each operator."""
        importance = ops.importance(self.velocity, self.grid)
        tokens = ops.activate(importance, self.anchors, 200)
        nearest = ops.nearest_anchor(self.anchors, self.grid)
        fields = (self.state, self.previous, self.velocity, self.noise)
        plan = (nearest, self.anchors, self.grid, self.weights)
        ops.micro_flow_into(*fields, tokens, *plan, self.levels, 1 / 3)
        return importance, tokens, nearest, ops.lift(self.values, *plan), self.state


def test_runs_repeat_bit_for_bit() -> None:
    first = [x.clone() for x in _Scene().transition()]
    for _ in range(20):
        for a, b in zip(first, _Scene().transition(), strict=True):
            assert_same_bits(a, b)


def test_operators_do_not_wait_for_the_device() -> None:
    _Scene().transition()  # kernels are loaded and memory is reserved once, which may wait
    scene = _Scene()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second or so: an operator that waits returns after it
        scene.transition()
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Returns the graph of `run`, after one run outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation within is an error
        run()
    return graph


def test_a_captured_transition_replays_on_other_fields_and_levels() -> None:
    captured, results = _Scene(), []
    graph = _capture(lambda: results.append(captured.transition()))
    for seed, levels in ((1, (0.8, 0.6)), (2, (0.0909, 0.0))):
        fresh = _Scene(seed)
        fresh.levels.copy_(torch.tensor(levels))
        for name in ("values", "state", "previous", "velocity", "noise", "levels"):
            getattr(captured, name).copy_(getattr(fresh, name))
        graph.replay()
        for a, b in zip(results[-1], fresh.transition(), strict=True):
            assert_same_bits(a, b)


def test_operators_run_on_the_current_stream() -> None:
    expected = [x.clone() for x in _Scene().transition()]
    scene = _Scene()
    inputs = {name: getattr(scene, name).clone() for name in ("values", "state", "velocity")}
    for name in inputs:
        getattr(scene, name).zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would find zeros
        for name, value in inputs.items():
            getattr(scene, name).copy_(value)
        results = scene.transition()
    stream.synchronize()
    for a, b in zip(expected, results, strict=True):
        assert_same_bits(a, b)


def test_tensors_on_other_devices_are_refused_by_name() -> None:
    nearest, anchors, weights = plan_of((6, 7), 12)
    values = torch.zeros(2, 12, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="lift: nearest must be on the device of the other arguments"):
        torch.ops.jitaccel.lift(values, nearest, anchors.to(DEVICE), [6, 7], weights.to(DEVICE))


_WRONG_INDICES = """
import torch
from torch import Tensor
from jitaccel import ops

def wrong(run, *words):
    try:
        run()
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

def on_gpu(*rows):
    return torch.tensor(rows, device="cuda")

anchors, weights, grid = on_gpu([0, 4], [1, 5]), torch.ones(1, device="cuda"), (2, 3)
values, field, levels = torch.ones(2, 2, 4, device="cuda"), torch.ones(2, 6, 4, device="cuda"), on_gpu(0.9, 0.7)
nearest = ops.nearest_anchor(anchors, grid)
unsorted, beyond = on_gpu([0, 4], [5, 1]), on_gpu([0, 4], [1, 6])
rising = "anchors must rise strictly within 0..5, got "
wrong(lambda: ops.nearest_anchor(unsorted, grid), "nearest_anchor: " + rising + "1 after 5 in image 1; ")
wrong(lambda: ops.nearest_anchor(beyond, grid), "nearest_anchor: " + rising + "6 after 1 in image 1; ")
stacked = on_gpu([0, 4], [0, 1])
wrong(lambda: ops.nearest_anchor(stacked, (2, 1, 3), True), "every frame, got none in frame 1 of image 1; ")
wrong(lambda: ops.lift(values, nearest, unsorted, grid, weights), "lift: " + rising)
wrong(lambda: ops.lift(values, nearest + 1, anchors, grid, weights), "lift: nearest must lie in 0..1, got 2; ")
wrong(lambda: ops.activate(field[:, :, 0], unsorted, 1), "activate: " + rising)
tokens = on_gpu([2, 3], [3, 3])
move = lambda: ops.micro_flow_into(
    field, field, field, field, tokens, nearest, anchors, grid, weights, levels, 1.0
)
wrong(move, "micro_flow_into: tokens must rise strictly within 0..5, got 3 after 3 in image 1; ")
ops.lift(values, nearest, anchors, grid, weights)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ops.lift(values, nearest, anchors, grid, weights)
graph.replay()
torch.cuda.synchronize()
print("all found")
"""


def test_wrong_indices_are_found_where_the_environment_asks_for_it() -> None:
    environment = {**os.environ, "JITACCEL_CHECK_INDICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WRONG_INDICES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "all found", done.stderr
