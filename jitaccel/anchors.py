"""Which tokens enter the network: the first anchors, those activated later, and indexing by them.

Anchors are int64 raster indices, sorted, one row for each image: every image of a batch has its own.
"""

import torch
from torch import Tensor

from .errors import NonFiniteVelocityError


def first_anchors(grid: tuple[int, int], count: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns the anchors of the sparsest stage of one image, `(count,)` int64 on the CPU.

    The even rows and columns plus the whole border; where that is fewer than `count`, more tokens are drawn
    at random among the others; where more, some are dropped at random (arXiv:2603.10744, nested token
    sets, as its released code builds them). Departs from that code, which draws from the global generator.

    grid: (grid_h, grid_w). count: 1..grid_h * grid_w. generator: needed where something is drawn.
    """
    height, width = grid
    num_tokens = height * width
    if not 1 <= count <= num_tokens:
        raise ValueError(
            f"first_anchors: count must be in 1..{num_tokens} on a {height}x{width} grid, got {count}; "
            f"take it from JiTConfig.token_counts"
        )
    regular = torch.zeros(height, width, dtype=torch.bool)
    regular[::2, ::2] = True
    regular[[0, -1], :] = True
    regular[:, [0, -1]] = True
    inside = regular.flatten().nonzero().squeeze(1)
    missing = count - len(inside)
    if missing > 0:
        outside = (~regular).flatten().nonzero().squeeze(1)
        inside = torch.cat([inside, outside[_draw(len(outside), missing, generator)]])
    elif missing < 0:
        inside = inside[_draw(len(inside), count, generator)]
    return inside.sort().values


def _draw(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    if count == population:
        return torch.arange(population)
    if generator is None:
        raise ValueError(
            "first_anchors: generator must be given where anchors are drawn at random, got None; "
            "pass a torch.Generator, the global one is never touched"
        )
    return torch.randperm(population, generator=generator, device=generator.device)[:count].cpu()


def activate(importance: Tensor, anchors: Tensor, count: int) -> Tensor:
    """Returns the `count` most important inactive tokens of each image, `(B, count)` int64, sorted.

    Importance-guided token activation (ITA, arXiv:2603.10744). Equal importance goes to the lowest raster
    index, so that the result does not depend on device or batch. Departs from the released code, which ranks
    image 0 alone and gives its anchors to the whole batch.

    importance: (B, N) float, finite. anchors: (B, M). count: 0..N - M.

    Raises NonFiniteVelocityError where importance is not finite.
    """
    num_inactive = importance.shape[1] - anchors.shape[1]
    if importance.ndim != 2 or anchors.ndim != 2 or importance.shape[0] != anchors.shape[0]:
        raise ValueError(
            f"activate: importance and anchors must be (B, N) and (B, M), got {tuple(importance.shape)} and "
            f"{tuple(anchors.shape)}; give each image its own row"
        )
    if not 0 <= count <= num_inactive:
        raise ValueError(
            f"activate: count must be in 0..{num_inactive}, the inactive tokens, got {count}; "
            f"take it from JiTConfig.token_counts"
        )
    if not torch.isfinite(importance).all():
        images = (~torch.isfinite(importance)).any(dim=1).nonzero().squeeze(1).tolist()
        raise NonFiniteVelocityError(
            f"activate: importance must be finite, got NaN or infinity in images {images}; "
            f"the model's velocity overflowed, try bfloat16 or float32"
        )
    inactive_importance = importance.scatter(1, anchors, -torch.inf)
    ranking = inactive_importance.argsort(dim=1, descending=True, stable=True)
    return ranking[:, :count].sort(dim=1).values


def merge_anchors(anchors: Tensor, activated: Tensor) -> Tensor:
    """Returns `anchors` (B, M) and `activated` (B, count) as one sorted set, `(B, M + count)`."""
    return torch.cat([anchors, activated], dim=1).sort(dim=1).values


def gather_tokens(x: Tensor, anchors: Tensor) -> Tensor:
    """Returns the tokens of `x` (B, N, ...) at `anchors` (B, M), as `(B, M, ...)`; indices may repeat."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat.index_select(0, _flat_index(anchors, x.shape[1])).view(*anchors.shape, *x.shape[2:])


def scatter_tokens(values: Tensor, anchors: Tensor, num_tokens: int) -> Tensor:
    """Returns `(B, num_tokens, ...)` with `values` (B, M, ...) at `anchors` (B, M) and zeros elsewhere."""
    return put_tokens_(values.new_zeros(values.shape[0], num_tokens, *values.shape[2:]), values, anchors)


def put_tokens_(x: Tensor, values: Tensor, anchors: Tensor) -> Tensor:
    """Returns the contiguous `x` (B, N, ...) after writing `values` (B, M, ...) at `anchors` (B, M)."""
    x.view(-1, *x.shape[2:]).index_copy_(
        0, _flat_index(anchors, x.shape[1]), values.reshape(-1, *values.shape[2:])
    )
    return x


def _flat_index(anchors: Tensor, num_tokens: int) -> Tensor:
    # One index over the flattened batch: index_select copies whole rows, gather reads element by element.
    starts = torch.arange(anchors.shape[0], device=anchors.device) * num_tokens
    return (anchors + starts[:, None]).flatten()


def check_anchors(function: str, anchors: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless `anchors` is a non-empty (B, M) int64 with rows that rise within 0..N - 1.

    Reads the tensor, so on a GPU it waits for it: once a stage, never once a step.
    """
    is_index = anchors.ndim == 2 and anchors.dtype == torch.int64 and anchors.numel() > 0
    if not is_index:
        raise ValueError(
            f"{function}: anchors must be a non-empty int64 (B, M), got {tuple(anchors.shape)} of "
            f"{anchors.dtype}; give each image its own row"
        )
    is_sorted = bool((anchors[:, 1:] > anchors[:, :-1]).all())
    if not is_sorted or int(anchors[:, 0].min()) < 0 or int(anchors[:, -1].max()) >= num_tokens:
        raise ValueError(
            f"{function}: anchors must rise strictly within 0..{num_tokens - 1}, got a row that does not; "
            f"sort them and check the grid"
        )
