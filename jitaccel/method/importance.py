"""How much the velocity varies around each token, which decides the tokens to activate."""

from torch import Tensor

from .. import ops


def importance(velocity: Tensor, grid: tuple[int, ...], window: int = 3) -> Tensor:
    """Returns the local variance of the velocity, mean over channels, `(B, N)` float32: `ops.importance`.

    Args:
        velocity: (B, N, D) at every token, any float dtype.
        grid: (h, w), or (t, h, w); the window then stays within each frame.
        window: Side of the window in tokens, odd.
    """
    return ops.importance(velocity, grid, window, stack=True)
