"""Muon, and workers that train together. Workers import this file, so it imports little."""

from __future__ import annotations

from pathlib import Path

import torch

from training import parallel
from training.muon import Muon, orthogonalise


def test_orthogonalise_keeps_directions_and_evens_their_strength() -> None:
    for shape in ((40, 24), (24, 40), (16, 16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        strengths = (left.T @ orthogonalise(matrix) @ right.T).diagonal()
        assert strengths.min() > 0.6 and strengths.max() < 1.3


def test_muon_finds_the_minimum_of_a_quadratic() -> None:
    target = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    matrix = torch.zeros(12, 20, requires_grad=True)
    muon = Muon([matrix], lr=0.05, weight_decay=0.0)
    for _ in range(300):
        muon.zero_grad()
        (matrix - target).square().sum().backward()
        muon.step()
    assert (matrix - target).abs().max() < 0.1


def _steps(folder: Path) -> None:
    """Takes two steps with different gradients on every worker, and saves the result."""
    matrices = [torch.full((4, 6), float(k), requires_grad=True) for k in range(3)]
    muon = Muon(matrices, lr=0.1)
    for step in range(2):
        for k, matrix in enumerate(matrices):
            generator = torch.Generator().manual_seed(10 * step + k)
            gradients = torch.randn(2, 4, 6, generator=generator)
            workers = parallel.num_workers()
            matrix.grad = gradients[parallel.rank()].clone() if workers == 2 else gradients.mean(dim=0)
        parallel.average_(matrix.grad for matrix in matrices if matrix.grad is not None)
        muon.step()
    torch.save([matrix.detach() for matrix in matrices], folder / f"{parallel.num_workers()}-{parallel.rank()}.pt")


def test_two_workers_take_the_steps_of_one(tmp_path: Path) -> None:
    for workers in (1, 2):
        parallel.launch(workers, _steps, tmp_path)
    one, *both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for worker in both:
        for alone, together in zip(one, worker, strict=True):
            torch.testing.assert_close(together, alone)
