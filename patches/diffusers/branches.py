"""Pipelines that bring the branches of guidance as images of one batch, and step once with what they come to."""

from __future__ import annotations

import torch
from torch import Tensor

from jitaccel.errors import UnsupportedModelError


def copies_of(sample: Tensor, called: Tensor | None) -> int:
    """Returns how many copies of the sampler's images, one after the other, the transformer was called with.

    Waits for the device where there are several.

    Args:
        sample: (B, N, D), the state that the scheduler is to step.
        called: (k * B, N, D), the state of the step's call of the transformer.

    Raises:
        UnsupportedModelError: Where the call had other images, or in another order.
    """
    given, wanted = sample.shape[0], sample.shape[0] if called is None else called.shape[0]
    if called is None or given == wanted:
        return 1
    copies = wanted // max(given, 1)
    if given and torch.equal(called, repeated(sample, copies)):
        return copies
    raise UnsupportedModelError(
        f"jitaccel: a call of the transformer must be of the images that scheduler.step gets, or of whole copies of "
        f"them one after the other, got a call with {wanted} images and a step with {given}; call it with "
        f"torch.cat([latents] * branches) or once for each branch, or remove() the handle"
    )


def repeated(x: Tensor, copies: int) -> Tensor:
    """Returns `copies` of a batch (B, ...) one after the other, (copies * B, ...); the very tensor for one."""
    return x if copies == 1 else x.repeat(copies, *(1,) * (x.ndim - 1))


def note_of(copies: int) -> tuple[str, ...]:
    """Returns what statistics say of copies that are counted as images."""
    return () if copies == 1 else (f"{copies} branches of guidance come as one batch, and count as images",)
