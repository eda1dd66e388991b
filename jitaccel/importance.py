"""How much the velocity varies around each token: what decides which tokens are activated."""

import torch
import torch.nn.functional as F
from torch import Tensor


def importance(velocity: Tensor, grid: tuple[int, int], window: int = 3) -> Tensor:
    """Returns the local variance of the velocity, mean over channels, `(B, N)` float32.

    `I = mean_c(E_W[v * v] - E_W[v]^2)` (ITA, arXiv:2603.10744), W a square window with stride 1 and zero
    padding that counts: a border window divides by the whole window's size, as in the released code, so that
    a constant field is important at its border. Departs from that code in taking the two moments in float64,
    where the square of a float32 is exact: their difference keeps float32 accuracy down to a standard
    deviation of about 1e-4 of the mean.

    velocity: (B, N, D) at every token, any float dtype. grid: (grid_h, grid_w), N = grid_h * grid_w.
    window: side in tokens, odd.
    """
    height, width = grid
    if velocity.ndim != 3 or velocity.shape[1] != height * width:
        raise ValueError(
            f"importance: velocity must be (B, {height * width}, D) on a {height}x{width} grid, got "
            f"{tuple(velocity.shape)}; lift it to every token first"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"importance: window must be odd and above 0, got {window}; the paper's is 3")
    # MPS has no float64, and this runs once a stage: the CPU does it.
    device = torch.device("cpu") if velocity.device.type == "mps" else velocity.device
    field = velocity.to(device).double().reshape(-1, height, width, velocity.shape[2])
    size = window * window
    mean = _window_sum(field, window) / size
    # The mean over channels and the window sum commute: the second moment needs one channel only.
    mean_square = _window_sum(field.square().mean(dim=3, keepdim=True), window) / size
    variance = mean_square.squeeze(3) - mean.square().mean(dim=3)
    return variance.clamp_min(0.0).flatten(1).to(velocity.device, torch.float32)


def _window_sum(field: Tensor, window: int) -> Tensor:
    """Returns the sums of `field` (B, h, w, D) over square windows, zeros beyond the border."""
    height, width = field.shape[1:3]
    reach = window // 2
    padded = F.pad(field, (0, 0, reach, reach, reach, reach))
    rows = padded[:, :height].clone()
    for offset in range(1, window):
        rows += padded[:, offset : offset + height]
    sums = rows[:, :, :width].clone()
    for offset in range(1, window):
        sums += rows[:, :, offset : offset + width]
    return sums
