"""Times each operator against the released code's torch operations, the compiled reference, and the memory limit.

All calls use the same inputs, which stay in the caches on small grids ("warm"); `targets.py` rotates the inputs. On the
CPU, outputs reuse memory freed by earlier outputs. Fresh pages from the system would cost more than many operators, and
whether the system provides fresh pages depends on earlier allocations. `page_faults` counts them for each call.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jitaccel import ops
from jitaccel.method.lift import blur_weights
from jitaccel.ops import reference

from ..registry import Case, Measurement, Options, percentiles
from .memory import kept_memory, page_faults

GRIDS = {"32": (32, 32), "64": (64, 64), "128": (128, 128), "256": (256, 256), "video": (16, 30, 52)}
CHANNELS = (64, 128)
DENSITIES = (0.32, 0.60)
_RELEASED_MATRIX_GIB = 6  # limit for the released code's distance matrix of N x M floats
_LEVELS = (0.8, 0.7)
_PATCH = 2  # latents along a token's side
_STEPS_PER_PLAN = 4


@dataclass(frozen=True, kw_only=True)
class KernelInputs:
    """The operators' inputs: one image with random anchors."""

    grid: tuple[int, ...]
    anchors: Tensor
    nearest: Tensor
    weights: Tensor
    values: Tensor
    state: Tensor
    velocity: Tensor
    noise: Tensor
    importance: Tensor
    tokens: Tensor
    levels: Tensor
    out: Tensor  # scratch, for operators that write
    pooled: Tensor  # the half-size picture, also used as a network's velocity of it
    pooled_values: Tensor

    @property
    def plan(self) -> tuple[Any, ...]:
        return self.nearest, self.anchors, self.grid, self.weights


def make_inputs(
    grid: tuple[int, ...], channels: int, density: float, dtype: torch.dtype, options: Options
) -> KernelInputs:
    """Returns the inputs of one size; equal seeds give equal inputs."""
    generator = torch.Generator().manual_seed(options.seed)
    num_tokens = math.prod(grid)
    count = int(density * num_tokens)
    order = torch.randperm(num_tokens, generator=generator)
    anchors = order[:count].sort().values[None].to(options.device)
    fields = [torch.randn(1, n, channels, generator=generator) for n in (count, *(num_tokens,) * 3)]
    values, state, velocity, noise = (field.to(options.device, dtype) for field in fields)
    importance = ops.importance(velocity, grid, stack=True)
    pooled = ops.pool(state, grid, _PATCH, 2, _LEVELS[0])
    return KernelInputs(
        grid=grid,
        anchors=anchors,
        nearest=ops.nearest_anchor(anchors, grid, stack=True),
        weights=blur_weights(density).to(options.device, torch.float32),
        values=values,
        state=state,
        velocity=velocity,
        noise=noise,
        importance=importance,
        tokens=ops.activate(importance, anchors, num_tokens // 4),
        levels=torch.tensor(_LEVELS, device=options.device),
        out=torch.zeros_like(state),
        pooled=pooled,
        pooled_values=torch.randn(pooled.shape, generator=generator).to(options.device, dtype),
    )


# The released code's operations, rewritten from their description (../shared/METHOD.md, section 7) in plain torch.


def released_nearest(x: KernelInputs) -> Tensor:
    """Returns the nearest anchors from the matrix of all distances, as the released code does at every step."""
    places = torch.stack(
        torch.meshgrid(*(torch.arange(s, device=x.state.device) for s in x.grid), indexing="ij"), dim=-1
    )
    places = places.reshape(-1, len(x.grid)).float()
    return torch.cdist(places, places[x.anchors[0]]).argmin(dim=1)


def released_lift(x: KernelInputs) -> Tensor:
    """Returns the lifted values by nearest map, gather, depthwise convolutions with reflect padding, and mask."""
    channels = x.values.shape[2]
    filled = x.values[:, released_nearest(x)].transpose(1, 2).reshape(1, channels, *x.grid)
    radius, kernel = len(x.weights) // 2, x.weights.to(x.values.dtype)
    convolve = F.conv2d if len(x.grid) == 2 else F.conv3d
    blurred = F.pad(filled, (radius,) * (2 * len(x.grid)), mode="reflect")
    for axis in range(len(x.grid)):
        shape = [1, 1, *(len(kernel) if k == axis else 1 for k in range(len(x.grid)))]
        blurred = convolve(blurred, kernel.view(shape).expand(channels, *shape[1:]), groups=channels)
    mask = torch.zeros(x.state.shape[1], dtype=torch.bool, device=x.state.device).index_fill_(0, x.anchors[0], True)
    lifted = torch.where(mask[None, :, None], torch.zeros((), dtype=x.values.dtype), blurred.flatten(2).transpose(1, 2))
    return lifted.index_add(1, x.anchors[0], x.values)


def released_importance(x: KernelInputs) -> Tensor:
    """Returns the importance by average pooling of both moments."""
    pool = F.avg_pool2d if len(x.grid) == 2 else F.avg_pool3d
    field = x.velocity.transpose(1, 2).reshape(1, x.velocity.shape[2], *x.grid)
    mean, square = (pool(part, 3, stride=1, padding=1) for part in (field, field * field))
    return (square - mean * mean).mean(dim=1).flatten(1)


def released_activate(x: KernelInputs, scores: Tensor | None = None) -> Tensor:
    """Returns the activated tokens of image 0, by a mask and top-k."""
    scores = x.importance if scores is None else scores
    masked = scores.index_fill(1, x.anchors[0], -torch.inf)
    return masked[0].topk(x.tokens.shape[1]).indices


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operator, or two that are always used in sequence.

    Attributes:
        released: The same computation with the released code's operations; None if that code has none.
        reference: Plain torch for torch.compile; None if it cannot be one graph.
        bytes_moved: Bytes of all inputs and outputs, each counted once.
        lifts: Whether the released code searches the nearest anchors in this computation, at every step. jitaccel makes
            a plan about once in four steps.
    """

    name: str
    run: Callable[[KernelInputs], Any]
    reference: Callable[[KernelInputs], Any] | None
    released: Callable[[KernelInputs], Any] | None
    bytes_moved: Callable[[KernelInputs], int]
    lifts: bool = False


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _micro_flow(x: KernelInputs) -> tuple[Any, ...]:
    return x.out, x.state, x.velocity, x.noise, x.tokens, *x.plan, x.levels, 1 / 3, True


def _pool(x: KernelInputs) -> tuple[Any, ...]:
    return x.state, x.grid, _PATCH, 2, x.levels[0]


def _lift_pooled(x: KernelInputs) -> tuple[Any, ...]:
    return x.pooled_values, x.pooled, *_pool(x)


KERNELS = (
    Kernel(
        name="nearest_anchor",
        run=lambda x: ops.nearest_anchor(x.anchors, x.grid, stack=True),
        reference=None,
        released=released_nearest,
        bytes_moved=lambda x: _bytes(x.anchors, x.nearest),
    ),
    Kernel(
        name="lift",
        run=lambda x: ops.lift(x.values, *x.plan, stack=True),
        reference=lambda x: reference.lift(x.values, *x.plan, stack=True),
        released=released_lift,
        bytes_moved=lambda x: _bytes(x.values, x.state, x.nearest, x.anchors),
        lifts=True,
    ),
    Kernel(
        name="importance",
        run=lambda x: ops.importance(x.velocity, x.grid, stack=True),
        reference=lambda x: reference.importance(x.velocity, x.grid, stack=True),
        released=released_importance,
        bytes_moved=lambda x: _bytes(x.velocity, x.importance),
    ),
    Kernel(
        name="importance + activate",
        run=lambda x: ops.activate(ops.importance(x.velocity, x.grid, stack=True), x.anchors, x.tokens.shape[1]),
        reference=None,
        released=lambda x: released_activate(x, released_importance(x).float()),
        bytes_moved=lambda x: _bytes(x.velocity, x.importance, x.importance, x.anchors, x.tokens),
    ),
    Kernel(
        name="activate",
        run=lambda x: ops.activate(x.importance, x.anchors, x.tokens.shape[1]),
        reference=None,
        released=released_activate,
        bytes_moved=lambda x: _bytes(x.importance, x.anchors, x.tokens),
    ),
    Kernel(
        name="micro_flow_into",
        run=lambda x: ops.micro_flow_into(*_micro_flow(x)),
        reference=lambda x: reference.micro_flow_into(*_micro_flow(x)),
        released=None,
        bytes_moved=lambda x: 2 * _bytes(x.values) + 3 * x.tokens.numel() * x.state.shape[2] * x.state.element_size(),
    ),
    Kernel(
        name="pool",
        run=lambda x: ops.pool(*_pool(x)),
        reference=lambda x: reference.pool(*_pool(x)),
        released=None,
        bytes_moved=lambda x: _bytes(x.state, x.pooled),
    ),
    Kernel(
        name="lift_pooled",
        run=lambda x: ops.lift_pooled(*_lift_pooled(x)),
        reference=lambda x: reference.lift_pooled(*_lift_pooled(x)),
        released=None,
        bytes_moved=lambda x: _bytes(x.state, x.state, x.pooled, x.pooled_values),
    ),
)


def measure(size: str, options: Options) -> Iterator[Measurement]:
    """Yields a row for each operator whose name contains `options.only`, and for each width and density."""
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    with kept_memory():
        bandwidth = copy_bandwidth(options)
        for channels in CHANNELS:
            for density in DENSITIES:
                x = make_inputs(GRIDS[size], channels, density, dtype, options)
                plan_s = percentiles(seconds(lambda x=x: KERNELS[0].run(x), options))[0]
                for kernel in (kernel for kernel in KERNELS if options.only in kernel.name):
                    plan_share_s = plan_s / _STEPS_PER_PLAN if kernel.lifts else 0.0
                    yield _row(kernel, x, density, plan_share_s, bandwidth, options)


def _row(
    kernel: Kernel, x: KernelInputs, density: float, plan_s: float, bandwidth: float, options: Options
) -> Measurement:
    with torch.no_grad():
        own = percentiles(seconds(lambda: kernel.run(x), options))
        faults = page_faults(lambda: kernel.run(x))
        released = _released_seconds(kernel, x, options)
        fused = _compiled_seconds(kernel, x, options)
    limit = kernel.bytes_moved(x) / bandwidth
    fields: dict[str, Any] = {
        "operator": kernel.name,
        "grid": list(x.grid),
        "channels": x.state.shape[2],
        "anchors": x.anchors.shape[1],
        "density": density,
        "dtype": str(x.state.dtype).removeprefix("torch."),
        "seed": options.seed,
        "inputs": "warm",
        "is_graph_replay": options.device.type == "cuda",
        "compiled_kernel": options.device.type in ops.compiled(),
        "median_ms": 1e3 * own[0],
        "p20_ms": 1e3 * own[1],
        "p80_ms": 1e3 * own[2],
        "page_faults": faults,
        "plan_share_ms": 1e3 * plan_s,
        "released_ms": None if released is None else 1e3 * released,
        "compiled_reference_ms": None if fused is None else 1e3 * fused,
        "memory_limit_ms": 1e3 * limit,
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "speedup_to_released": None if released is None else released / (own[0] + plan_s),
        "speedup_to_compiled_reference": None if fused is None else fused / own[0],
    }
    return Measurement(line=_line(fields), fields=fields)


def _line(f: dict[str, Any]) -> str:
    def ms(name: str) -> str:
        return "      -" if f[name] is None else f"{f[name]:7.3f}"

    ratio = "" if f["speedup_to_released"] is None else f", {f['speedup_to_released']:.1f}x released"
    return (
        f"{f['operator']:22} {'x'.join(map(str, f['grid'])):9} D {f['channels']:3} density {f['density']:.2f}: "
        f"{ms('median_ms')} ms ({f['p20_ms']:.3f} to {f['p80_ms']:.3f}), released {ms('released_ms')}, "
        f"compiled reference {ms('compiled_reference_ms')}, memory limit {ms('memory_limit_ms')}{ratio}"
    )


def _released_seconds(kernel: Kernel, x: KernelInputs, options: Options) -> float | None:
    released = kernel.released
    matrix_gib = x.state.shape[1] * x.anchors.shape[1] * 4 / 2**30
    if len(x.grid) > 2:  # ours works within each frame, so the released code computes something else
        return None
    if released is None or ((kernel.lifts or kernel.name == "nearest_anchor") and matrix_gib > _RELEASED_MATRIX_GIB):
        return None
    return percentiles(seconds(lambda: released(x), options, in_graph=False))[0]


def _compiled_seconds(kernel: Kernel, x: KernelInputs, options: Options) -> float | None:
    if kernel.reference is None:
        return None
    torch._dynamo.reset()
    fused = torch.compile(kernel.reference, dynamic=False, fullgraph=True)
    return percentiles(seconds(lambda: fused(x), options))[0]


def copy_bandwidth(options: Options) -> float:
    """Returns the bytes read and written per second by a copy too large for any cache."""
    source = torch.empty(2**28 if options.device.type == "cuda" else 2**26, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / percentiles(seconds(lambda: target.copy_(source), options))[0]


def seconds(function: Callable[[], Any], options: Options, in_graph: bool = True) -> list[float]:
    """Returns the seconds of one call, measured `options.repeat` times, each as the mean of a batch of calls.

    On CUDA the calls are timed between two events, and replay one graph if possible.
    """
    for _ in range(3):
        function()
    if options.device.type == "cuda":
        return _cuda_seconds(function, options, in_graph)
    started = time.perf_counter()
    function()
    calls = max(1, min(50, round(0.02 / (time.perf_counter() - started))))
    found = []
    for _ in range(options.repeat):
        started = time.perf_counter()
        for _ in range(calls):
            function()
        found.append((time.perf_counter() - started) / calls)
    return found


def _cuda_seconds(function: Callable[[], Any], options: Options, in_graph: bool) -> list[float]:
    run, calls = function, 20
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        run = graph.replay
    found = []
    for _ in range(options.repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(1 if in_graph else calls):
            run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return found


CASES = tuple(
    Case(
        group="kernels",
        size=size,
        name=f"operators on a grid of {'x'.join(map(str, grid))}",
        run=functools.partial(measure, size),
        why_not=lambda options: None,
        parts=tuple(kernel.name for kernel in KERNELS),
    )
    for size, grid in GRIDS.items()
)
