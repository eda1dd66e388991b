"""Selects the tokens that enter the network: the first anchors, those activated later, and their union.

Anchors are sorted int64 raster indices, one row per image; every image of a batch has its own.
"""

import torch
from torch import Tensor

from .. import ops
from ..errors import NonFiniteVelocityError
from .grid import lattice, name_of, num_frames, num_tokens_of


def first_anchors(
    grid: tuple[int, ...],
    count: int,
    generator: torch.Generator | None = None,
    forced: Tensor | None = None,
) -> Tensor:
    """Returns the anchors of the sparsest stage of one image, `(count,)` int64 on the CPU.

    Starts from the even rows and columns plus the whole border. If these are fewer than `count`, more tokens are drawn
    at random; if more, some are dropped at random (arXiv:2603.10744, nested token sets, as its released code builds
    them). Departs from that code, which draws from the global generator. On a (t, h, w) grid this holds in each frame,
    and each frame keeps at least one anchor.

    Args:
        grid: (h, w) or (t, h, w).
        count: Number of anchors, from the number of frames to N.
        generator: Source of the random draws; may be None if nothing is drawn.
        forced: (N,) bool, tokens that are always anchors, at most `count`. The others are placed among the rest.
    """
    num_tokens = num_tokens_of(grid)
    if not num_frames(grid) <= count <= num_tokens:
        raise ValueError(
            f"first_anchors: count must be in {num_frames(grid)}..{num_tokens} on a {name_of(grid)} grid, got {count}; "
            f"take it from JiTConfig.token_counts"
        )
    regular = lattice(grid)
    always = torch.zeros(num_tokens, dtype=torch.bool, device="cpu") if forced is None else forced.cpu()
    count -= int(always.sum())
    if count < 0:
        raise ValueError(f"first_anchors: forced must be at most count tokens, got {-count} more; raise the count")
    inside = (regular & ~always).nonzero().squeeze(1)
    missing = count - len(inside)
    if missing > 0:
        outside = (~regular & ~always).nonzero().squeeze(1)
        inside = torch.cat([inside, outside[_draw(len(outside), missing, generator)]])
    elif missing < 0:
        inside = _dropped(inside, always, count, grid, generator)
    return torch.cat([always.nonzero().squeeze(1), inside]).sort().values


def _dropped(
    inside: Tensor, always: Tensor, count: int, grid: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """Returns `count` of the tokens `inside`, at random, at least one in each frame where `always` has none."""
    order = inside[_draw(len(inside), len(inside), generator, shuffle=True)]
    frames = num_frames(grid)
    if frames == 1:
        return order[:count]
    frame_size = num_tokens_of(grid[-2:])
    needed = ~always.view(frames, frame_size).any(dim=1)
    # In each frame that needs one, keep the token that was drawn first.
    first = torch.zeros(len(order), dtype=torch.bool, device="cpu")
    for frame in needed.nonzero().squeeze(1).tolist():
        first[(order // frame_size == frame).nonzero()[0]] = True
    kept = torch.cat([order[first], order[~first]])
    if int(first.sum()) > count:
        raise ValueError(
            f"first_anchors: count must leave an anchor to each of the {frames} frames besides the forced tokens, got "
            f"{count} for {int(first.sum())} frames without one; raise the density"
        )
    return kept[:count]


def _draw(population: int, count: int, generator: torch.Generator | None, *, shuffle: bool = False) -> Tensor:
    if count == population and not shuffle:
        return torch.arange(population, device="cpu")
    if generator is None:
        raise ValueError(
            "first_anchors: generator must be given if anchors are drawn at random, got None; "
            "pass a torch.Generator, because the global one is never used"
        )
    return torch.randperm(population, generator=generator, device=generator.device)[:count].cpu()


def activate(importance: Tensor, anchors: Tensor, count: int) -> Tensor:
    """Returns the `count` most important inactive tokens of each image, `(B, count)` int64, sorted.

    Importance-guided token activation (ITA, arXiv:2603.10744). Ties go to the lowest raster index, so the result does
    not depend on device or batch. Departs from the released code, which ranks image 0 only and uses its anchors for the
    whole batch.

    Args:
        importance: (B, N) float32, finite.
        anchors: (B, M) int64.
        count: Tokens to activate, from 0 to N - M.

    Raises:
        NonFiniteVelocityError: If importance is not finite.
    """
    if not torch.isfinite(importance).all():
        images = (~torch.isfinite(importance)).any(dim=1).nonzero().squeeze(1).tolist()
        raise NonFiniteVelocityError(
            f"activate: importance must be finite, got NaN or infinity in images {images}; "
            f"the model's velocity overflowed, try bfloat16 or float32"
        )
    return ops.activate(importance, anchors, count)


def merge_anchors(anchors: Tensor, activated: Tensor) -> Tensor:
    """Returns `anchors` (B, M) and `activated` (B, count) as one sorted set, `(B, M + count)`."""
    return torch.cat([anchors, activated], dim=1).sort(dim=1).values
