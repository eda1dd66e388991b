"""Data-parallel training on one machine: one process per core, with gradients averaged after every backward pass.

Two single-threaded processes train 20 to 25 % faster here than one process with two threads, because narrow matrices
give OpenMP little to divide. Another job on the machine then only costs its share of time, instead of delaying a
barrier in every operation.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn


def launch(workers: int, function: Callable[..., None], *arguments: Any) -> None:
    """Runs `function(*arguments)` in `workers` processes that know each other through `rank` and `num_workers`."""
    if workers == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting")
        spawn(_work, (workers, meeting, function, arguments), nprocs=workers)


def _work(rank: int, workers: int, meeting: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    try:
        function(*arguments)
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Returns the index of this worker; 0 if there is only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_workers() -> int:
    """Returns the number of workers that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor with its sum over all workers, in one message."""
    if num_workers() == 1:
        return
    listed = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in listed])
    distributed.all_reduce(flat)
    for tensor, part in zip(listed, flat.split([tensor.numel() for tensor in listed]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor with its mean over all workers."""
    listed = list(tensors)
    sum_(listed)
    for tensor in listed:
        tensor.div_(num_workers())
