"""How much the velocity varies around each token: what decides which tokens are activated."""

from torch import Tensor

from .. import ops


def importance(velocity: Tensor, grid: tuple[int, int], window: int = 3) -> Tensor:
    """Returns the local variance of the velocity, mean over channels, `(B, N)` float32: `ops.importance`.

    velocity: (B, N, D) at every token, any float dtype. grid: (grid_h, grid_w), N = grid_h * grid_w.
    window: side in tokens, odd.
    """
    return ops.importance(velocity, grid, window)
