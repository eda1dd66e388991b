"""The fill: padding tokens that a model adds to those of a picture and that its attention does not mask (HiDream-I1).

A stage that computes some of the tokens keeps the same share of the fill. All fill tokens are equal from the first
layer to the last, so attention is divided between picture and fill as for the whole picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cutting import Places, places_of

_SHARE, _GIVEN = "share of the fill", "fill of the forward"


def with_share(places: Places, fill: int, num_tokens: int) -> Places:
    """Returns places that keep the same share of the fill as of the tokens.

    Args:
        places: Places of a stage.
        fill: Number of tokens that the model adds to the whole picture.
        num_tokens: N, the tokens of the whole picture.
    """
    places.kept[_SHARE] = share_of(fill, places.anchors.shape[1], num_tokens)
    return places


def places_of_smaller(latents: Tensor, grid: tuple[int, ...], fill: int, num_tokens: int) -> Places | None:
    """Returns all places of a smaller picture, with its share of the fill; None if there is no fill.

    Args:
        latents: Latents of the whole pictures, (B, ...).
        grid: Grid of the smaller pictures.
        fill: Number of tokens that the model adds to a whole picture.
        num_tokens: N, the tokens of a whole picture.
    """
    if not fill:
        return None
    count = math.prod(grid)
    every = torch.arange(count, device=latents.device).expand(len(latents), -1)
    return with_share(places_of(every, count, are_shared=True), fill, num_tokens)


def share_of(fill: int, count: int, num_tokens: int) -> int:
    """Returns how many fill tokens go with `count` of N tokens."""
    return round(fill * count / num_tokens)


def embedded(x: Tensor, places: Places) -> Tensor:
    """Returns embedded tokens (B, N + fill, D) at the anchors, and the share of the fill."""
    places.kept[_GIVEN] = x.shape[1] - places.num_tokens
    return with_fill(x, places)


def with_fill(x: Tensor, places: Places) -> Tensor:
    """Returns the anchors, the share of the fill, and what follows them, of (B, N + fill + others, ...)."""
    given = places.kept[_GIVEN]
    share = min(given, places.kept.get(_SHARE, given))
    if share < given:
        end = places.num_tokens + share
        x = torch.cat([x[:, :end], x[:, end + given - share :]], dim=1)
    return places.take(x, 1)
