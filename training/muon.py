"""Muon: momentum, orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024, "Muon").

The iteration runs in bfloat16 if the processor multiplies it natively, and otherwise in float32, because emulated
bfloat16 (as in torch.optim.Muon on an older CPU) takes twenty times as long. Several workers share the matrices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import parallel

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the paper's quintic, which is steep at 0 and near 1 on (0, 1]
_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Returns a matrix with the singular vectors of the given one, and singular values near 1."""
    first, third, fifth = _COEFFICIENTS
    x = matrix.bfloat16() if has_native_bfloat16() else matrix
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def has_native_bfloat16() -> bool:
    """Returns whether this processor multiplies bfloat16 natively."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Muon(torch.optim.Optimizer):
    """Takes steps with root mean square `0.2 * lr`, like AdamW's. Each worker updates its share of the matrices."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            updates = [self._update(k, matrix, group["momentum"]) for k, matrix in enumerate(group["params"])]
            parallel.sum_(updates)
            for matrix, update in zip(group["params"], updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)

    def _update(self, k: int, matrix: Tensor, momentum: float) -> Tensor:
        """Returns the orthogonalised Nesterov momentum of the k-th matrix; zeros if another worker computes it."""
        mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
        gradient = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
        mean.lerp_(gradient, 1 - momentum)
        if k % parallel.num_workers() != parallel.rank():
            return torch.zeros_like(matrix)
        return orthogonalise(torch.lerp(gradient, mean, momentum))
