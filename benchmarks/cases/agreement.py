"""Compares the pictures of this device with the CPU's, for every way of running the embedded model.

Each way makes one picture from the same noise in float32. Devices sum in different orders, and a sparse stage that
chooses other tokens makes another picture, so each row reports how far apart the pictures are. Dense steps, which
choose no tokens, show how much of the difference is rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..pipelines import embedded_subject
from ..registry import Case, Measurement, Options
from .denoise import no_embedded
from .record import Contender, applied

GRID = (32, 32)
WAYS = (
    Contender(method="dense", steps=10, way="eager"),
    *(Contender(method="7x", way=way) for way in ("eager", "packed", "captured")),
)


def measure(options: Options) -> Iterator[Measurement]:
    """Yields a row for each way, with the distance of its picture from the CPU's eager one."""
    expected: dict[str, torch.Tensor] = {}
    for way in WAYS:
        if way.method not in expected:
            eager = Contender(method=way.method, steps=way.steps, way="eager")
            expected[way.method] = _picture(eager, Options(device=torch.device("cpu"), repeat=1, seed=options.seed))
        error = float((_picture(way, options) - expected[way.method]).square().mean())
        psnr_db = None if error == 0.0 else -10 * math.log10(error)
        fields = {
            "method": way.method,
            "way": way.way,
            "grid": list(GRID),
            "seed": options.seed,
            "psnr_to_cpu_db": psnr_db,
            "is_same": error == 0.0,
        }
        found = "the same bits" if psnr_db is None else f"{psnr_db:.1f} dB"
        yield Measurement(line=f"{way.name:24} {found}", fields=fields)


def _picture(way: Contender, options: Options) -> torch.Tensor:
    """Returns a picture (H, W, 3) in [0, 1], float64."""
    subject = embedded_subject(options.device, GRID, options.seed)
    with applied(subject.pipe, way) as handle, torch.no_grad():
        steps: dict[str, Any] = {"num_inference_steps": way.steps if handle is None else handle.config.steps}
        generator = torch.Generator().manual_seed(options.seed)
        return torch.from_numpy(subject.pipe(**subject.call, **steps, generator=generator).images[0]).double()


CASES = (
    Case(
        group="agreement",
        size="small",
        name="embedded model, 32x32 tokens, this device against the CPU",
        run=measure,
        why_not=no_embedded,
    ),
)
