"""Reads the arguments of a FLUX model: the token grid, which tokens are generated, and the noise level."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.method.run import Run


def one_image(ids: Tensor) -> Tensor:
    """Returns one image's position ids (S, A), from ids that may have one row for each image, (B, S, A)."""
    if ids.ndim == 2:
        return ids
    if ids.shape[0] > 1 and not bool((ids == ids[:1]).all()):
        raise ValueError("jitaccel: img_ids must be the same for every image, got ids that differ; pass (N, 3)")
    return ids[0]


def grid_of_ids(img_ids: Tensor, num_tokens: int) -> tuple[int, int]:
    """Returns (grid_h, grid_w) of position ids (N, A), rows (0, row, column) or (0, row, column, 0) in raster order.

    Ids in half precision are rounded (in bfloat16 beyond 256); the end of the first row still gives the grid width.
    Waits for the device.

    Raises:
        ValueError: If the ids are not in raster order, or there is not one id per token.
    """
    ids = one_image(img_ids.detach()).cpu()
    ends = ids[:, 1].nonzero()
    width = int(ends[0]) if len(ends) else len(ids)
    height = len(ids) // max(width, 1)
    rows, columns = torch.meshgrid(*(torch.arange(side, device="cpu") for side in (height, width)), indexing="ij")
    raster = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(ids.dtype)
    is_raster = torch.equal(ids[:, :3], raster) and not ids[:, 3:].any()
    if len(ids) != num_tokens or not is_raster:
        largest = [int(ids[:, axis].max()) if len(ids) else 0 for axis in (1, 2)]
        raise ValueError(
            f"jitaccel: img_ids must be the raster of the {num_tokens} tokens given, got {len(ids)} ids up to row "
            f"{largest[0]}, column {largest[1]}; build them as the pipelines do"
        )
    return height, width


def single_level(timestep: Tensor) -> float:
    """Returns the noise level that all images of a batch share. Waits for the device.

    Raises:
        UnsupportedModelError: If the images have different levels.
        ValueError: If the timestep is not a noise level.
    """
    levels = timestep.detach().float().flatten().tolist()
    if any(level != levels[0] for level in levels):
        raise UnsupportedModelError(
            f"jitaccel: timestep must be one noise level for the whole batch, got {levels}; call image by image"
        )
    if not 0.0 < levels[0] <= 1.0:
        raise ValueError(f"jitaccel: timestep must be a noise level in (0, 1], got {levels[0]:g}; divide it by 1000")
    return float(levels[0])


def shown_timestep(run: Run, timestep: Tensor) -> Tensor:
    """Returns the `timestep` for a stage's network, which replaces the call's own, in the same shape and dtype.

    A pooled stage shows a picture at a different level. It is rounded as the pipelines round theirs: multiplied by
    1000, cast to the dtype, and divided by 1000.
    """
    if run.factor == 1:
        return timestep
    return torch.full_like(timestep, 1000.0 * run.shown_level) / 1000


class SeenIds:
    """Counts the ids of generated tokens, and remembers the count as long as the same tensor comes unmodified."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, int] | None = None

    def num_generated(self, ids: Tensor) -> int:
        """Returns the count for position ids (S, A) or (B, S, A); waits for the device if the tensor is new."""
        if self._seen is not None and self._seen[0]() is ids and self._seen[1] == ids._version:
            return self._seen[2]
        count = num_generated(one_image(ids))
        # Inference tensors have no version counter, so writes to them would go unnoticed.
        self._seen = None if ids.is_inference() else (weakref.ref(ids), ids._version, count)
        return count


def num_generated(ids: Tensor) -> int:
    """Returns how many of the position ids (S, A) belong to generated tokens, whose first id is 0.

    Waits for the device.

    Raises:
        UnsupportedModelError: If the generated tokens do not come first.
    """
    is_reference = ids[:, 0] != 0
    count = len(ids) - int(is_reference.sum())
    if bool(is_reference[:count].any()):
        raise UnsupportedModelError(
            "jitaccel: img_ids must list generated tokens (first id 0) before references, got references among them; "
            "remove() the handle for this call"
        )
    return count


def check_guidance(guidance: Tensor | None) -> None:
    """Raises ConfigError if embedded guidance (B,) is not finite. Waits for the device."""
    if guidance is not None and not bool(torch.isfinite(guidance).all()):
        raise ConfigError(
            f"jitaccel: guidance must be finite, got {guidance.flatten().tolist()}; pass a finite guidance_scale"
        )
