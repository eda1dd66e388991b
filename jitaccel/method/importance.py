"""How much the velocity varies around each token: what decides which tokens are activated."""

from torch import Tensor

from .. import ops


def importance(velocity: Tensor, grid: tuple[int, ...], window: int = 3) -> Tensor:
    """Returns the local variance of the velocity, mean over channels, `(B, N)` float32: `ops.importance`.

    velocity: (B, N, D) at every token, any float dtype. grid: (h, w), or (t, h, w), where the window stays within each
    frame. window: side in tokens, odd.
    """
    return ops.importance(velocity, grid, window, stack=True)
