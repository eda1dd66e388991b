"""Times the operators at video size against target times on an H200, with inputs that do not fit into any cache.

21 x 45 x 80 tokens of 64 channels are a clip of five seconds at 720p. Calls alternate between copies of the inputs,
which together are several times as large as an H200's L2 cache; on the CPU too. "tiny" is for trying out the case.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..registry import Case, Measurement, Options, percentiles
from .kernels import KERNELS, Kernel, KernelInputs, make_inputs, seconds
from .memory import kept_memory

GRIDS = {"targets": (21, 45, 80), "tiny": (2, 6, 8)}
AIMS_US = {
    "lift": 25.0,
    "importance": 15.0,
    "activate": 25.0,
    "micro_flow_into": 40.0,
    "pool": 5.0,
    "lift_pooled": 5.0,
}
CHANNELS, DENSITY = 64, 0.32
COPIES = 6  # 40 MB each in bfloat16


def measure(size: str, options: Options) -> Iterator[Measurement]:
    """Yields a row for each operator that has a target time."""
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    with kept_memory():
        copies = [make_inputs(GRIDS[size], CHANNELS, DENSITY, dtype, options) for _ in range(COPIES)]
        for kernel in KERNELS:
            if kernel.name in AIMS_US:
                yield _row(kernel, copies, options)


def _row(kernel: Kernel, copies: list[KernelInputs], options: Options) -> Measurement:
    turns = itertools.cycle(copies)

    def call() -> Any:
        return kernel.run(next(turns))

    with torch.no_grad():
        median, low, high = (1e6 * x for x in percentiles(seconds(call, options)))
        parts = device_kernels(call) if options.device.type == "cuda" else {}
    x = copies[0]
    fields: dict[str, Any] = {
        "operator": kernel.name,
        "grid": list(x.grid),
        "channels": CHANNELS,
        "density": DENSITY,
        "dtype": str(x.state.dtype).removeprefix("torch."),
        "seed": options.seed,
        "inputs": f"rotated over {COPIES} copies",
        "median_ms": median / 1e3,
        "p20_ms": low / 1e3,
        "p80_ms": high / 1e3,
        "aim_us": AIMS_US[kernel.name],
        "moved_mb": kernel.bytes_moved(x) / 1e6,
        "device_kernels_us": parts,
    }
    line = f"{kernel.name:16} {median:9.1f} us ({low:.1f} to {high:.1f}), aim {AIMS_US[kernel.name]:.0f} us on an H200"
    return Measurement(line=line + "".join(f"\n    {us:8.1f} us {name}" for name, us in parts.items()), fields=fields)


def device_kernels(call: Callable[[], Any]) -> dict[str, float]:
    """Returns the device time of each kernel of a call, by name, in microseconds, as the mean of six calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(COPIES):
            call()
        torch.cuda.synchronize()
    return {
        event.key[:100]: round(event.device_time_total / COPIES, 2)
        for event in profile.key_averages()
        if event.device_time_total > 0
    }


CASES = tuple(
    Case(
        group="targets",
        size=size,
        name=f"operators on a grid of {'x'.join(map(str, grid))}, inputs that no cache holds",
        run=functools.partial(measure, size),
        why_not=lambda options: None,
    )
    for size, grid in GRIDS.items()
)
