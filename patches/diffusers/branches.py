"""Pipelines that pass guidance branches as images of one batch, and then step once with the guided result."""

from __future__ import annotations

import torch
from torch import Tensor

from jitaccel.errors import UnsupportedModelError


def copies_of(sample: Tensor, called: Tensor | None) -> int:
    """Returns how many copies of the sampler's images, one after the other, the transformer was called with.

    Waits for the device if there is more than one copy.

    Args:
        sample: (B, N, D), the state that the scheduler will step.
        called: (k * B, N, D), the state in this step's call of the transformer.

    Raises:
        UnsupportedModelError: If the call had other images, or the images in another order.
    """
    given, wanted = sample.shape[0], sample.shape[0] if called is None else called.shape[0]
    if called is None or given == wanted:
        return 1
    copies = wanted // max(given, 1)
    if given and torch.equal(called, repeated(sample, copies)):
        return copies
    raise UnsupportedModelError(
        f"jitaccel: the transformer must be called with the images that scheduler.step gets, or with whole copies of "
        f"them one after the other, got a call with {wanted} images and a step with {given}; call it with "
        f"torch.cat([latents] * branches) or once for each branch, or remove() the handle"
    )


def repeated(x: Tensor, copies: int) -> Tensor:
    """Returns `copies` copies of a batch (B, ...) one after the other, (copies * B, ...); `x` itself for one copy."""
    return x if copies == 1 else x.repeat(copies, *(1,) * (x.ndim - 1))


def note_of(copies: int) -> tuple[str, ...]:
    """Returns the note for statistics about copies that are counted as images."""
    return () if copies == 1 else (f"{copies} branches of guidance come as one batch, and count as images",)
