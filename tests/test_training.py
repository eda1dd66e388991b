"""What the embedded model is trained with: pictures, latents, levels, Muon, and workers that train together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jitaccel.evaluation.scenes.draw import draw
from jitaccel.evaluation.scenes.scene import random_landscape

pytest.importorskip("diffusers")

from training import parallel
from training.decoder import new_autoencoder, write_encoder
from training.muon import Muon, orthogonalise
from training.patch_encoder import encode, patch_features
from training.pictures import NUM_LABELS, PictureSet, SetSize, draw_sets
from training.transformer import random_levels


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
    """Takes two steps on gradients of which every worker has its own, and saves where they led."""
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


def test_picture_set_gives_sizes_of_the_same_pictures(tmp_path: Path) -> None:
    draw_sets(tmp_path, workers=1, sets=(SetSize(width=64, height=64, count=3),))
    pictures = PictureSet(tmp_path, "64x64")
    numbers = np.array([0, 2])
    whole, half = pictures.pictures(numbers), pictures.pictures(numbers, rows=4)
    assert whole.shape == (2, 3, 64, 64) and half.shape == (2, 3, 32, 32)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(whole, 2), half)
    drawn = draw(pictures.landscape(2), 64)
    assert np.array_equal(((whole[1] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), drawn)


def test_labels_share_each_token_among_the_regions(tmp_path: Path) -> None:
    draw_sets(tmp_path, workers=1, sets=(SetSize(width=64, height=64, count=2),))
    labels = PictureSet(tmp_path, "64x64").labels(np.array([0, 1]))
    assert labels.shape == (2, 64, NUM_LABELS)
    assert (labels.sum(dim=2) - 1).abs().max() < 0.03


def test_patch_features_hardly_lose_anything_of_a_drawing() -> None:
    picture = torch.from_numpy(draw(random_landscape(np.random.default_rng(2)), 128)).permute(2, 0, 1)[None] / 127.5 - 1
    filters = patch_features()
    inverse = torch.linalg.pinv(filters.flatten(1)).T.reshape(filters.shape)
    back = torch.nn.functional.conv_transpose2d(encode(picture), inverse, stride=4)
    assert -10 * torch.log10((back - picture).square().mean() / 4) > 28


def test_autoencoder_encodes_what_the_closed_form_does() -> None:
    vae = new_autoencoder()
    write_encoder(vae)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode()
    torch.testing.assert_close(latents, encode(picture), atol=0.02, rtol=0)


def test_levels_cover_the_top_at_every_size() -> None:
    torch.manual_seed(0)
    for tokens in (256, 1024):
        levels = random_levels(4000, tokens)
        assert levels.min() >= 0 and levels.max() <= 1
        assert (levels > 0.9).float().mean() > 0.2
        assert (levels < 0.3).float().mean() > 0.05
