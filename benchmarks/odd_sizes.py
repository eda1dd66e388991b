"""Calls every operator at odd sizes, for a sanitizer: `compute-sanitizer python -m benchmarks.odd_sizes`.

Prints one line. Results are not checked here but in `tests/ops/test_operators_cuda.py`.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch

from jitaccel import ops
from jitaccel.method.lift import blur_weights

GRIDS = ((1, 1), (1, 37), (13, 9), (33, 65), (3, 5, 7), (2, 45, 80))
CHANNELS = (1, 12, 64, 100)


def run(device: torch.device, grids: int = len(GRIDS)) -> int:
    """Calls every operator on the first `grids` grids in every dtype, stacked and as video; returns the call count."""
    generator = torch.Generator().manual_seed(0)
    calls = 0
    for grid in GRIDS[:grids]:
        for channels in CHANNELS:
            for dtype in ops.DTYPES:
                for stack in (True, False):
                    calls += _call_all(grid, channels, dtype, stack, device, generator)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


def _call_all(
    grid: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    stack: bool,
    device: torch.device,
    generator: torch.Generator,
) -> int:
    num_tokens, frame = math.prod(grid), math.prod(grid[-2:])
    is_anchor = torch.rand(2, num_tokens, generator=generator) < 0.3
    is_anchor[:, ::frame] = True
    count = int(is_anchor.sum(dim=1).min())
    order = torch.where(is_anchor, torch.rand(2, num_tokens, generator=generator), -1.0)
    order[:, ::frame] = 2.0
    anchors = order.topk(count, dim=1).indices.sort(dim=1).values.to(device)
    state, previous, velocity, noise = (
        torch.randn(2, num_tokens, channels, generator=generator).to(device, dtype) for _ in range(4)
    )
    values = torch.randn(2, count, channels, generator=generator).to(device, dtype)
    levels = torch.tensor([0.9, 0.7], device=device)
    nearest = ops.nearest_anchor(anchors, grid, stack)
    for scale in (0.4, 0.7, 2.0):  # blur widths of 7, more than 7, and more than a side
        weights = blur_weights(count / num_tokens, scale).to(device, torch.float32)
        ops.lift(values, nearest, anchors, grid, weights, stack)
    tokens = ops.activate(ops.importance(velocity, grid, 3, stack), anchors, (num_tokens - count) // 2)
    ops.importance(velocity, grid, 5, stack)
    plan = (nearest, anchors, grid, weights)
    for weight in (1 / 3, 1.0):
        ops.micro_flow_into(state, previous, velocity, noise, tokens, *plan, levels, weight, stack)
    for patch, factor in ((1, 2), (2, 2), (2, 3)):
        if channels % patch**2 == 0:
            pooled = ops.pool(state, grid, patch, factor, levels[0])
            ops.lift_pooled(pooled, pooled, state, grid, patch, factor, levels[0])
    return 15


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.odd_sizes", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try out this program")
    parser.add_argument("--grids", type=int, default=len(GRIDS), help="number of grids, smallest first")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type not in ops.compiled():
        print(f"odd_sizes: no compiled operators for {device.type}: {ops.missing()}", file=sys.stderr)
        return 1
    print(f"about {run(device, options.grids)} calls on {device.type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
