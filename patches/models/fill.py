"""Tokens that a model adds to those of a picture, all alike, and that its attention does not mask (HiDream-I1).

A stage that shows the network some of the tokens shows it as large a share of the fill. Fill tokens are copies of one
another from the first layer to the last, so attention is divided between picture and fill as for the whole picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cutting import Places, places_of

_SHARE, _GIVEN = "share of the fill", "fill of the forward"


def with_share(places: Places, fill: int, num_tokens: int) -> Places:
    """Returns places that keep as large a share of the fill as of the tokens.

    Args:
        places: Of a stage.
        fill: How many tokens the model adds to the whole picture.
        num_tokens: N, of the whole picture.
    """
    places.kept[_SHARE] = share_of(fill, places.anchors.shape[1], num_tokens)
    return places


def places_of_smaller(latents: Tensor, grid: tuple[int, ...], fill: int, num_tokens: int) -> Places | None:
    """Returns all places of a smaller picture, with its share of the fill; None where the model fills nothing.

    Args:
        latents: Of the whole pictures, (B, ...).
        grid: Of the smaller ones.
        fill: How many tokens the model adds to a whole picture.
        num_tokens: N, of a whole picture.
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
    """Returns what holds tokens, fill and others along axis 1 at the anchors, the share of the fill, and the others."""
    given = places.kept[_GIVEN]
    share = min(given, places.kept.get(_SHARE, given))
    if share < given:
        end = places.num_tokens + share
        x = torch.cat([x[:, :end], x[:, end + given - share :]], dim=1)
    return places.take(x, 1)
